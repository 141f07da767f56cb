"""Started by torchrun, this file is the program whose two processes check that they train as one does."""

import copy
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mpm import distributed
from mpm.backbones.initialization import initialize
from mpm.objectives.latent import LatentPrediction, Prototypes
from mpm.objectives.masked import MaskedInputs
from mpm.objectives.predictors import ClassPretrainingPredictor, DecoderPredictor, LinearPredictor, Predictor
from mpm.patchify.masks import PatchMask
from mpm.training.loop import StepReport, train_steps
from mpm.training.optimizer import create_adamw, parameter_groups
from tests.networks import (
    DIM,
    GRID,
    STEMS,
    make_backbone,
    random_images,
    random_mask,
    randomize,
    with_hidden,
)

N, MASKED, PROTOTYPES = 12, 7, 10
PROGRESS = torch.tensor(0.25)
PREDICTORS = ("linear", "decoder", "class")


def latent(predictor: str = "linear", stem: str = "linear", **settings: Any) -> LatentPrediction:
    """With start values and a teacher that has them too."""
    backbone = make_backbone(stem)
    heads: dict[str, Predictor] = {
        "linear": LinearPredictor(DIM, DIM),
        "decoder": DecoderPredictor(DIM, DIM, grid=GRID, width=12, depth=2, num_heads=3),
        "class": ClassPretrainingPredictor(
            DIM, DIM, blocks=[copy.deepcopy(backbone.blocks[0])], early_layer=1
        ),
    }
    objective = LatentPrediction(backbone, heads[predictor], num_prototypes=PROTOTYPES, **settings)
    for part in (backbone, heads[predictor]):
        initialize(part, "vit")
    objective.reset_teacher()
    return objective


def inputs_of(batch: int = 3) -> MaskedInputs:
    return MaskedInputs(random_images(batch), random_mask(batch, N, MASKED), torch.empty(0))


def cross_entropy_by_loops(
    taught: Tensor, told: Tensor, center: Tensor, *, teacher: float, student: float
) -> float:
    """Similarities [B,M,K] of both, mean over patches of the cross-entropy in nats."""
    total = 0.0
    rows = list(zip(taught.flatten(0, 1).tolist(), told.flatten(0, 1).tolist(), strict=True))
    for theirs, ours in rows:
        target = [math.exp((t - c) / teacher) for t, c in zip(theirs, center.tolist(), strict=True)]
        log_sum = math.log(sum(math.exp(o / student) for o in ours))
        total -= sum(t / sum(target) * (o / student - log_sum) for t, o in zip(target, ours, strict=True))
    return total / len(rows)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_the_loss_equals_a_loop(predictor: str) -> None:
    """Of each prediction; the teacher's whole token sequence, its masked rows picked by hand."""
    objective = latent(predictor, teacher_temperature=0.2, student_temperature=0.3)
    randomize(objective)
    objective.loss.center.center.normal_()
    inputs = inputs_of()
    center = objective.loss.center.value[0].clone()
    found = objective(inputs, PROGRESS).loss

    tokens = objective.teacher(inputs.images).patches
    rows = torch.stack([tokens[b][inputs.mask.masked[b]] for b in range(3)])
    rows = (rows - rows.mean(-1, keepdim=True)) / rows.var(-1, correction=0, keepdim=True).sqrt()
    taught = F.cosine_similarity(rows[..., None, :], objective.teacher_prototypes.weight, dim=-1)
    predictions = objective.predict(inputs.images, inputs.mask)
    assert len(predictions) == (2 if predictor == "class" else 1)
    expected = sum(
        cross_entropy_by_loops(
            taught,
            F.cosine_similarity(told[..., None, :], objective.prototypes.weight, dim=-1),
            center,
            teacher=0.2,
            student=0.3,
        )
        for told in predictions
    )
    assert found.item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(
        objective.loss.center.value[0], 0.9 * center + 0.1 * taught.mean((0, 1)), rtol=1e-4, atol=1e-5
    )


def test_the_loss_is_ibots() -> None:
    """lightly's, which takes a mask; ours are all of the rows."""
    from lightly.loss import IBOTPatchLoss

    objective, inputs = latent(), inputs_of()
    published = IBOTPatchLoss(PROTOTYPES)
    with torch.no_grad():
        taught = objective.teach(inputs.images, inputs.mask)
        told = objective.prototypes(objective.predict(inputs.images, inputs.mask))[0]
    hidden = torch.zeros(3, N, dtype=torch.bool).scatter(1, inputs.mask.masked, True)
    for _ in range(2):  # the second time with a center
        expected = published(taught.flatten(0, 1), told.flatten(0, 1), hidden.unflatten(1, GRID))
        torch.testing.assert_close(objective(inputs, PROGRESS).loss, expected)
    torch.testing.assert_close(objective.loss.center.value, published.center.value)


def test_the_teacher_sees_what_the_network_does_not() -> None:
    objective, inputs = latent(), inputs_of()
    changed = with_hidden(inputs.images, inputs.mask, 0.0)
    found, other = (objective.predict(images, inputs.mask) for images in (inputs.images, changed))
    assert torch.equal(found, other)
    found, other = (objective.teach(images, inputs.mask) for images in (inputs.images, changed))
    assert (found - other).abs().max() > 1e-3


def test_the_teacher_is_no_part_of_what_is_trained() -> None:
    objective, inputs = latent(), inputs_of()
    objective.train()
    assert not objective.teacher.training
    assert objective.backbone.training
    objective(inputs, PROGRESS).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.requires_grad != name.startswith("teacher"), name
    names = [n for group in parameter_groups(objective, lr=1, weight_decay=0) for n in group["names"]]
    assert not any(name.startswith("teacher") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predictor", "stem"), [*itertools.product(["linear"], STEMS), ("decoder", "linear"), ("class", "linear")]
)
def test_every_parameter_gets_a_gradient_and_the_loss_falls(predictor: str, stem: str) -> None:
    """As DDP needs it: each that wants one, in each pass."""
    objective, batch = latent(predictor, stem), batches_of(1, 3)[0]
    objective(MaskedInputs(*batch, torch.empty(0)), PROGRESS).loss.backward()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    objective.zero_grad()
    reports = train(objective, [batch] * 6, total=6)
    assert reports[-1].loss < reports[0].loss


def test_momentum_rises_to_one_in_half_a_cosine() -> None:
    objective = latent(momentum=0.9)
    found = [objective.momentum_at(torch.tensor(p)).item() for p in (0.0, 1 / 3, 0.5, 1.0)]
    assert found == pytest.approx([0.9, 0.925, 0.95, 1.0])


def test_after_a_step_the_teacher_has_moved_by_the_momentum() -> None:
    """Parameters by the momentum, statistics of a batch norm all the way."""
    objective, inputs = latent(stem="conv-batch", momentum=0.9), inputs_of()
    before = copy.deepcopy(objective)
    objective(inputs, torch.tensor(0.5))
    with torch.no_grad():
        for parameter in (*objective.backbone.parameters(), *objective.prototypes.parameters()):
            parameter.add_(torch.randn_like(parameter))
    objective.after_step(1)
    for average, module in (("teacher", "backbone"), ("teacher_prototypes", "prototypes")):
        new = dict(objective.get_submodule(module).named_parameters())
        old = dict(before.get_submodule(average).named_parameters())
        for name, parameter in objective.get_submodule(average).named_parameters():
            torch.testing.assert_close(parameter, 0.95 * old[name] + 0.05 * new[name].detach(), msg=name)
    buffers = dict(objective.backbone.named_buffers())
    for name, buffer in objective.teacher.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert any(
        not torch.equal(buffer, dict(before.teacher.named_buffers())[n]) for n, buffer in buffers.items()
    )


def test_signals_of_both_collapses() -> None:
    """One prototype for all, and all prototypes for each."""
    objective, inputs = latent(), inputs_of()
    objective.loss.center.center.copy_(torch.where(torch.arange(PROTOTYPES) == 3, -9.0, 9.0))
    metrics = objective(inputs, PROGRESS).metrics
    assert metrics["perplexity"].item() == pytest.approx(1, abs=1e-4)
    assert metrics["target_entropy"].item() == pytest.approx(0, abs=1e-4)
    objective.loss.center.center.zero_()
    with torch.no_grad():
        objective.teacher_prototypes.weight.copy_(torch.ones(PROTOTYPES, DIM))
    metrics = objective(inputs, PROGRESS).metrics
    assert metrics["target_entropy"].item() == pytest.approx(math.log(PROTOTYPES), abs=1e-4)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


def test_prototypes_are_directions() -> None:
    prototypes, x = Prototypes(4, 6), torch.randn(2, 3, 4)
    found = prototypes(x)
    assert (found.shape, found.dtype) == ((2, 3, 6), torch.float32)
    assert found.abs().max() <= 1 + 1e-6
    prototypes.weight.data.mul_(5)
    torch.testing.assert_close(prototypes(3 * x), found)


def test_prototypes_are_compared_in_float32_under_autocast() -> None:
    prototypes, x = Prototypes(64, 6), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prototypes(x)
    assert torch.equal(found, prototypes(x))
    assert found.dtype == torch.float32


class Batch(NamedTuple):
    images: Tensor
    mask: PatchMask


def batches_of(count: int, size: int) -> list[Batch]:
    return [Batch(random_images(size), random_mask(size, N, MASKED)) for _ in range(count)]


def optimizer_of(objective: nn.Module) -> torch.optim.Optimizer:
    return create_adamw(parameter_groups(objective, lr=0.003, weight_decay=0.1), lr=0.003, betas=(0.9, 0.95))


def train(
    objective: nn.Module,
    batches: list[Batch],
    *,
    start: int = 0,
    total: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[StepReport]:
    """A step on each batch."""
    steps = train_steps(
        objective,
        batches,
        prepare=lambda batch: MaskedInputs(*batch, torch.empty(0)),
        optimizer=optimizer or optimizer_of(objective),
        lr_at=lambda step: 0.003,
        start=start,
        stop=start + len(batches),
        total=total,
        clip_norm=1.0,
    )
    return list(steps)


def test_a_resumed_run_is_the_same_to_the_bit() -> None:
    """All that moves is in the state dict, teacher and center too."""
    batches = batches_of(4, 3)
    whole, first, second = (latent(stem="conv-batch", momentum=0.9) for _ in range(3))
    first.load_state_dict(whole.state_dict())
    train(whole, batches, total=4)
    optimizer, resumed = optimizer_of(first), optimizer_of(second)
    train(first, batches[:2], total=4, optimizer=optimizer)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, batches[2:], start=2, total=4, optimizer=resumed)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


@pytest.mark.torchrun
def test_two_processes_train_as_one_does() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--module", "tests.objectives.test_latent"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def compare_with_one_process() -> None:
    """Each process trains alone on all rows, then with the other on half of them."""
    torch.manual_seed(0)
    alone = latent(momentum=0.9)
    together = copy.deepcopy(alone)
    batches = batches_of(3, 4)
    expected = train(alone, batches, total=3)
    rows = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
    shares = [Batch(b.images[rows], PatchMask(b.mask.visible[rows], b.mask.masked[rows])) for b in batches]
    found = train(DistributedDataParallel(together), shares, total=3)
    # AdamW turns rounding of small gradients into steps
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two.grad_norm, one.grad_norm, rtol=1e-3, atol=0)
    torch.testing.assert_close(together.state_dict(), alone.state_dict(), rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    distributed.start("cpu", threads=1)
    compare_with_one_process()
    distributed.stop()
