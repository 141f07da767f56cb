"""Training of BEiT v2's tokenizer against a loss and a codebook written out.

`main` is what torchrun starts: two processes against one that sees both halves of each batch.
"""

import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mpm import distributed
from mpm.backbones.initialization import initialize
from mpm.objectives.teachers import PixelTeacher
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.objectives.vqkd import VQKDTraining
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.vqkd import VQKD
from tests.networks import DIM, GRID, HEADS, make_backbone, randomize

V, CODE_DIM, FEATURES = 7, 3, 6
N = GRID[0] * GRID[1]
PROGRESS = torch.tensor(0.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32


def make_training(*, commitment: float = 0.5, num_codes: int = V, depth: int = 2) -> VQKDTraining:
    tokenizer = VQKD(
        make_backbone(),
        num_codes=num_codes,
        code_dim=CODE_DIM,
        normalize=Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)),
        channels=3,
    )
    training = VQKDTraining(
        tokenizer,
        feature_dim=FEATURES,
        decoder_depth=depth,
        num_heads=HEADS,
        commitment=commitment,
        decay=0.9,
        seed=5,
    )
    return randomize(training)


def inputs_of(batch: int = 3) -> TokenizerInputs:
    return TokenizerInputs(torch.rand(batch, 3, GRID[0] * 4, GRID[1] * 4), torch.randn(batch, N, FEATURES))


def naive_decoder(training: VQKDTraining, vectors: Tensor) -> Tensor:
    """Vectors [B,N,d] -> features [B,N,F], with a class token."""
    weights = dict(training.named_parameters())
    head_dim = DIM // HEADS

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = linear(vectors, "decoder.stem.proj") + weights["decoder.positions.table"]
    x = torch.cat([weights["decoder.prefix_tokens"].expand(len(x), 1, DIM), x], dim=1)
    for index in range(training.decoder.depth):
        block = f"decoder.blocks.{index}"
        q, k, v = (norm(x, f"{block}.norm1") @ weights[f"{block}.attn.qkv.weight"].T).chunk(3, dim=-1)
        q, v = q + weights[f"{block}.attn.q_bias"], v + weights[f"{block}.attn.v_bias"]
        heads = []
        for head in range(HEADS):
            of = slice(head * head_dim, (head + 1) * head_dim)
            shares = (q[..., of] @ k[..., of].transpose(1, 2) / math.sqrt(head_dim)).softmax(-1)
            heads.append(shares @ v[..., of])
        x = x + linear(torch.cat(heads, dim=-1), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return linear(torch.tanh(linear(norm(x[:, 1:], "decoder_norm"), "head.0")), "head.2")


def naive_losses(training: VQKDTraining, inputs: TokenizerInputs) -> tuple[Tensor, Tensor]:
    """Distance and commitment, with the straight-through gradient."""
    z = training.tokenizer.project(inputs.images)
    codes = (z.detach()[:, :, None] - training.tokenizer.codebook.vectors).square().sum(-1).argmin(-1)
    chosen = training.tokenizer.codebook.vectors[codes]
    told = naive_decoder(training, z + (chosen - z).detach())
    cosines = (told * inputs.features).sum(-1) / (told.norm(dim=-1) * inputs.features.norm(dim=-1))
    return 1 - cosines.mean(), (chosen - z).square().mean()


def started(training: VQKDTraining, inputs: TokenizerInputs) -> VQKDTraining:
    """After one step, so that the codebook is somewhere."""
    training(inputs, PROGRESS)
    training.after_step(1)
    return training


def test_losses_and_gradients_are_those_written_out() -> None:
    inputs = inputs_of()
    training = started(make_training(commitment=0.5), inputs)
    output = training(inputs, PROGRESS)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in training.named_parameters()}
    training.zero_grad()
    distance, commitment = naive_losses(training, inputs)
    (distance + 0.5 * commitment).backward()
    torch.testing.assert_close(output.metrics["distance"], distance.detach(), **CLOSE)
    torch.testing.assert_close(output.metrics["commitment"], commitment.detach(), **CLOSE)
    torch.testing.assert_close(output.loss, distance + 0.5 * commitment, **CLOSE)
    expected = {name: p.grad for name, p in training.named_parameters()}
    assert all(gradient.any() for gradient in gradients.values())
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)  # in another order of sums


def test_metrics_tell_how_codes_are_used() -> None:
    inputs = inputs_of()
    training = started(make_training(), inputs)
    metrics = training(inputs, PROGRESS).metrics
    assert metrics.keys() == {"distance", "commitment", "perplexity", "codes_used"}
    counts = Counter(training.tokenizer.encode(inputs.images).flatten().tolist())
    shares = [count / counts.total() for count in counts.values()]
    assert metrics["codes_used"].item() == pytest.approx(len(counts) / V)
    assert metrics["perplexity"].item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert not any(value.requires_grad for value in metrics.values())


def test_the_codebook_starts_once_and_in_train_mode_only() -> None:
    training, inputs = make_training(), inputs_of()
    codebook = training.tokenizer.codebook
    training.eval()(inputs, PROGRESS)
    assert not codebook.started
    training.train()(inputs, PROGRESS)
    assert codebook.started
    torch.testing.assert_close(codebook.vectors.norm(dim=1), torch.ones(V), **CLOSE)
    vectors = codebook.vectors.clone()
    training(inputs_of(), PROGRESS)
    assert torch.equal(codebook.vectors, vectors)


def test_codes_follow_what_chose_them_in_all_micro_batches() -> None:
    training, first, second = make_training(), inputs_of(), inputs_of(2)
    started(training, first)
    codebook = training.tokenizer.codebook
    before = codebook.vectors.clone()
    with torch.no_grad():
        z = torch.cat([training.tokenizer.project(x.images).flatten(0, 1) for x in (first, second)])
    training(first, PROGRESS)
    training(second, PROGRESS)
    training.after_step(2)
    codes = (z @ before.T).argmax(1)
    for code in range(V):
        expected = before[code]
        if (codes == code).any():
            mean = F.normalize(z[codes == code].sum(0), dim=0)
            expected = F.normalize(0.9 * before[code] + 0.1 * mean, dim=0)
        torch.testing.assert_close(codebook.vectors[code], expected, **CLOSE)


def test_evaluation_changes_nothing() -> None:
    training, inputs = make_training(), inputs_of()
    started(training, inputs)
    before = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    training.eval()(inputs_of(), PROGRESS)
    training.train()(inputs, PROGRESS)
    other = make_training()
    other.load_state_dict(before)
    other(inputs, PROGRESS)
    training.after_step(2)
    other.after_step(2)
    torch.testing.assert_close(training.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_dead_code_is_moved() -> None:
    training, inputs = make_training(), inputs_of()
    started(training, inputs)
    codebook = training.tokenizer.codebook
    used = training.tokenizer.encode(inputs.images).unique()
    dead = next(code for code in range(V) if code not in used.tolist()) if len(used) < V else 0
    codebook.vectors[dead] = -codebook.vectors[used].mean(0)  # far from everything
    codebook.vectors[dead] /= codebook.vectors[dead].norm()
    codebook.idle[dead] = 10**6
    before = codebook.vectors[dead].clone()
    training(inputs, PROGRESS)
    assert dead not in training.tokenizer.encode(inputs.images)
    training.after_step(2)
    z = training.tokenizer.project(inputs.images).flatten(0, 1)
    assert not torch.equal(codebook.vectors[dead], before)
    torch.testing.assert_close((z @ codebook.vectors[dead]).max(), torch.tensor(1.0), **CLOSE)


def test_what_is_kept_is_under_tokenizer() -> None:
    training = make_training()
    prefixes = {name.partition(".")[0] for name in training.state_dict()}
    assert prefixes == {"tokenizer", "decoder", "decoder_norm", "head"}
    assert {f"tokenizer.{name}" for name in training.tokenizer.state_dict()} < training.state_dict().keys()


def test_losses_are_float32_in_autocast() -> None:
    training, inputs = make_training(), inputs_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = training(inputs, PROGRESS)
    assert output.loss.dtype == torch.float32
    assert training.tokenizer.codebook.vectors.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in training.parameters())


def test_it_learns_codes_that_tell_patches_apart() -> None:
    kinds = torch.randint(4, (8, *GRID))
    drawn = torch.rand(4, 3, 4, 4)[kinds]  # [8,rows,columns,3,4,4]
    images = drawn.permute(0, 3, 1, 4, 2, 5).reshape(8, 3, GRID[0] * 4, GRID[1] * 4)
    teacher = PixelTeacher((4, 4), channels=3)
    tokenizer = make_training().tokenizer
    training = VQKDTraining(
        tokenizer, feature_dim=teacher.dim, decoder_depth=1, num_heads=HEADS, decay=0.9, seed=0
    )
    initialize(training, "vit")
    optimizer = torch.optim.AdamW(training.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        output = training(TokenizerInputs(images, teacher(images)), PROGRESS)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        training.after_step(step + 1)
        losses.append(output.loss.item())
    assert losses[-1] < 0.25 < 0.9 < losses[0]
    codes = tokenizer.eval().encode(images).flatten()
    of_code = [set(kinds.flatten()[codes == code].tolist()) for code in codes.unique()]
    assert len(of_code) >= 4
    assert all(len(same) == 1 for same in of_code)


def _trained(training: VQKDTraining, wrapped: nn.Module, batches: list[TokenizerInputs]) -> None:
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)  # AdamW would enlarge what is rounding
    for step, inputs in enumerate(batches):
        wrapped(inputs, PROGRESS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        training.after_step(step + 1)


def main() -> None:
    torch.manual_seed(0)
    alone = make_training()
    shared = make_training()
    shared.load_state_dict(alone.state_dict())
    whole = [inputs_of(4) for _ in range(4)]
    _trained(alone, alone, whole)  # before the processes know of each other
    distributed.start("cpu")
    own = slice(distributed.rank(), None, 2)
    halves = [TokenizerInputs(images[own], features[own]) for images, features in whole]
    _trained(shared, DistributedDataParallel(shared), halves)
    torch.testing.assert_close(shared.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-5)
    vectors = shared.tokenizer.codebook.vectors
    assert torch.equal(distributed.sum_over_ranks(vectors), 2 * vectors)
    distributed.stop()


@pytest.mark.torchrun
def test_two_processes_train_the_same_codebook() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "-m", "tests.objectives.test_vqkd"],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


if __name__ == "__main__":
    main()
