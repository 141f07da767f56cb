"""Patch tokens of labelled images for the attentive probe: kept in memory, or computed again and again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpm.data.datasets import ImageSource
from mpm.data.loading import eval_loader
from mpm.data.subsets import Subset
from mpm.data.views import EvalView

__all__ = ["KeptTokens", "LabelledImages", "RecomputedTokens", "keep"]

_BATCH = 256


class LabelledImages(NamedTuple):
    """Images that can be read, as a network gets them.

    Attributes:
        source: of the images.
        view: of each.
        places: int64 [n], in the source.
        labels: int64 [n].
        workers: processes that read ahead.
    """

    source: ImageSource
    view: EvalView
    places: Tensor
    labels: Tensor
    workers: int


class RecomputedTokens:
    """Tokens that the network computes whenever they are asked for, rounded to float16 like those kept.

    Args:
        images: of the data set.
        encode: images on the device -> [B,layers,N,D] there.
        device: where the network is.
    """

    def __init__(self, images: LabelledImages, encode: Callable[[Tensor], Tensor], device: torch.device):
        self.labels = images.labels
        self._images = images
        self._encode = encode
        self._device = device

    def batches(self, orders: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each int64 [B] of rows, all of one size but the last: tokens [B,layers,N,D] and labels [B]."""
        rows = list(orders)
        source, view, places, _, workers = self._images
        part = Subset(source, places[torch.cat(rows)].numpy())
        for images, labels, *_ in eval_loader(part, view, batch_size=len(rows[0]), workers=workers):
            with torch.no_grad():
                tokens = self._encode(images.to(self._device, non_blocking=True))
            yield tokens.half().float(), labels.to(self._device)


class KeptTokens:
    """Tokens in memory.

    Args:
        tokens: float16 [n,layers,N,D], on the CPU.
        labels: int64 [n].
        device: where batches of them are wanted.
    """

    def __init__(self, tokens: Tensor, labels: Tensor, device: torch.device):
        self.labels = labels
        self._tokens = tokens
        self._device = device

    def batches(self, orders: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each int64 [B] of rows: tokens [B,layers,N,D] float32 and labels [B]."""
        for rows in orders:
            yield self._tokens[rows].to(self._device).float(), self.labels[rows].to(self._device)


def keep(computed: RecomputedTokens, shape: Sequence[int], device: torch.device) -> KeptTokens:
    """Compute all tokens once; `shape` [layers,N,D] is theirs."""
    n = len(computed.labels)
    tokens = torch.empty(n, *shape, dtype=torch.half)
    rows = torch.arange(n).split(_BATCH)
    for own, (batch, _) in zip(rows, computed.batches(rows), strict=True):
        tokens[own] = batch.half().cpu()
    return KeptTokens(tokens, computed.labels, device)
