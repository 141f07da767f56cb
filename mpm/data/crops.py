"""Crops beside the random resized one."""

import numpy as np
import torch
from torch import Tensor

from mpm.data.views import cover


class SimpleCrop:
    """DeiT III's simple random crop: the whole image resized, padded by reflection, cropped at random.

    Args:
        image_size: height, width of the result in pixels; more than `padding` each.
        interpolation: "bilinear", "bicubic" or "lanczos".
        padding: pixels on every side.
    """

    def __init__(self, image_size: tuple[int, int], *, interpolation: str = "bicubic", padding: int = 4):
        self._image_size = image_size
        self._interpolation = interpolation
        self._padding = padding

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """[C,H,W] -> [C,h,w], same type."""
        covering = cover(image, self._image_size, interpolation=self._interpolation)
        for axis, want in zip((-2, -1), self._image_size, strict=True):
            have = covering.shape[axis]
            first = int((have + 2 * self._padding - want + 1) * rng.random()) - self._padding
            places = torch.arange(first, first + want).abs()  # reflected at the first pixel, then at the last
            covering = covering.index_select(
                axis, torch.where(places < have, places, 2 * (have - 1) - places)
            )
        return covering
