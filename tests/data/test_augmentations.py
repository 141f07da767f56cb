"""RandAugment against timm; 3-Augment and the simple crop against what DeiT III makes them of."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import create_transform
from torchvision.transforms import v2

from mpm.data.augmentations import RandAugment, ThreeAugment
from mpm.data.crops import SimpleCrop
from mpm.data.views import TrainView


def picture(channels: int = 3, H: int = 40, W: int = 30) -> torch.Tensor:
    return torch.randint(256, (channels, H, W), dtype=torch.uint8)


def as_pillow(image: torch.Tensor) -> Image.Image:
    return v2.functional.to_pil_image(image)


class Drawn:
    """In place of a generator: gives what it is told."""

    def __init__(self, choice: int, radius: float = 1.0):
        self.choice, self.radius = choice, radius

    def integers(self, high: int) -> int:
        assert high == 3
        return self.choice

    def uniform(self, low: float, high: float) -> float:
        assert (low, high) == (0.1, 2.0)
        return self.radius


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("radius", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_three_augment_is_the_released_one(choice: int, radius: float, channels: int) -> None:
    image = picture(channels)
    theirs = as_pillow(image)
    match choice:
        case 0:
            theirs = v2.Grayscale(channels)(theirs)
        case 1:
            theirs = ImageOps.solarize(theirs)
        case 2:
            theirs = theirs.filter(ImageFilter.GaussianBlur(radius))
    ours = ThreeAugment()(image, Drawn(choice, radius))  # type: ignore[arg-type]
    assert torch.equal(ours, v2.functional.pil_to_tensor(theirs))


def test_three_augment_chooses_each_of_the_three_for_a_third_of_the_images() -> None:
    image = picture()
    changes = [ThreeAugment()(image, np.random.default_rng(seed)) for seed in range(600)]
    grey = sum(bool((change[0] == change[2]).all()) for change in changes)
    solarised = sum(torch.equal(change, torch.where(image < 128, image, 255 - image)) for change in changes)
    assert 160 < grey < 240
    assert 160 < solarised < 240
    assert len({change.numpy().tobytes() for change in changes}) > 150  # radii differ


def test_three_augment_draws_only_from_the_private_generator() -> None:
    view = TrainView((24, 24), three_augment=True, color_jitter=0.3)
    image = picture()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    once = [view(image, np.random.default_rng(seed)) for seed in range(10)]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    torch.testing.assert_close(once, [view(image, np.random.default_rng(seed)) for seed in range(10)])


@pytest.mark.parametrize("image", [picture(5), picture(3) / 255])
def test_three_augment_refuses_what_it_cannot_change(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="three_augment works on 8-bit images of 1 or 3 channels"):
        ThreeAugment()(image, np.random.default_rng(0))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (24, 24), (300, 26)])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_simple_crop_is_a_window_of_torchvisions_resized_and_padded_image(
    shape: tuple[int, int], channels: int
) -> None:
    image = picture(channels, *shape)
    resized = v2.functional.resize(image, [24], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    padded = v2.functional.pad(resized, [4], padding_mode="reflect")
    windows = padded.unfold(1, 24, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)  # [n,C,24,24]
    found = set()
    for seed in range(40):
        crop = SimpleCrop((24, 24))(image, np.random.default_rng(seed))
        apart = (windows.int() - crop.int()).abs().amax((1, 2, 3))
        assert apart.min() <= 1  # of 8-bit rounding
        found.add(int(apart.argmin()))
    assert len(found) > 20  # of at least 81


def test_a_simple_crop_reaches_both_edges() -> None:
    ramp = torch.arange(32.0).repeat(1, 32, 1)
    firsts = {float(SimpleCrop((32, 32))(ramp, np.random.default_rng(s))[0, 0, 0]) for s in range(200)}
    assert firsts == {0.0, 1.0, 2.0, 3.0, 4.0}  # from four pixels before the edge, mirrored, to four after it


def test_a_simple_crop_takes_the_place_of_the_random_one() -> None:
    view = TrainView((24, 24), crop=SimpleCrop((24, 24)), flip=False)
    image = picture()
    expected = SimpleCrop((24, 24))(image, np.random.default_rng(3))
    assert torch.equal(view(image, np.random.default_rng(3)), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_rand_augment_is_the_one_of_timms_recipes(interpolation: str) -> None:
    """`create_transform`, as DeiT, BEiT and MAE call it: also its interpolation, and its mean uncovered."""
    mean, policy, size = (0.485, 0.456, 0.406), "rand-m9-mstd0.5-inc1", 48
    theirs = create_transform(
        size, is_training=True, auto_augment=policy, interpolation=interpolation, mean=mean
    ).transforms[2]
    ours = RandAugment(policy, (size, size), interpolation=interpolation, mean=mean)
    image = picture(3, size, size)
    for number in range(60):
        rng = np.random.default_rng(number)
        seed = int(np.random.default_rng(number).integers(2**32))
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        expected = torch.from_numpy(np.array(theirs(as_pillow(image)))).permute(2, 0, 1)
        assert torch.equal(ours(image, rng), expected)
