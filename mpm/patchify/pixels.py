"""Pixels: to [0,1], and to zero mean and unit deviation per channel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["IMAGENET", "INCEPTION", "Moments", "Normalize", "moments_of", "to_unit"]

# means and deviations of channels in [0,1]
Moments = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Moments = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION: Moments = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def moments_of(mean: Sequence[float], std: Sequence[float], *, channels: int) -> Moments:
    """Of so many channels: those that are given, or, where these are others, their average for each."""
    first, second = (
        tuple(given) if len(given) == channels else (sum(given) / len(given),) * channels
        for given in (mean, std)
    )
    return first, second


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """Images uint8, or float32 in [0,1], to float32 in [0,1] on the device.

    Raises:
        ValueError: for other integers, whose white is unknown.
    """
    images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; give uint8, or float32 in [0, 1]")
    return images


class Normalize(nn.Module):
    """Images in [0,1] to zero mean and unit deviation per channel, and back.

    Args:
        mean: per channel, in [0,1].
        std: per channel, in [0,1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        return (images - self.mean) / self.std

    def undo(self, images: Tensor) -> Tensor:
        """The inverse."""
        return images * self.std + self.mean
