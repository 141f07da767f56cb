"""Cached answers of a teacher: logits float32 [crops,images,L]."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpm.data.rows import Contents, RowCache

__all__ = ["create_answer_cache", "open_answer_cache"]

_ANSWERS = Contents(
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
        path, _ANSWERS, fingerprint=fingerprint, crops=crops, images=images, width=num_classes
    )


def open_answer_cache(path: str | Path, *, fingerprint: Mapping[str, Any]) -> RowCache:
    """A complete cache, see `RowCache.open`."""
    return RowCache.open(path, _ANSWERS, fingerprint=fingerprint)
