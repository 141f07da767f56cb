"""Mean, deviation and range of a source's channels: what images are normalised with, and what the data is."""

import logging
from typing import NamedTuple

import numpy as np
import torch

from mpm.data.channels import to_unit_range
from mpm.data.datasets import ImageSource
from mpm.data.images import UnreadableImage

_log = logging.getLogger(__name__)


class ChannelStatistics(NamedTuple):
    """Per-channel numbers in units of [0, 1]; every image weighs the same, whatever its size.

    Attributes:
        mean: per channel.
        std: per channel, over all pixels.
        minimum: smallest value seen in any channel.
        maximum: largest value seen in any channel.
        dtype: "uint8", "float32", or "uint8 and float32" where files of both depths were seen.
        images: number of images seen.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: float
    maximum: float
    dtype: str
    images: int


def channel_statistics(source: ImageSource, *, limit: int = 10_000, seed: int = 0) -> ChannelStatistics:
    """Statistics of at most `limit` images, chosen at random; unreadable ones are left out.

    Raises:
        ValueError: if no image is readable.
    """
    indices = np.random.default_rng(seed).permutation(len(source))[:limit]
    moments, ranges, dtypes = [], [], set()
    for index in np.sort(indices).tolist():  # ascending is faster on spinning disks
        try:
            image = source.read(index)
        except UnreadableImage as error:
            _log.warning("left out of the statistics: %s", error)
            continue
        dtypes.add(str(image.dtype).removeprefix("torch."))
        pixels = to_unit_range(image).flatten(1).double()
        moments.append(torch.stack([pixels.mean(1), pixels.square().mean(1)]))
        ranges.append(torch.stack(pixels.aminmax()))
    if not moments:
        raise ValueError(f"none of the {len(indices)} images tried could be read; the log names them")
    mean, square = torch.stack(moments).mean(0)
    low, high = torch.stack(ranges).unbind(1)
    return ChannelStatistics(
        mean=tuple(mean.tolist()),
        std=tuple((square - mean.square()).clamp(min=0).sqrt().tolist()),
        minimum=float(low.min()),
        maximum=float(high.max()),
        dtype=" and ".join(sorted(dtypes, reverse=True)),
        images=len(moments),
    )
