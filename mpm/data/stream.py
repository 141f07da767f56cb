"""The order of the samples: which image comes when, on which process.

A pure function of (seed, epoch, step): nothing is stored, so a run resumes by starting at a later step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from mpm import distributed


class SampleKey(NamedTuple):
    """All that a sample depends on, beside the seed.

    Attributes:
        epoch: counted from 0.
        image: its index in the source.
        repeat: counts the image's samples within the epoch.
    """

    epoch: int
    image: int
    repeat: int


class EpochStream(Sampler[list[SampleKey]]):
    """Keys of this process's micro-batches, step by step, epoch after epoch.

    An epoch is one random order of the images, cut into global batches; what is left over is dropped, and a
    source smaller than one batch is gone through again. A process takes one contiguous share of each batch.

    Args:
        count: images of the source.
        batch_size: images of a global batch.
        seed: of the order.
        start_step: first step, counted from 0 over all epochs.
        stop_step: one after the last.
        micro_batch: images of a micro-batch on one process; None: the whole share.
        rank: of this process; None: asked of `distributed`.
        world_size: number of processes; None: asked of `distributed`.
        repeats: samples of an image that follow each other (repeated augmentation, arXiv:1902.05509); the
            epoch keeps its length, so it sees fewer images.

    Raises:
        ValueError: if processes or micro-batches do not divide the batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int,
        stop_step: int,
        micro_batch: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        repeats: int = 1,
    ):
        self._rank = distributed.rank() if rank is None else rank
        world_size = distributed.world_size() if world_size is None else world_size
        self._share, rest = divmod(batch_size, world_size)
        if rest:
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of the {world_size} processes; "
                f"use {max(1, batch_size // world_size) * world_size}"
            )
        self._micro_batch = micro_batch or self._share
        if self._share % self._micro_batch:
            raise ValueError(
                f"micro_batch {micro_batch} does not divide the {self._share} images of one process; "
                f"use a divisor of {self._share}"
            )
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._steps = range(start_step, stop_step)
        self._repeats = repeats
        self.steps_per_epoch = max(1, count // batch_size)

    def __len__(self) -> int:
        return len(self._steps) * (self._share // self._micro_batch)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        ordered, order = -1, np.empty(0, np.int64)
        for step in self._steps:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != ordered:
                order = np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(
                    self._count
                )
                ordered = epoch
            start = step_in_epoch * self._batch_size + self._rank * self._share
            for first in range(start, start + self._share, self._micro_batch):
                yield [self._key(epoch, order, place) for place in range(first, first + self._micro_batch)]

    def _key(self, epoch: int, order: np.ndarray, place: int) -> SampleKey:
        image, repeat = divmod(place, self._repeats)
        laps, image = divmod(image, self._count)
        return SampleKey(epoch, int(order[image]), laps * self._repeats + repeat)
