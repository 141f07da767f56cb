"""Depth and channels of a decoded image: what the file has becomes what the model asks for."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# ITU-R BT.601 luma in 16-bit fixed point, as Pillow computes it; the weights sum to 1, so grey stays grey.
_LUMA = (19595, 38470, 7471)


def as_stored_depth(pixels: np.ndarray | Tensor, *, max_value: float | None, name: str) -> Tensor:
    """Keep 8-bit pixels as they are and map anything deeper to float32 in [0, 1].

    Args:
        pixels: any shape, integers or floats.
        max_value: the value that becomes 1. None: the largest of an integer type, 1 for floats.
        name: of the file, for the error.

    Returns:
        Same shape, uint8 or float32.

    Raises:
        ValueError: if a value lies outside [0, max_value], or the type is no number.
    """
    if isinstance(pixels, np.ndarray):
        if pixels.dtype.kind not in "uif":
            raise ValueError(f"{name} holds {pixels.dtype} values; store integers or floats")
        pixels = torch.from_numpy(np.asarray(pixels, pixels.dtype.newbyteorder("=")))
    dtype = pixels.dtype
    if dtype == torch.uint8 and max_value in (None, 255):
        return pixels
    natural = 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)
    limit = natural if max_value is None else float(max_value)
    scaled = pixels.to(torch.float32) / limit
    if dtype.is_floating_point or dtype.is_signed or limit < natural:
        low, high = (float(value) for value in torch.aminmax(scaled))
        if not 0 <= low <= high <= 1:  # also where a value is NaN
            raise ValueError(
                f"{name} holds values from {low * limit:g} to {high * limit:g}, outside [0, {limit:g}]; "
                "set max_value to the largest value of the data, and shift negative values"
            )
    return scaled


def to_unit_range(image: Tensor) -> Tensor:
    """The image as float32 in [0, 1], whatever its depth."""
    return image if image.is_floating_point() else image.to(torch.float32) / 255


def with_channels(
    pixels: Tensor, channels: int, *, has_alpha: bool, background: Sequence[int], name: str
) -> Tensor:
    """Bring an image to `channels`: lay transparency on the background, turn colour grey or grey colour.

    A file that has exactly `channels` is left alone, transparency too: grey + alpha for 2, RGBA for 4.

    Args:
        pixels: [C,H,W] uint8, or float32 in [0, 1].
        channels: wanted.
        has_alpha: whether the last channel is opacity.
        background: red, green, blue in 0..255 under transparent pixels.
        name: of the file, for the error.

    Returns:
        [channels,H,W], same type.

    Raises:
        ValueError: if the channels can be neither composited nor converted between 1 and 3.
    """
    if len(pixels) == channels:
        return pixels
    stored = len(pixels)
    if has_alpha:
        pixels = _composite(pixels, background)
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1 and channels == 3:
        return pixels.expand(3, -1, -1)
    if len(pixels) == 3 and channels == 1:
        return luma(pixels)
    raise ValueError(f"{name} has {stored} channels, which cannot be made {channels}; set channels: {stored}")


def luma(pixels: Tensor) -> Tensor:
    """Grey of a colour image (ITU-R BT.601): [3,H,W] -> [1,H,W], same type."""
    weights = torch.tensor(_LUMA)[:, None, None]
    if pixels.is_floating_point():
        return (pixels * (weights / 65536)).sum(0, keepdim=True)
    grey = (pixels.to(torch.int32) * weights.to(torch.int32)).sum(0, keepdim=True, dtype=torch.int32)
    return ((grey + 32768) >> 16).to(torch.uint8)


def _composite(pixels: Tensor, background: Sequence[int]) -> Tensor:
    colour, alpha = pixels[:-1], to_unit_range(pixels[-1:])
    if bool((alpha == 1).all()):
        return colour
    under = torch.tensor(background, dtype=torch.uint8)[:, None, None]  # [3,1,1]
    if bool((under == under[0]).all()):
        under = under[:1]  # a grey image stays one channel
    if pixels.is_floating_point():
        return torch.lerp(to_unit_range(under), colour, alpha)
    return torch.lerp(under.float(), colour.float(), alpha).round_().to(torch.uint8)
