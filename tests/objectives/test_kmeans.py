"""Training of k-means tokenizers; `main` below is what torchrun starts."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from mpm import checkpoint, distributed
from mpm.objectives.kmeans import KMeans
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.patchify.pixels import Normalize, to_unit
from mpm.tokenizers.kmeans import FeatureCodes, PatchCodes
from mpm.training.loop import StepReport, train_steps
from tests.networks import GRID, PATCH, make_backbone, randomize

CPU = torch.device("cpu")
IMAGE_SIZE = GRID[0] * PATCH[0], GRID[1] * PATCH[1]
NOW = torch.zeros(())


class Batch(NamedTuple):
    images: Tensor


def make_objective(kind: str = "patches", *, num_codes: int = 8, seed: int = 3) -> KMeans:
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    if kind == "patches":
        return KMeans(PatchCodes(num_codes, patch_size=PATCH, normalize=normalize, channels=3), seed=seed)
    backbone = randomize(make_backbone())
    return KMeans(
        FeatureCodes(num_codes, backbone=backbone, norm=None, normalize=normalize, layer=1), seed=seed
    )


def striped_images(count: int, *, seed: int = 0) -> Tensor:
    """Bytes; every patch is one of 8 shapes, of any brightness and contrast, and noise."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(99))
    chosen = shapes[torch.randint(8, (count, *GRID), generator=generator)]  # [B,h,w,C,p,p]
    contrast = 20 + 20 * torch.rand(count, *GRID, 1, 1, 1, generator=generator)
    patches = 127 + contrast * chosen + 5 * torch.randn(chosen.shape, generator=generator)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, *IMAGE_SIZE).clamp(0, 255).byte()


def steps_of(
    objective: nn.Module, images: Tensor, *, start: int = 0, stop: int, accumulate: int = 1, share: int = 8
) -> Iterator[StepReport]:
    """`share`: images of a step on this process."""
    return train_steps(
        objective,
        [Batch(rows) for rows in images.split(share // accumulate)],
        prepare=lambda batch: TokenizerInputs(to_unit(batch.images, CPU), None),
        optimizer=None,
        lr_at=lambda step: 0.0,
        start=start,
        stop=stop,
        accumulate=accumulate,
    )


@pytest.mark.parametrize("kind", ["patches", "features"])
def test_the_loss_is_the_mean_squared_distance_to_the_nearest_centroid(kind: str) -> None:
    objective, images = make_objective(kind), torch.rand(4, 3, *IMAGE_SIZE)
    output = objective(TokenizerInputs(images, None), NOW)
    centroids = objective.tokenizer.codebook.vectors.double()
    rows = objective.tokenizer.vectors(images).flatten(0, 1).double()
    losses = [min(float((row - centroid).square().mean()) for centroid in centroids) for row in rows]
    assert float(output.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    codes = objective.tokenizer.encode(images).flatten().tolist()
    assert float(output.metrics["codes_used"]) == pytest.approx(len(set(codes)) / 8)
    assert output.metrics.keys() == {"perplexity", "codes_used"}


@pytest.mark.parametrize("kind", ["patches", "features"])
def test_the_loss_of_what_has_no_structure_is_about_one(kind: str) -> None:
    objective = make_objective(kind, num_codes=2)
    objective.tokenizer.codebook.started.fill_(True)  # and both centroids are 0
    loss = objective(TokenizerInputs(torch.rand(8, 3, *IMAGE_SIZE), None), NOW).loss
    assert float(loss) == pytest.approx(1, rel=0.05)


def test_nothing_needs_a_gradient() -> None:
    for kind in ("patches", "features"):
        assert not any(parameter.requires_grad for parameter in make_objective(kind).parameters())


def test_codes_become_the_shapes_that_there_are() -> None:
    images, objective = striped_images(30 * 8), make_objective()
    reports = list(steps_of(objective, images, stop=30))
    assert reports[-1].loss < 0.08
    assert all(report.grad_norm is None for report in reports)
    assert reports[-1].metrics["codes_used"] == 1

    tokenizer = objective.tokenizer
    unseen = to_unit(striped_images(64, seed=1), CPU)
    vectors = tokenizer.vectors(unseen).flatten(0, 1)
    theirs = MiniBatchKMeans(8, batch_size=96, n_init=3, random_state=0)
    for rows in tokenizer.vectors(to_unit(images, CPU)).flatten(0, 1).split(96):
        theirs.partial_fit(rows)
    centers = torch.from_numpy(theirs.cluster_centers_).float()
    expected = torch.cdist(vectors, centers).amin(1).square().mean() / 48
    objective.eval()
    assert float(objective(TokenizerInputs(unseen, None), NOW).loss) < 1.05 * float(expected)


def test_micro_batches_change_nothing_once_it_is_started() -> None:
    images, whole = striped_images(4 * 8), make_objective()
    whole(TokenizerInputs(to_unit(images[:4], CPU), None), NOW)  # the first micro-batch
    whole.after_step(1)
    parts = copy.deepcopy(whole)
    pairs = zip(
        steps_of(whole, images, stop=4),
        steps_of(parts, images, stop=4, accumulate=4),
        strict=True,
    )
    for one, four in pairs:
        torch.testing.assert_close(four.loss, one.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["patches", "features"])
def test_a_resumed_run_is_equal_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    images, whole = striped_images(6 * 8), make_objective(kind)
    half = copy.deepcopy(whole)
    expected = [report.loss for report in steps_of(whole, images, stop=6)]
    losses = [report.loss for report in steps_of(half, images[:24], stop=3)]
    state = half.state_dict()
    checkpoint.save(tmp_path, step=3, config={}, metadata={}, model=state, train_state={}, keep=1)
    resumed = make_objective(kind)
    resumed.load_state_dict(checkpoint.load(tmp_path).model)
    losses += [report.loss for report in steps_of(resumed, images[24:], start=3, stop=6)]
    assert losses == expected
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_in_eval_mode_nothing_is_learned() -> None:
    objective = make_objective()
    inputs = TokenizerInputs(to_unit(striped_images(4), CPU), None)
    objective(inputs, NOW)
    twin = copy.deepcopy(objective)
    objective.eval()
    objective(inputs, NOW)
    for one in (objective, twin):
        one.after_step(1)
    torch.testing.assert_close(objective.state_dict(), twin.state_dict(), rtol=0, atol=0)


def learned(kind: str, rank: int, world_size: int) -> tuple[dict[str, Tensor], list[float]]:
    """The state after four steps of 8 images, and their losses, on one of several processes."""
    torch.manual_seed(0)
    objective, share = make_objective(kind), 8 // world_size
    images = striped_images(32).view(4, world_size, share, 3, *IMAGE_SIZE)[:, rank].flatten(0, 1)
    losses = [float(report.loss) for report in steps_of(objective, images, stop=4, share=share)]
    return objective.state_dict(), losses


def main(folder: Path) -> None:
    distributed.start("cpu")
    rank = distributed.rank()
    torch.save({kind: learned(kind, rank, 2) for kind in ("patches", "features")}, folder / f"{rank}.pt")
    distributed.stop()


@pytest.mark.torchrun
def test_two_processes_equal_one(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "-m", "tests.objectives.test_kmeans", str(tmp_path)],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for kind in ("patches", "features"):
        (state, losses), (other_state, other_losses) = (states[kind] for states in saved)
        torch.testing.assert_close(other_state, state, rtol=0, atol=0)
        expected_state, expected_losses = learned(kind, 0, 1)
        torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-6)
        means = [sum(pair) / 2 for pair in zip(losses, other_losses, strict=True)]
        assert means == pytest.approx(expected_losses, rel=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
