"""Filling a cache: all crops that a run will see, through a frozen network, with a progress bar."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mpm.data.loading import ViewDataset, train_loader
from mpm.data.rows import RowCache
from mpm.data.stream import SampleKey
from mpm.patchify.pixels import to_unit
from mpm.training.loop import StopRequest

__all__ = ["LARGEST_BATCH", "Filled", "fill"]

LARGEST_BATCH = 256


class Filled(NamedTuple):
    """What is in a cache.

    Attributes:
        done: rows that have been computed.
        total: rows.
        is_complete: whether every image has been looked at.
    """

    done: int
    total: int
    is_complete: bool

    @property
    def stopped(self) -> str:
        """What is said where a signal came first."""
        return f"stopped on request, {self.done:,} of {self.total:,} are done; the same command continues"

    @property
    def left(self) -> str:
        """What is said of images that could not be read."""
        missing = self.total - self.done
        return f"; {missing:,} could not be read and have none" if missing else ""


def fill(
    cache: RowCache,
    dataset: ViewDataset,
    ask: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    stop: StopRequest,
) -> Filled:
    """Compute the rows that are missing, until a signal comes.

    Args:
        cache: open for writing.
        dataset: of the crops.
        ask: images [B,C,H,W] in [0,1] on the device -> rows [B,width].
        batch_size: images at once.
        workers: processes that read ahead.
        device: of `ask`.
        stop: looked at after each batch.

    Raises:
        OSError: if the disk is full; what is done stays.
    """
    blocks = _Blocks(cache, batch_size)
    batches = train_loader(dataset, blocks, workers=workers, pin_memory=device.type == "cuda")
    done, total = cache.progress
    bar = tqdm(total=total, initial=done, unit="image", disable=None, dynamic_ncols=True)
    with logging_redirect_tqdm(), bar, torch.no_grad():
        for (crop, first, stop_at), batch in zip(blocks.blocks, batches, strict=True):
            rows = ask(to_unit(batch.images, device))
            readable = batch.index.numpy() == np.arange(first, stop_at)
            cache.write(crop, first, rows.cpu().numpy(), readable=readable)
            bar.update(stop_at - first)
            if stop.requested:
                break
    cache.flush()
    return Filled(*cache.progress, cache.is_complete)


class _Blocks(Sampler[list[SampleKey]]):
    """Batches of the rows that are missing, consecutive images of one crop each."""

    def __init__(self, cache: RowCache, batch_size: int):
        self.blocks = [
            (crop, start, min(start + batch_size, stop))
            for crop, first, stop in cache.missing()
            for start in range(first, stop, batch_size)
        ]

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for crop, first, stop in self.blocks:
            yield [SampleKey(crop, image, 0) for image in range(first, stop)]
