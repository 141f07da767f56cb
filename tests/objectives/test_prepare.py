import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

from mpm.objectives.prepare import Mixing, PrepareLabelled, PrepareMasked
from mpm.objectives.targets import PixelTarget
from mpm.patchify.pixels import Normalize, to_unit
from tests.networks import random_mask

CPU = torch.device("cpu")
NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
CLASSES = 5


class Masked(NamedTuple):
    images: Tensor
    masked: Tensor
    target_images: Tensor | None = None
    codes: Tensor | None = None


class Labelled(NamedTuple):
    images: Tensor
    labels: Tensor
    teacher: Tensor | None = None


def labelled(batch: int = 6) -> Labelled:
    images = torch.randint(256, (batch, 3, 16, 16), dtype=torch.uint8)
    return Labelled(images, torch.randint(CLASSES, (batch,)))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm draws from the global generator
    torch.manual_seed(seed)


def prepare(**options) -> PrepareLabelled:
    return PrepareLabelled(normalize=NORMALIZE, num_classes=CLASSES, device=CPU, **options)


def test_bytes_become_shares_of_one() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit(values, CPU), torch.tensor([v / 255 for v in range(256)]))
    deep = torch.rand(7)
    assert torch.equal(to_unit(deep, CPU), deep)


@pytest.mark.parametrize("deep", [False, True])
def test_masked_images_are_normalised_and_targets_come_with_them(deep: bool) -> None:
    images = torch.randint(256, (2, 3, 12, 16), dtype=torch.uint8)
    mask, unit = random_mask(2, 12, 7), images.float() / 255
    masked = torch.zeros(2, 12, dtype=torch.bool).scatter(1, mask.masked, True)
    target = PixelTarget((4, 4), normalize=NORMALIZE, channels=3, normalize_patches=True)
    prepare_masked = PrepareMasked(target, normalize=NORMALIZE, num_masked=7, device=CPU)
    inputs = prepare_masked(Masked(unit if deep else images, masked))
    torch.testing.assert_close(inputs.images, NORMALIZE(unit))
    assert torch.equal(inputs.mask.visible, mask.visible)
    assert torch.equal(inputs.mask.masked, mask.masked)
    torch.testing.assert_close(inputs.targets, target(unit, mask))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_smoothed_as_torch_does(smoothing: float) -> None:
    batch, logits = labelled(), torch.randn(6, CLASSES)
    inputs = prepare(label_smoothing=smoothing)(batch)
    torch.testing.assert_close(inputs.images, NORMALIZE(batch.images / 255))
    torch.testing.assert_close(inputs.targets.sum(1), torch.ones(6))
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(logits, inputs.targets), expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "mixing", [Mixing(), Mixing(cutmix=0.0), Mixing(mixup=0.0), Mixing(switch=0.9), Mixing(probability=0.5)]
)
def test_mixing_equals_timms(mixing: Mixing, seed: int) -> None:
    batch = labelled()
    ours = prepare(label_smoothing=0.1, mixing=mixing)
    theirs = Mixup(mixing.mixup, mixing.cutmix, None, mixing.probability, mixing.switch, num_classes=CLASSES)
    seed_all(seed)
    images, targets = theirs(NORMALIZE(batch.images / 255), batch.labels)
    seed_all(seed)
    inputs = ours(batch)
    assert torch.equal(inputs.images, images)
    assert torch.equal(inputs.targets, targets)


@pytest.mark.parametrize("seed", range(4))
def test_erasing_equals_timms(seed: int) -> None:
    batch = labelled()
    theirs = RandomErasing(probability=0.5, mode="pixel", device="cpu")
    seed_all(seed)
    expected = theirs(NORMALIZE(batch.images / 255))
    seed_all(seed)
    assert torch.equal(prepare(erasing=0.5)(batch).images, expected)


def test_mixing_comes_after_erasing() -> None:
    """Noise is mixed too: an erased pixel of a Mixup image is not standard normal."""
    batch, mixing = labelled(), Mixing(cutmix=0.0)
    seed_all(0)
    erased = RandomErasing(probability=1.0, mode="pixel", device="cpu")(NORMALIZE(batch.images / 255))
    mixed, _ = Mixup(mixing.mixup, 0.0, label_smoothing=0.0, num_classes=CLASSES)(erased, batch.labels)
    seed_all(0)
    assert torch.equal(prepare(erasing=1.0, mixing=mixing)(batch).images, mixed)


@pytest.mark.parametrize("deep", [False, True])
def test_the_batch_itself_is_left_as_it_was(deep: bool) -> None:
    batch = labelled()
    batch = batch._replace(images=batch.images / 255) if deep else batch
    before = batch.images.clone()
    prepare(mixing=Mixing(), erasing=1.0)(batch)
    assert torch.equal(batch.images, before)


class AsTheyAre:
    """A normalisation that changes nothing."""

    def __call__(self, images: Tensor) -> Tensor:
        return images.clone()


def numbered(batch: int = 6, side: int = 8) -> tuple[Labelled, Tensor]:
    """Images that hold a power of two each, so that a mixed pixel tells its two images; and the powers."""
    powers = 2.0 ** -torch.arange(1, batch + 1)
    images = powers[:, None, None, None].expand(batch, 1, side, side).clone()
    return Labelled(images, torch.randperm(batch)), powers


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mixing", [Mixing(cutmix=0.0), Mixing(mixup=0.0)], ids=["mixup", "cutmix"])
def test_a_mixed_label_is_the_share_of_its_pixels(mixing: Mixing, seed: int, smoothing: float) -> None:
    """Counted in the images themselves: image i is mixed with the one that is as far from the end."""
    batch, powers = numbered()
    seed_all(seed)
    prepare_six = PrepareLabelled(
        normalize=AsTheyAre(), num_classes=6, device=CPU, mixing=mixing, label_smoothing=smoothing
    )
    images, targets, _ = prepare_six(batch)
    for row in range(6):
        own, other = powers[row], powers[5 - row]
        share = ((images[row] - other) / (own - other)).mean()
        expected = torch.full((6,), smoothing / 6)
        expected[batch.labels[row]] += (1 - smoothing) * share
        expected[batch.labels[5 - row]] += (1 - smoothing) * (1 - share)
        torch.testing.assert_close(targets[row], expected, rtol=0, atol=1e-5)


def test_a_binary_loss_sees_the_one_or_two_classes_of_a_mix_and_all_where_labels_are_smoothed() -> None:
    """deit/engine.py binarises by `.gt(0)`: smoothed, every class is present, which is why it is refused."""
    batch = labelled()
    for smoothing, expected in ((0.0, {1, 2}), (0.1, {CLASSES})):
        targets = prepare(mixing=Mixing(), label_smoothing=smoothing)(batch).targets
        assert set(targets.gt(0).sum(1).tolist()) <= expected
    plain = prepare()(batch).targets  # without mixing the released code gives the loss whole numbers
    assert torch.equal(plain.gt(0), F.one_hot(batch.labels, CLASSES).bool())


@pytest.mark.parametrize(
    "options",
    [{}, {"mixing": Mixing()}, {"erasing": 1.0}, {"mixing": Mixing(switch=1.0), "erasing": 1.0}],
    ids=["plain", "mixed", "erased", "both"],
)
def test_a_teacher_sees_the_networks_images_in_pixels(options) -> None:
    """Whatever was done to them; of the erased, noise of the data's mean and deviation."""
    seen: list[Tensor] = []

    def teacher(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)[:, :CLASSES]

    batch = labelled()
    inputs = prepare(teacher=teacher, **options)(batch)
    assert len(seen) == 1
    torch.testing.assert_close(NORMALIZE(seen[0]), inputs.images)
    assert torch.equal(inputs.teacher, teacher(seen[0]))
    if not options:
        torch.testing.assert_close(seen[0], batch.images / 255)
    if "erasing" in options and "mixing" not in options:
        erased = (seen[0] - batch.images / 255).abs().amax(1) > 1e-5  # [B,H,W]
        noise = NORMALIZE(seen[0]).movedim(1, -1)[erased]
        assert noise.mean().item() == pytest.approx(0, abs=0.2)
        assert noise.std().item() == pytest.approx(1, abs=0.2)


def test_a_teacher_is_not_asked_for_what_comes_with_the_batch() -> None:
    answers = torch.randn(6, CLASSES)
    inputs = prepare(teacher=lambda images: pytest.fail("asked"))(labelled()._replace(teacher=answers))
    assert torch.equal(inputs.teacher, answers)
