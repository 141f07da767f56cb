import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mpm.objectives.hog import HOGTarget, hog
from mpm.patchify.patches import patchify
from mpm.patchify.pixels import Normalize
from tests.networks import random_mask


def hog_by_loops(image: np.ndarray, cell: tuple[int, int], bins: int) -> np.ndarray:
    """One image [C,H,W] pixel by pixel -> [C,bins,rows,columns]."""
    C, H, W = image.shape
    sobel = {-1: 1, 0: 2, 1: 1}
    found = np.zeros((C, bins, H // cell[0], W // cell[1]))

    def pixel(c: int, row: int, column: int) -> float:
        row = -row if row < 0 else 2 * (H - 1) - row if row >= H else row
        column = -column if column < 0 else 2 * (W - 1) - column if column >= W else column
        return float(image[c, row, column])

    for c, row, column in np.ndindex(C, H, W):
        across = sum(
            w * (pixel(c, row + d, column - 1) - pixel(c, row + d, column + 1)) for d, w in sobel.items()
        )
        down = sum(
            w * (pixel(c, row - 1, column + d) - pixel(c, row + 1, column + d)) for d, w in sobel.items()
        )
        angle = math.atan2(across, down) % math.pi
        k = min(int(angle / math.pi * bins), bins - 1)
        found[c, k, row // cell[0], column // cell[1]] += math.hypot(across, down)
    return found / np.maximum(np.sqrt((found**2).sum(1, keepdims=True)), 1e-12)


def assert_equal(found: Tensor, expected: np.ndarray) -> None:
    """Sums of a cell's float32 pixels in another order."""
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("cell", "bins"), [((8, 8), 9), ((4, 2), 9), ((2, 3), 6)])
def test_hog_equals_a_loop(channels: int, cell: tuple[int, int], bins: int) -> None:
    images = torch.rand(2, channels, 16, 24)
    found = hog(images, cell=cell, bins=bins)
    assert found.shape == (2, channels * bins, 16 // cell[0], 24 // cell[1])
    for image, histograms in zip(images, found, strict=True):
        assert_equal(histograms.unflatten(0, (channels, bins)), hog_by_loops(image.numpy(), cell, bins))


def test_brightness_and_contrast_do_not_matter() -> None:
    """So it is one whether images are in [0,1] or normalised."""
    images = torch.rand(2, 3, 16, 16)
    normalized = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))(images)
    torch.testing.assert_close(
        hog(normalized, cell=(8, 8)), hog(images, cell=(8, 8)), rtol=1e-4, atol=1e-4
    )  # a gradient at the border of two bins would change sides


def test_a_flat_cell_is_all_zeros_and_others_have_norm_one() -> None:
    images = torch.rand(1, 2, 8, 16)
    images[:, :, :, :9] = torch.tensor([0.3, 0.7])[:, None, None]  # one pixel into the next cell
    histograms = hog(images, cell=(8, 8)).unflatten(1, (2, 9))
    assert not histograms[..., 0].any()
    torch.testing.assert_close(histograms[..., 1].norm(dim=2), torch.ones(1, 2, 1))


@pytest.mark.parametrize(("axis", "expected"), [(0, 0), (1, 4)])
@pytest.mark.parametrize("falls", [False, True])
def test_edges_along_an_axis_are_in_one_bin(axis: int, expected: int, falls: bool) -> None:
    """Gradients straight down are at the border of the first and the last bin: rounding would tell."""
    values = torch.randint(0, 256, (16,)).sort(descending=falls).values / 255
    images = values[:, None].expand(16, 16) if axis == 0 else values.expand(16, 16)
    histograms = hog(images[None, None], cell=(4, 4))
    assert not histograms[0, [k for k in range(9) if k != expected]].any()


def test_a_patch_of_16_pixels_has_108_features() -> None:
    target = HOGTarget((16, 16), channels=3)
    assert (target.out_dim, target.cell) == (108, (8, 8))
    images, mask = torch.rand(2, 3, 32, 48), random_mask(2, 6, 4)
    assert target(images, mask).shape == (2, 4, 108)


@pytest.mark.parametrize(
    ("patch_size", "cells"), [((8, 8), 2), ((8, 4), 2), ((9, 6), 3), ((7, 7), 1), ((4, 4), 1)]
)
def test_targets_are_the_histograms_of_the_cells_of_a_masked_patch(
    patch_size: tuple[int, int], cells: int
) -> None:
    images, mask = torch.rand(2, 2, 2 * patch_size[0], 3 * patch_size[1]), random_mask(2, 6, 4)
    target = HOGTarget(patch_size, channels=2, cells=cells)
    histograms = hog(images, cell=target.cell)
    found, features = target(images, mask), target.features(images)
    assert found.shape == (2, 4, target.out_dim)
    assert features.shape == (2, 6, target.out_dim)
    for b in range(2):
        for m, patch in enumerate(mask.masked[b].tolist()):
            top, left = patch // 3 * cells, patch % 3 * cells
            expected = histograms[b, :, top : top + cells, left : left + cells].flatten()
            assert torch.equal(found[b, m], expected)
            assert torch.equal(features[b, patch], expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_picture_shows_edges_where_they_run(axis: int) -> None:
    """Lines along the stripes, as near as nine directions come: bright rows for stripes of rows."""
    values = torch.linspace(0, 1, 32).sin()
    images = (values[:, None] if axis == 0 else values).expand(32, 32)[None, None]
    target, mask = HOGTarget((16, 16), channels=1), random_mask(1, 4, 2)
    drawn = target.render(target(images, mask), images, mask)
    assert drawn.shape == images.shape
    old, new = (patchify(pixels, (16, 16)) for pixels in (images, drawn))
    assert torch.equal(mask.take_visible(new), mask.take_visible(old))
    cell = mask.take_masked(new)[0, 0].reshape(16, 16)[:8, :8]
    along, against = cell.mean(1 - axis), cell.mean(axis)  # of each line, across the lines
    assert along.std() > 3 * against.std()
    assert along.argmax() in (3, 4)


def test_the_picture_has_colours_and_is_in_range() -> None:
    images, mask = torch.rand(2, 3, 8, 12), random_mask(2, 6, 4)
    target = HOGTarget((4, 4), channels=3)
    drawn = target.render(5 * torch.randn(2, 4, target.out_dim), images, mask)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    only_green = torch.zeros(2, 4, 3, target.out_dim // 3)
    only_green[:, :, 1] = 1
    patches = patchify(target.render(only_green.flatten(2), images, mask), (4, 4))
    masked = mask.take_masked(patches).unflatten(2, (16, 3))
    assert masked[..., 1].any()
    assert not masked[..., [0, 2]].any()


@pytest.mark.parametrize(
    ("patch_size", "cells", "message"),
    [
        ((7, 7), 2, r"cells 2 a side do not cut a patch of 7x7 pixels into whole .*; use one of \[1\]"),
        ((16, 12), 3, r"16x12 pixels .* use one of \[1, 2, 4\]"),
        ((4, 4), 4, r"cells 4 .* at least 2 pixels; use one of \[1, 2\]"),
        ((8, 8), 0, r"cells 0 .* use one of \[1, 2, 4\]"),
        ((1, 1), 1, r"cells 1 .* use patches of 2 pixels or more"),
    ],
)
def test_cells_that_do_not_fit_are_told(patch_size: tuple[int, int], cells: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HOGTarget(patch_size, channels=3, cells=cells)
