"""A network over many image files; those that cannot be read are left out and counted."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mpm.data.datasets import ImageSource
from mpm.data.images import EXTENSIONS, legible, read_image
from mpm.data.loading import stack
from mpm.data.views import EvalView
from mpm.network import Network

__all__ = ["ImageFiles", "Inferred", "image_files", "infer", "readable_views"]

log = logging.getLogger(__name__)

_BATCH = 64


class Inferred(NamedTuple):
    """What a network says about a batch.

    Attributes:
        places: numbers of the images in their source, ascending.
        values: [B,...], on the CPU.
    """

    places: list[int]
    values: Tensor


class ImageFiles:
    """Files given one by one, without labels.

    Args:
        files: their paths.
        reading: other arguments of `read_image`.
    """

    def __init__(self, files: Sequence[Path], reading: dict[str, Any]):
        self.classes: tuple[str, ...] | None = None
        self._files = files
        self._reading = reading

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Tensor:
        """[C,H,W] uint8, or float32 in [0, 1]."""
        return read_image(self._files[index], **self._reading)

    def label(self, index: int) -> int:
        """There is none."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Path as given, see `legible`."""
        return legible(self._files[index])


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, and all images below the folders among them, hidden ones left out.

    Raises:
        ValueError: if a folder holds no images.
    """
    files: list[Path] = []
    for path in paths:
        below = _images_below(path) if path.is_dir() else [path]
        if not below:
            raise ValueError(f"{path} holds no images; expected files ending in {', '.join(EXTENSIONS)}")
        files += below
    return files


def _images_below(folder: Path) -> list[Path]:
    def is_shown(file: Path) -> bool:
        return not any(part.startswith(".") for part in file.relative_to(folder).parts)

    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and is_shown(file))


class _Views(NamedTuple):
    places: list[int]
    images: Tensor | None
    reasons: list[str]


class _ViewsOf(Dataset[_Views]):
    def __init__(self, source: ImageSource, view: EvalView):
        self._source = source
        self._view = view

    def __getitems__(self, places: list[int]) -> _Views:
        images: list[Tensor] = []
        read: list[int] = []
        reasons: list[str] = []
        for place in places:
            try:
                images.append(self._view(self._source.read(place)))
            except ValueError as error:  # broken, or of other channels
                reasons.append(str(error))
            else:
                read.append(place)
        return _Views(read, stack(images) if images else None, reasons)


def readable_views(
    source: ImageSource, view: EvalView, *, workers: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of numbers and views [B,C,h,w] of the images that can be read; the log names the others.

    Raises:
        ValueError: at the end, if there was none.
    """
    places = list(range(len(source)))
    batches = [places[first : first + _BATCH] for first in range(0, len(source), _BATCH)]
    loader = DataLoader(
        _ViewsOf(source, view),
        batch_sampler=batches,
        num_workers=min(workers, len(batches) - 1),  # none where one batch holds all
        collate_fn=_as_it_is,
    )
    first_reason, any_read = None, False
    for delivered, images, reasons in loader:
        for reason in reasons:
            log.warning("%s; left out", reason)
            first_reason = first_reason or reason
        if images is not None:
            any_read = True
            yield delivered, images
    if not any_read:
        raise ValueError(f"none of the {len(source)} images can be used: {first_reason}")


def _as_it_is(views: Any) -> Any:
    return views


def infer(
    network: Network, source: ImageSource, read_out: Callable[[Tensor], Tensor], *, workers: int
) -> Iterator[Inferred]:
    """A network's answers about a source, batch by batch.

    Args:
        network: whose view the images get.
        source: the images.
        read_out: `network.predict` or `network.features`.
        workers: processes that read ahead, where there is more than one batch.

    Raises:
        ValueError: if no image can be read.
    """
    for places, images in readable_views(source, network.view, workers=workers):
        with torch.inference_mode():
            yield Inferred(places, read_out(images).float().cpu())
