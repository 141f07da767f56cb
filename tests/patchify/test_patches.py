import pytest
import torch
from torch.nn import functional as F

from mpm.patchify.patches import grid_of, patchify, unpatchify

SIZES = [((8, 8), (4, 4)), ((6, 8), (2, 4)), ((9, 4), (3, 4)), ((5, 7), (1, 7)), ((4, 6), (4, 6))]


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize(("image_size", "patch_size"), SIZES)
def test_round_trip(image_size, patch_size, channels) -> None:
    images = torch.randn(2, channels, *image_size)
    patches = patchify(images, patch_size)
    grid = grid_of(image_size, patch_size)
    assert patches.shape == (2, grid[0] * grid[1], patch_size[0] * patch_size[1] * channels)
    assert torch.equal(unpatchify(patches, patch_size, grid=grid), images)


@pytest.mark.parametrize(("image_size", "patch_size"), SIZES)
def test_pixels_are_ordered_row_column_channel(image_size, patch_size) -> None:
    images = torch.randn(1, 2, *image_size)
    (rows, columns), (P, Q) = grid_of(image_size, patch_size), patch_size
    patches = patchify(images, patch_size)
    for i in range(rows):
        for j in range(columns):
            pixels = [
                images[0, c, i * P + p, j * Q + q] for p in range(P) for q in range(Q) for c in range(2)
            ]
            assert patches[0, i * columns + j].tolist() == pixels


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize(("image_size", "patch_size"), SIZES)
def test_a_linear_map_of_patches_equals_a_convolution(image_size, patch_size, channels) -> None:
    images, kernel = torch.randn(2, channels, *image_size), torch.randn(5, channels, *patch_size)
    expected = F.conv2d(images, kernel, stride=patch_size).flatten(2).transpose(1, 2)
    found = patchify(images, patch_size) @ kernel.permute(0, 2, 3, 1).flatten(1).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # two orders of the same sum


def test_patches_equal_lightly() -> None:
    from lightly.models.utils import patchify as lightly_patchify

    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(patchify(images, (4, 4)), lightly_patchify(images, 4))


@pytest.mark.parametrize(
    ("image_size", "patch_size", "message"),
    [
        ((224, 224), (15, 15), "image_size 224 is not a multiple of patch_size 15; use 210 or 225"),
        ((28, 30), (7, 7), "image_size 30 is not a multiple of patch_size 7; use 28 or 35"),
        ((8, 8), (16, 16), "image_size 8 is not a multiple of patch_size 16; use 16$"),
    ],
)
def test_sizes_that_do_not_divide_are_told(image_size, patch_size, message) -> None:
    with pytest.raises(ValueError, match=message):
        grid_of(image_size, patch_size)
