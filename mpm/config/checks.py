"""Rules that several sections share."""

from bisect import bisect

from mpm.config.data import (
    FinetuneData,
    PretrainData,
)
from mpm.config.model import Backbone
from mpm.config.section import check_multiple

__all__ = ["check_cells", "check_micro_batch", "check_patches", "check_statistics_are_stated"]


def check_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Refuse an image that is not whole patches.

    Raises:
        ValueError: naming the nearest sizes that are.
    """
    square = image_size[0] == image_size[1] and patch_size[0] == patch_size[1]
    for side, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        of = "" if square else f" ({side})"
        check_multiple(f"image_size{of}", size, patch, of=f"patch_size{of} {patch}")


def check_cells(backbone: Backbone, cells: int, key: str) -> None:
    """Refuse histograms that do not divide a patch.

    Raises:
        ValueError: naming the nearest sides that they do.
    """
    for side in backbone.resolved().patch_size:
        check_multiple("backbone.patch_size", side, cells, of=f"{key} {cells}")


def check_statistics_are_stated(data: PretrainData | FinetuneData) -> None:
    """Refuse ImageNet's moments, which stand where none are stated, for other than three channels.

    Raises:
        ValueError: naming what to state.
    """
    for key in ("mean", "std"):
        if getattr(data, key) is None and data.channels not in (None, 3):
            raise ValueError(
                f"data.{key} is null, so ImageNet's, which is for 3 channels, not {data.channels}; "
                f"use measured, or a list of {data.channels}"
            )


def check_micro_batch(micro_batch: int | None, batch_size: int) -> None:
    """Refuse a micro-batch that does not divide the batch.

    Raises:
        ValueError: naming the nearest that do.
    """
    if micro_batch is not None and batch_size % micro_batch:
        divisors = [size for size in range(1, batch_size + 1) if not batch_size % size]
        place = bisect(divisors, micro_batch)
        legal = " or ".join(str(size) for size in divisors[place - 1 : place + 1])
        raise ValueError(
            f"run.micro_batch {micro_batch} does not divide batch_size {batch_size}; use {legal}"
        )
