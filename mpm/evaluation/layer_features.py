"""Several feature vectors of every image of a data set, such as one a layer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpm import distributed

__all__ = ["LayerFeatures", "extract_layers"]


class LayerFeatures(NamedTuple):
    """Feature vectors of the images that could be read, in the order of the data set, on the CPU.

    Attributes:
        features: float16 [n,F,D].
        labels: int64 [n].
        places: int64 [n], of the images in their data set.
    """

    features: Tensor
    labels: Tensor
    places: Tensor


@torch.no_grad()
def extract_layers(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[Sequence[Any]],
    *,
    count: int,
    device: torch.device | str = "cpu",
) -> LayerFeatures:
    """Encode the batches of all processes; each gets the features of all.

    Args:
        encode: images on `device` -> [B,F,D]. Train or eval mode is the caller's business.
        batches: this process's share, each batch (images, labels int64 [B], places int64 [B]).
        count: images of this process's share at most.
        device: where `encode` works.

    Raises:
        ValueError: if there is no image, or a value does not fit float16.
    """
    filled = 0
    features = torch.empty(0)
    labels, places = torch.empty(2, count, dtype=torch.int64)
    for images, own_labels, own_places, *_ in batches:
        encoded = encode(images.to(device, non_blocking=True)).half().cpu()
        if not filled:
            features = torch.empty(count, *encoded.shape[1:], dtype=torch.half)
        rows = slice(filled, filled + len(encoded))
        features[rows], labels[rows], places[rows] = encoded, own_labels, own_places
        filled += len(encoded)
    shape = max(distributed.gather_objects(tuple(features.shape[1:])), key=len)
    if not shape:
        raise ValueError("no images to compute features of; look at the data's folder or split")
    own = features[:filled] if filled else torch.empty(0, *shape, dtype=torch.half)
    own, labels, places = map(distributed.gather_rows, (own, labels[:filled], places[:filled]))
    if not own.isfinite().all():
        raise ValueError("features are not finite, or above 65504, the largest value of float16")
    if (places.diff() < 0).any():  # one process reads in order: no copy then
        order = places.argsort()
        own, labels, places = own[order], labels[order], places[order]
    return LayerFeatures(own, labels, places)
