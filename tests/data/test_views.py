import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from mpm.data.views import EvalView, PretrainView, RandomCrop, TrainView, resize, sample_generator
from mpm.patchify.masks import RandomMask

MASK = RandomMask((4, 4), count=10)


def picture(channels: int = 3, H: int = 60, W: int = 45) -> torch.Tensor:
    coarse = torch.rand(1, channels, 9, 7)
    return (torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear")[0] * 255).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(24, 32), (90, 70)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_is_torchvisions(channels: int, size: tuple[int, int], interpolation: str) -> None:
    image = picture(channels)
    expected = functional.resize(
        image, list(size), interpolation=v2.InterpolationMode(interpolation), antialias=True
    )
    resized = resize(image, size, interpolation=interpolation)
    assert resized.dtype == torch.uint8
    torch.testing.assert_close(resized, expected, atol=1, rtol=0)  # one level of 8-bit rounding


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_deep_images_resize_without_overshoot(interpolation: str) -> None:
    edges = (picture(1) > 128).float()
    resized = resize(edges, (80, 80), interpolation=interpolation)
    assert resized.dtype == torch.float32
    assert resized.min() == 0
    assert resized.max() == 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_depths_resize_alike(interpolation: str) -> None:
    image = picture(1)
    resized = resize(image / 255, (40, 80), interpolation=interpolation)
    eight_bits = resize(image, (40, 80), interpolation=interpolation)
    torch.testing.assert_close(resized, eight_bits / 255, atol=1.1 / 255, rtol=0)  # 8-bit rounding, twice


def test_image_of_the_size_is_not_resized() -> None:
    image = picture()
    assert resize(image, (60, 45), interpolation="bicubic") is image


def test_samples_are_pure_functions_of_their_key() -> None:
    draws = {
        key: tuple(sample_generator(*key[:4], stream=key[4]).random(3))
        for key in np.ndindex(2, 3, 3, 2, 2)  # seed, view, index, repeat, stream
    }
    assert len(set(draws.values())) == len(draws)
    assert all(
        tuple(sample_generator(*key[:4], stream=key[4]).random(3)) == drawn for key, drawn in draws.items()
    )


def test_crops_have_the_area_and_aspect_asked_for() -> None:
    rng = np.random.default_rng(0)
    crop = RandomCrop((0.2, 0.5), (0.75, 4 / 3))
    image = torch.zeros(1, 400, 500)
    shapes = np.array([crop(image, rng).shape[1:] for _ in range(300)])
    areas, aspects = shapes.prod(1) / 200_000, shapes[:, 1] / shapes[:, 0]
    slack = 0.02  # whole pixels
    assert areas.min() > 0.2 - slack
    assert areas.max() < 0.5 + slack
    assert aspects.min() > 0.75 - slack
    assert aspects.max() < 4 / 3 + slack
    assert abs(areas.mean() - 0.35) < 0.02  # uniform
    assert abs(np.log(aspects).mean()) < 0.03  # uniform in the logarithm


def test_extreme_shapes_get_the_largest_centre_crop() -> None:
    image = torch.arange(100).repeat(1, 4, 1)
    crop = RandomCrop((1.0, 1.0), (0.75, 4 / 3))(image, np.random.default_rng(0))
    assert crop.shape == (1, 4, 5)
    assert crop[0, 0].tolist() == [48, 49, 50, 51, 52]


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pretrain_view_keeps_channels_depth_and_mask_count(channels: int, dtype: torch.dtype) -> None:
    image = picture(channels)
    image = image if dtype == torch.uint8 else image / 255
    view = PretrainView((16, 24), mask_sampler=MASK)
    sample = view(image, np.random.default_rng(1), np.random.default_rng(2))
    assert sample.image.shape == (channels, 16, 24)
    assert sample.image.dtype == dtype
    assert sample.target_image is None
    assert sample.masked.dtype == bool
    assert sample.masked.sum() == MASK.count


def test_mask_does_not_depend_on_the_crop() -> None:
    view = PretrainView((16, 16), mask_sampler=MASK)
    one = view(picture(), np.random.default_rng(1), np.random.default_rng(2))
    other = view(picture(), np.random.default_rng(3), np.random.default_rng(2))
    assert not torch.equal(one.image, other.image)
    np.testing.assert_array_equal(one.masked, other.masked)


@pytest.mark.parametrize("seed", range(4))
def test_both_views_show_the_same_crop(seed: int) -> None:
    image = picture()
    view = PretrainView((32, 32), mask_sampler=MASK, target_size=(16, 16), color_jitter=0.4)
    sample = view(image, np.random.default_rng(seed), np.random.default_rng(0))
    assert sample.target_image.shape == (3, 16, 16)
    halved = resize(sample.image, (16, 16), interpolation="bicubic")
    # Resizing twice blurs a little; another crop, flip or jitter would differ by tens.
    assert (halved.float() - sample.target_image.float()).abs().mean() < 3


def painted(H: int, W: int, dtype: torch.dtype) -> torch.Tensor:
    """An image that says where it is: the column, the row and their sum."""
    x, y = torch.meshgrid(torch.linspace(0.2, 0.6, W), torch.linspace(0.2, 0.6, H), indexing="xy")
    image = torch.stack([x, y, (x + y) / 2])
    return image if dtype == torch.float32 else (image * 255).round().to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("grid", "patch", "stride"),
    [((7, 7), (16, 16), (8, 8)), ((5, 8), (16, 16), (14, 14)), ((6, 4), (4, 8), (16, 16))],
)
def test_views_are_aligned_to_the_pixel(
    grid: tuple[int, int],
    patch: tuple[int, int],
    stride: tuple[int, int],
    interpolation: str,
    dtype: torch.dtype,
) -> None:
    """A patch and its code show the same place: the middle of the one is the middle of the other."""
    rows, columns = grid
    image_size, target_size = ((rows * side[0], columns * side[1]) for side in (patch, stride))
    view = PretrainView(
        image_size,
        mask_sampler=None,
        color_jitter=0.2,
        target_size=target_size,
        target_interpolation=interpolation,
    )
    image = painted(150, 230, dtype)
    seen = set()
    for seed in range(12):
        sample = view(image, np.random.default_rng(seed), np.random.default_rng(0))
        assert sample.target_image.shape == (3, *target_size)
        assert sample.target_image.dtype == dtype
        shown = [
            part.float().reshape(3, rows, side[0], columns, side[1]).mean((2, 4))
            for part, side in ((sample.image, patch), (sample.target_image, stride))
        ]
        across = (shown[0][0, :, -1] - shown[0][0, :, 0]).abs().mean() / (columns - 1)  # from patch to patch
        down = (shown[0][1, -1] - shown[0][1, 0]).abs().mean() / (rows - 1)
        apart = (shown[0] - shown[1]).abs()[:2].amax((1, 2)) / torch.stack([across, down])
        # 8 bits are coarse on so flat a ramp; a shift by one pixel gives 0.06 and more, there 0.085
        limit = 0.01 if dtype == torch.float32 else 0.075
        assert apart.max() < limit, f"views are {apart.max():.3f} patches apart"
        seen.add(bool(sample.image[0, 0, 0] < sample.image[0, 0, -1]))
    assert seen == {False, True}  # flipped and not


@pytest.mark.parametrize("seed", range(3))
def test_tokenizers_view_alone_is_the_one_of_the_pair(seed: int) -> None:
    image = picture()
    pair = PretrainView(
        (32, 32),
        mask_sampler=MASK,
        target_size=(16, 24),
        target_interpolation="lanczos",
        color_jitter=0.4,
    )
    both, alone, first = (
        look(image, np.random.default_rng(seed), np.random.default_rng(0), **options)
        for look, options in ((pair, {}), (pair.target_only(), {}), (pair, {"with_target": False}))
    )
    assert torch.equal(alone.image, both.target_image)
    assert alone.target_image is alone.masked is None
    assert torch.equal(first.image, both.image)
    assert first.target_image is None
    np.testing.assert_array_equal(first.masked, both.masked)
    without = PretrainView((32, 32), mask_sampler=MASK)  # the target is the image
    same = [
        look(image, np.random.default_rng(seed), np.random.default_rng(0)).image
        for look in (without, without.target_only())
    ]
    assert torch.equal(*same)


def test_flip_mirrors_about_half_of_the_images() -> None:
    ramp = torch.arange(16, dtype=torch.uint8).repeat(1, 16, 1)
    view = TrainView((16, 16), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    flipped = [int(view(ramp, np.random.default_rng(seed))[0, 0, 0]) == 15 for seed in range(60)]
    assert 15 < sum(flipped) < 45
    assert torch.equal(view(ramp, np.random.default_rng(flipped.index(True))), ramp.flip(-1))


def test_color_jitter_keeps_grey_images_grey_and_changes_them() -> None:
    grey = picture(1, 16, 16).expand(3, -1, -1)
    view = TrainView((16, 16), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, color_jitter=0.4)
    jittered = view(grey, np.random.default_rng(0))
    assert not torch.equal(jittered, grey)
    torch.testing.assert_close(jittered[0], jittered[2], atol=1, rtol=0)  # rounding of three channels
    assert view(grey[:1], np.random.default_rng(0)).shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("option", "image"),
    [
        ({"color_jitter": 0.4}, picture(5)),
        ({"rand_augment": "rand-m9"}, picture(5)),
        ({"rand_augment": "rand-m9"}, picture(3) / 255),
    ],
)
def test_augmentations_refuse_what_they_cannot_change(option: dict, image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        TrainView((16, 16), **option)(image, np.random.default_rng(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10"])
def test_rand_augment_draws_only_from_the_private_generator(channels: int, policy: str) -> None:
    image = picture(channels)
    view = TrainView((24, 24), rand_augment=policy, mean=(0.4,) * channels)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    once = [view(image, np.random.default_rng(seed)) for seed in range(40)]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    random.seed(77)
    torch.testing.assert_close(once, [view(image, np.random.default_rng(seed)) for seed in range(40)])
    assert all(augmented.shape == (channels, 24, 24) for augmented in once)
    assert len({augmented.numpy().tobytes() for augmented in once}) == 40


@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (50, 50), (20, 300)])
@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_eval_view_is_torchvisions_resize_and_centre_crop(shape: tuple[int, int], crop: float) -> None:
    image = picture(3, *shape)
    oracle = v2.Compose(
        [
            v2.Resize(int(28 / crop), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(28),
        ]
    )
    torch.testing.assert_close(EvalView((28, 28), crop=crop)(image), oracle(image), atol=1, rtol=0)


@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (10, 300)])
def test_eval_view_of_another_shape_keeps_proportions(shape: tuple[int, int]) -> None:
    H, W = shape
    columns = torch.linspace(0, 1, W).repeat(1, H, 1)
    view = EvalView((20, 30), crop=1.0)(columns)
    assert view.shape == (1, 20, 30)
    shown = float(view[0, 0, -1] - view[0, 0, 0]) * 30 / 29
    scale = max(20 / H, 30 / W)
    assert abs(shown - 30 / (W * scale)) < 0.06  # a pixel at either end
