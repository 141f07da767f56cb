"""From a source to batches, in worker processes, and what happens when a file is broken.

A sample is a pure function of the seed and its key, so the number of workers and processes changes nothing.
"""

import logging
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mpm import distributed
from mpm.data.channels import to_unit_range
from mpm.data.datasets import ImageSource
from mpm.data.images import UnreadableImage
from mpm.data.stream import EpochStream, SampleKey
from mpm.data.substitution import check_share, read_next
from mpm.data.views import MASK_STREAM, EvalView, PretrainView, TrainView, sample_generator

_log = logging.getLogger(__name__)

_PATIENCE_S = 600  # for one batch: a worker that died or hangs ends the run, which can then be continued


class PretrainBatch(NamedTuple):
    """Masked images.

    Attributes:
        images: [B,C,H,W] uint8, or float32 in [0, 1] where a file is deeper.
        target_images: [B,C,H2,W2], or None where the target is the image.
        masked: bool [B,N], True = masked, the same number in every row.
        index: int64 [B], in the source.
    """

    images: Tensor
    target_images: Tensor | None
    masked: Tensor
    index: Tensor  # type: ignore[assignment]  # in place of tuple.index


class LabelledBatch(NamedTuple):
    """Images with classes.

    Attributes:
        images: [B,C,H,W] uint8, or float32 in [0, 1] where a file is deeper.
        labels: int64 [B], -1 where the source has no classes.
        index: int64 [B], in the source.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # in place of tuple.index


class _Delivery(NamedTuple):
    """What comes from a worker: a batch and the files replaced in it, or what the user has to be told."""

    batch: Any = None  # None: every image of it is broken
    broken: tuple[tuple[int, str], ...] = ()  # index, reason
    fate: str = "the next readable image takes its place"
    error: ValueError | None = None


class ViewDataset(Dataset[_Delivery]):
    """Finished batches of views, made from lists of `SampleKey`.

    A broken image is replaced by the next readable one of the source.

    Args:
        source: the images.
        view: masks and images, or images with labels.
        seed: of crops and masks.
    """

    def __init__(self, source: ImageSource, view: PretrainView | TrainView, *, seed: int):
        self.source = source
        self._view = view
        self._seed = seed

    def __getitems__(self, keys: list[SampleKey]) -> _Delivery:
        try:
            return self._deliver(keys)
        except ValueError as error:  # raised again, as one line, by the process that iterates
            return _Delivery(error=error)

    def _deliver(self, keys: list[SampleKey]) -> _Delivery:
        broken: dict[int, str] = {}
        indices: list[int] = []
        samples: list[Any] = []
        for key in keys:
            index, image, passed_over = read_next(self.source, key.image)
            broken |= passed_over
            rng = sample_generator(self._seed, *key)
            if isinstance(self._view, PretrainView):
                samples.append(self._view(image, rng, sample_generator(self._seed, *key, stream=MASK_STREAM)))
            else:
                samples.append(self._view(image, rng))
            indices.append(index)
        batch: PretrainBatch | LabelledBatch
        if isinstance(self._view, PretrainView):
            batch = _collate_pretrain(samples, indices, masked_count=self._view.mask_sampler.count)
        else:
            batch = _collate_labelled(samples, indices, self.source)
        return _Delivery(batch, tuple(broken.items()))


class _EvalDataset(Dataset[_Delivery]):
    def __init__(self, source: ImageSource, view: EvalView):
        self._source = source
        self._view = view

    def __getitems__(self, indices: list[int]) -> _Delivery:
        images, readable, broken = [], [], []
        for index in indices:
            try:
                images.append(self._view(self._source.read(index)))
                readable.append(index)
            except UnreadableImage as error:  # another one in its place would count twice
                broken.append((index, str(error)))
            except ValueError as error:
                return _Delivery(error=error)
        batch = _collate_labelled(images, readable, self._source) if images else None
        return _Delivery(batch, tuple(broken), fate="it is left out")


def stack(images: list[Tensor]) -> Tensor:
    """Images [C,h,w] as one batch [B,C,h,w]; float32 where depths differ."""
    if len({image.dtype for image in images}) > 1:
        images = [to_unit_range(image) for image in images]
    return default_collate(images)  # in a worker straight into shared memory


def _collate_pretrain(samples: list[Any], indices: list[int], *, masked_count: int) -> PretrainBatch:
    masked = np.stack([sample.masked for sample in samples])
    assert (masked.sum(1) == masked_count).all(), "the device relies on the same number in every row"
    has_targets = samples[0].target_image is not None
    return PretrainBatch(
        images=stack([sample.image for sample in samples]),
        target_images=stack([sample.target_image for sample in samples]) if has_targets else None,
        masked=torch.from_numpy(masked),
        index=torch.tensor(indices),
    )


def _collate_labelled(images: list[Tensor], indices: list[int], source: ImageSource) -> LabelledBatch:
    labels = [-1 if source.classes is None else source.label(index) for index in indices]
    return LabelledBatch(images=stack(images), labels=torch.tensor(labels), index=torch.tensor(indices))


class BatchLoader:
    """Batches of a DataLoader, and an account of the files that could not be read.

    Attributes:
        broken: index in the source -> reason, of every broken image met so far on this process.

    Raises:
        ValueError (while iterating): if over 1 % of the source is broken, or an image does not fit.
    """

    def __init__(self, deliveries: DataLoader, source: ImageSource):
        self._deliveries = deliveries
        self._source = source
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._deliveries)

    def __iter__(self) -> Iterator[Any]:
        for delivery in self._deliveries:
            if delivery.error is not None:
                raise delivery.error
            for index, reason in delivery.broken:
                if index not in self.broken:
                    self.broken[index] = reason
                    so_far = len(self.broken), len(self._source)
                    _log.warning("%s; %s (%d of %d)", reason, delivery.fate, *so_far)
            check_share(self.broken, len(self._source))
            if delivery.batch is not None:
                yield delivery.batch


def train_loader(
    dataset: ViewDataset, stream: EpochStream, *, workers: int, pin_memory: bool = False
) -> BatchLoader:
    """Micro-batches of the stream, one after the other.

    Args:
        dataset: makes the batches.
        stream: says which.
        workers: processes that read ahead; 0: none. The batches do not depend on it.
        pin_memory: hand batches over in page-locked memory, for CUDA.
    """
    return BatchLoader(_data_loader(dataset, stream, workers, pin_memory), dataset.source)


def eval_loader(
    source: ImageSource, view: EvalView, *, batch_size: int, workers: int, pin_memory: bool = False
) -> BatchLoader:
    """Every image once over all processes: this one's are rank, rank + world_size, ...

    Shares may differ by one image; nothing is padded or repeated. A broken image is left out, counted, and an
    error above 1 %.

    Args:
        source: the images.
        view: of each.
        batch_size: images of a batch on this process; the last one may be smaller.
        workers: processes that read ahead, at most one for two batches; 0: none.
        pin_memory: hand batches over in page-locked memory, for CUDA.
    """
    indices = range(distributed.rank(), len(source), distributed.world_size())
    batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    workers = min(workers, len(batches) // 2)  # starting one for a single batch does not pay
    return BatchLoader(_data_loader(_EvalDataset(source, view), batches, workers, pin_memory), source)


def _data_loader(dataset: Dataset[_Delivery], batches: Any, workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_delivered,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
        timeout=_PATIENCE_S if workers else 0,
        generator=torch.Generator(),  # or every iterator would draw from the global one
    )


def _as_delivered(delivery: Any) -> Any:
    return delivery


def _leave_signals_to_parent(worker: int) -> None:
    """The training process decides when to stop; its workers must outlive the signal, to finish the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
