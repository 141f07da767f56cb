"""A map of weights drawn over an image."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["colour_bar", "overlay"]

# dark violet to light yellow, ever lighter, so that it can be read without colours
_COLOURS = torch.tensor(
    [
        [20, 11, 53],
        [87, 15, 109],
        [155, 41, 100],
        [215, 75, 64],
        [248, 138, 18],
        [246, 215, 70],
        [252, 255, 190],
    ]
)
_LEAST_COVER, _MOST_COVER = 0.2, 0.85  # of the image by the colour
_DIMMED = 0.7  # brightness of the image, lest white paper outshine the colours


def overlay(image: Tensor, weights: Tensor) -> Tensor:
    """The image in grey, coloured by weights between 0 and the map's largest.

    The more a weight is above the map's mean, the more of the image the colour covers: a map that looks
    everywhere alike leaves all of it to be seen.

    Args:
        image: uint8 [3,h,w].
        weights: [rows,columns]; negative ones are drawn as 0. Smoothed between the middles of patches.

    Returns: uint8 [3,h,w].
    """
    h, w = image.shape[-2:]
    share = weights.clamp(min=0) / weights.max().clamp(min=1e-12)
    mean = share.mean()
    share = F.interpolate(share[None, None], (h, w), mode="bilinear", align_corners=False)[0, 0]
    grey = (image.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    cover = _LEAST_COVER + (_MOST_COVER - _LEAST_COVER) * (share - mean).clamp(min=0)
    return ((1 - cover) * _DIMMED * grey + cover * _colour(share)).round().clamp(0, 255).to(torch.uint8)


def colour_bar(height: int = 12, width: int = 96) -> Tensor:
    """The colours from 0 to the largest weight, uint8 [3,height,width]."""
    return _colour(torch.linspace(0, 1, width).expand(height, width)).round().to(torch.uint8)


def _colour(share: Tensor) -> Tensor:
    """[h,w] in [0,1] -> float32 [3,h,w] in [0,255]."""
    place = share * (len(_COLOURS) - 1)
    below = place.floor().clamp(max=len(_COLOURS) - 2).long()
    between = (place - below)[..., None]
    colours = _COLOURS.float()
    return torch.lerp(colours[below], colours[below + 1], between).permute(2, 0, 1)
