"""Cached answers of a teacher: logits float32 [crops,images,L]."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpm.data.row_header import Contents
from mpm.data.rows import RowCache

__all__ = ["ANSWERS", "create_answer_cache", "open_answer_cache"]

ANSWERS = Contents(
    magic="mpm answers 1",
    dtype="<f4",
    width="num_classes",
    noun="answers",
    key="distillation.cache",
    command="mpm teach CONFIG",
)


def create_answer_cache(
    path: str | Path, *, fingerprint: Mapping[str, Any], crops: int, images: int, num_classes: int
) -> RowCache:
    """A cache to be filled, see `RowCache.create_or_open`."""
    return RowCache.create_or_open(
        path, ANSWERS, fingerprint=fingerprint, crops=crops, images=images, width=num_classes
    )


def open_answer_cache(path: str | Path, *, fingerprint: Mapping[str, Any]) -> RowCache:
    """A complete cache, see `RowCache.open`."""
    return RowCache.open(path, ANSWERS, fingerprint=fingerprint)
