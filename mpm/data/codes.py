"""Cached codes of a tokenizer: uint16 [crops,images,N]."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpm.data.row_header import Contents
from mpm.data.rows import RowCache

__all__ = ["CODES", "LARGEST_VOCABULARY", "create_code_cache", "open_code_cache"]

LARGEST_VOCABULARY = 2**16  # of 16 bits

CODES = Contents(
    magic="mpm codes 1",
    dtype="<u2",
    width="num_patches",
    noun="codes",
    key="objective.target.cache",
    command="mpm tokenize CONFIG",
)


def create_code_cache(
    path: str | Path,
    *,
    fingerprint: Mapping[str, Any],
    crops: int,
    images: int,
    num_patches: int,
    vocab_size: int,
) -> RowCache:
    """A cache to be filled, see `RowCache.create_or_open`; whole numbers, 0 <= code < V.

    Raises:
        ValueError: also if V is too large.
    """
    if vocab_size > LARGEST_VOCABULARY:
        raise ValueError(
            f"a vocabulary of {vocab_size} does not fit 16 bits; codes can be cached up to "
            f"{LARGEST_VOCABULARY}, remove objective.target.cache"
        )
    return RowCache.create_or_open(
        path,
        CODES,
        fingerprint=fingerprint,
        crops=crops,
        images=images,
        width=num_patches,
        facts={"vocab_size": vocab_size},
    )


def open_code_cache(path: str | Path, *, fingerprint: Mapping[str, Any]) -> RowCache:
    """A complete cache, see `RowCache.open`."""
    return RowCache.open(path, CODES, fingerprint=fingerprint)
