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
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from mpm import distributed
from mpm.data.channels import to_unit_range
from mpm.data.datasets import ImageSource
from mpm.data.images import UnreadableImage
from mpm.data.rows import RowCache
from mpm.data.stream import SampleKey
from mpm.data.substitution import check_share, read_next
from mpm.data.views import MASK_STREAM, EvalView, PretrainView, TrainView, sample_generator
from mpm.patchify.masks import MaskSampler

_log = logging.getLogger(__name__)

_PATIENCE_S = 600  # for one batch: a worker that died or hangs ends the run, which can then be continued


class PretrainBatch(NamedTuple):
    """Masked images.

    Attributes:
        images: [B,C,H,W] uint8, or float32 in [0, 1] where a file is deeper.
        target_images: [B,C,H2,W2], or None where the target is the image, or the codes are known.
        masked: bool [B,N], True = masked, the same number in every row; None where nothing is masked.
        index: int64 [B], in the source.
        codes: int64 [B,N], of a tokenizer; None where they are not cached.
    """

    images: Tensor
    target_images: Tensor | None
    masked: Tensor | None
    index: Tensor  # type: ignore[assignment]  # in place of tuple.index
    codes: Tensor | None = None


class LabelledBatch(NamedTuple):
    """Images with classes.

    Attributes:
        images: [B,C,H,W] uint8, or float32 in [0, 1] where a file is deeper.
        labels: int64 [B], -1 where the source has no classes.
        index: int64 [B], in the source.
        teacher: float32 [B,L], a teacher's logits; None where they are not cached.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # in place of tuple.index
    teacher: Tensor | None = None


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
        crops: number of crops of an image that are shown in turn, epoch after epoch, each time under another
            mask; None: every epoch has its own.
        cached: of these crops, the codes in place of the view for the tokenizer, or a teacher's answers.

    Raises:
        ValueError: if what is cached is of another number of crops or images.
    """

    def __init__(
        self,
        source: ImageSource,
        view: PretrainView | TrainView,
        *,
        seed: int,
        crops: int | None = None,
        cached: RowCache | None = None,
    ):
        if cached is not None and (cached.crops, cached.images) != (crops, len(source)):
            raise ValueError(
                f"the cached {cached.contents.noun} are of {cached.crops} crops of {cached.images} images, "
                f"not of {crops} crops of {len(source)}"
            )
        self.source = source
        self._view = view
        self._seed = seed
        self._crops = crops
        self._cached = cached

    def __getitems__(self, keys: list[SampleKey]) -> _Delivery:
        try:
            return self._deliver(keys)
        except ValueError as error:  # raised again, as one line, by the process that iterates
            return _Delivery(error=error)

    def _deliver(self, keys: list[SampleKey]) -> _Delivery:
        broken: dict[int, str] = {}
        indices: list[int] = []
        samples: list[Any] = []
        rows: list[np.ndarray] = []
        for key in keys:
            index, image, passed_over = read_next(self.source, key.image)
            broken |= passed_over
            crop = self._crop_of(key, index)
            rng = sample_generator(self._seed, *crop)
            if isinstance(self._view, PretrainView):
                mask_rng = sample_generator(self._seed, *key, stream=MASK_STREAM)
                samples.append(self._view(image, rng, mask_rng, with_target=self._cached is None))
            else:
                samples.append(self._view(image, rng))
            if self._cached is not None:
                rows.append(self._cached.read(crop.epoch, crop.image))
            indices.append(index)
        batch: PretrainBatch | LabelledBatch
        if isinstance(self._view, PretrainView):
            batch = _collate_pretrain(samples, indices, self._view.mask_sampler, rows)
        else:
            batch = _collate_labelled(samples, indices, self.source, rows)
        return _Delivery(batch, tuple(broken.items()))

    def _crop_of(self, key: SampleKey, index: int) -> SampleKey:
        """What the crop depends on; `index`: of the image that was read.

        Crops that are seen again belong to their image, whichever image it stands in for.
        """
        if self._crops is None:
            return key
        return SampleKey((key.epoch + key.repeat) % self._crops, index, 0)


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


def _collate_pretrain(
    samples: list[Any], indices: list[int], mask_sampler: MaskSampler | None, codes: list[np.ndarray]
) -> PretrainBatch:
    masked = None
    if mask_sampler is not None:
        masked = torch.from_numpy(np.stack([sample.masked for sample in samples]))
        hides_as_many = masked.sum(1) == mask_sampler.count
        assert hides_as_many.all(), "the device relies on the same number in every row"
    has_targets = samples[0].target_image is not None
    return PretrainBatch(
        images=stack([sample.image for sample in samples]),
        target_images=stack([sample.target_image for sample in samples]) if has_targets else None,
        masked=masked,
        index=torch.tensor(indices),
        codes=torch.from_numpy(np.stack(codes).astype(np.int64)) if codes else None,
    )


def _collate_labelled(
    images: list[Tensor], indices: list[int], source: ImageSource, answers: list[np.ndarray] | None = None
) -> LabelledBatch:
    labels = [-1 if source.classes is None else source.label(index) for index in indices]
    return LabelledBatch(
        images=stack(images),
        labels=torch.tensor(labels),
        index=torch.tensor(indices),
        teacher=torch.from_numpy(np.stack(answers)) if answers else None,
    )


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
    dataset: ViewDataset, stream: Sampler[list[SampleKey]], *, workers: int, pin_memory: bool = False
) -> BatchLoader:
    """Micro-batches of the stream, one after the other.

    Args:
        dataset: makes the batches.
        stream: says which; an `EpochStream` in training.
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
