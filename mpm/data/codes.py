"""Codes of crops that are seen again: computed once, kept in one file, and read through a memory map."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from mpm.data.code_header import BLOCK, MAGIC, check_same, padded, plain, read_header, size_of

__all__ = ["LARGEST_VOCABULARY", "CodeCache", "check_place"]

LARGEST_VOCABULARY = 2**16  # of 16 bits

_MISSING, _DONE, _UNREADABLE = 0, 1, 2  # states of a row
_PATIENCE_S = 5  # of work that a power failure may cost


class CodeCache:
    """The codes of every crop of every image, uint16 [crops,images,N], in one file.

    The file is a header (a line, then JSON) and the state of each row (a byte for a crop of an image), both
    padded to 4096 bytes, and the codes: 2 N bytes for a crop of an image. A row is marked as done only when
    its codes are on the disk, so whoever fills the file may be killed at any time and continues.
    It is filled by one process and read by any number; loader workers get it pickled or forked.

    Attributes:
        path: of the file.
        crops: crops of an image.
        images: of the source.
        num_patches: N.
        vocab_size: V, at most 65536.
        fingerprint: what the codes depend on, plain data.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], start: int, file: BinaryIO | None = None):
        """Use `create_or_open` or `open`. `start`: bytes of the header; `file`: to write to."""
        self.path = path
        self.crops: int = header["crops"]
        self.images: int = header["images"]
        self.num_patches: int = header["num_patches"]
        self.vocab_size: int = header["vocab_size"]
        self.fingerprint: dict[str, Any] = header["fingerprint"]
        self._start = start
        self._file = file
        self._unmarked: list[tuple[int, np.ndarray]] = []  # first row and states of what is written
        self._marked_at = time.monotonic()

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        *,
        fingerprint: Mapping[str, Any],
        crops: int,
        images: int,
        num_patches: int,
        vocab_size: int,
    ) -> "CodeCache":
        """A cache to be filled: a new one, or the rest of the one that is there.

        Args:
            path: of the file.
            fingerprint: what the codes depend on, plain data for JSON. Of a mapping with `sha256`, `of` says
                where that lay, and is not compared.
            crops: crops of an image.
            images: of the source.
            num_patches: N.
            vocab_size: V.

        Raises:
            FileNotFoundError: if there is no folder for it.
            ValueError: if the file is of something else, V is too large or the disk too small.
            BlockingIOError: if another process is filling it.
        """
        path = Path(path)
        check_place(path)
        if vocab_size > LARGEST_VOCABULARY:
            raise ValueError(
                f"a vocabulary of {vocab_size} does not fit 16 bits; codes can be cached up to "
                f"{LARGEST_VOCABULARY}, remove objective.target.cache"
            )
        header = {
            "fingerprint": plain(fingerprint),
            "crops": crops,
            "images": images,
            "num_patches": num_patches,
            "vocab_size": vocab_size,
        }
        text = json.dumps(header, indent=1)
        start = padded(len(f"{MAGIC} {0:08d}\n{text}\n"))
        size = size_of(header, start)
        if not path.exists():
            _check_space(path, size)
            path.touch()
        file = path.open("r+b", buffering=0)
        try:
            _lock(file, path)
            if not any(file.read(BLOCK)):  # new, or whoever created it was killed
                os.ftruncate(file.fileno(), size)
                os.fsync(file.fileno())
                _write(file, f"{MAGIC} {start:08d}\n{text}".ljust(start - 1).encode() + b"\n", 0)
                os.fsync(file.fileno())
            found, start = read_header(path)
            check_same(path, found, header)
        except BaseException:
            file.close()
            raise
        return cls(path, found, start, file)

    @classmethod
    def open(cls, path: str | Path, *, fingerprint: Mapping[str, Any]) -> "CodeCache":
        """A complete cache, to be read.

        Args:
            path: of the file.
            fingerprint: what the codes must depend on.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if the codes are of something else, or incomplete.
        """
        path = Path(path)
        check_place(path)
        if not path.exists():
            raise FileNotFoundError(
                f"there are no cached codes at objective.target.cache {path}; run mpm tokenize CONFIG first, "
                "or remove the key"
            )
        header, start = read_header(path)
        check_same(path, header, {**header, "fingerprint": plain(fingerprint)})
        cache = cls(path, header, start)
        if not cache.is_complete:
            done, total = cache.progress
            raise ValueError(
                f"the codes in {path} are incomplete, {done} of {total}; mpm tokenize CONFIG continues"
            )
        return cache

    @property
    def is_complete(self) -> bool:
        """Whether every image has been looked at; those that could not be read have no codes."""
        return bool((self._states != _MISSING).all())

    @property
    def progress(self) -> tuple[int, int]:
        """How many rows have codes, and how many there are."""
        return int((self._states == _DONE).sum()), self._states.size

    def missing(self) -> Iterator[tuple[int, int, int]]:
        """Rows without codes, those of unreadable images too, as (crop, first image, one after the last)."""
        for crop, states in enumerate(self._states):
            edges = np.flatnonzero(np.diff(states != _DONE, prepend=False, append=False))
            for first, stop in edges.reshape(-1, 2).tolist():
                yield crop, first, stop

    def read(self, crop: int, image: int) -> np.ndarray:
        """Codes uint16 [N], row-major.

        Raises:
            ValueError: if the image could not be read when the codes were computed.
        """
        if self._states[crop, image] != _DONE:
            raise ValueError(
                f"{self.path} has no codes for image {image}: it could not be read when they were computed; "
                "mpm tokenize CONFIG tries again"
            )
        return self._codes[crop, image]

    def write(self, crop: int, first: int, codes: np.ndarray, *, readable: np.ndarray | None = None) -> None:
        """Codes of consecutive images of one crop; marked as done some seconds later, or by `flush`.

        Args:
            crop: number of the crop.
            first: the first image.
            codes: whole numbers [n,N], 0 <= code < V.
            readable: bool [n], False for images that could not be read, whose codes mean nothing; None: all.

        Raises:
            OSError: if the disk is full.
        """
        assert self._file is not None, "opened to be read"
        assert codes.ndim == 2 and codes.shape[1] == self.num_patches
        assert codes.min() >= 0 and codes.max() < self.vocab_size
        row = crop * self.images + first
        _write(self._file, codes.astype("<u2").tobytes(), self._codes_start + row * 2 * self.num_patches)
        states = np.full(len(codes), _DONE, np.uint8)
        if readable is not None:
            states[~readable] = _UNREADABLE
        self._unmarked.append((row, states))
        if time.monotonic() - self._marked_at > _PATIENCE_S:
            self.flush()

    def flush(self) -> None:
        """Put all codes on the disk, then mark them as done."""
        assert self._file is not None, "opened to be read"
        os.fsync(self._file.fileno())  # a power failure may write later pages before earlier ones
        for row, states in self._unmarked:
            _write(self._file, states.tobytes(), self._start + row)
        os.fsync(self._file.fileno())
        self._unmarked = []
        self._marked_at = time.monotonic()

    def close(self) -> None:
        """Flush, and leave the file to others."""
        if self._file is not None:
            try:
                self.flush()
            finally:
                self._file.close()
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        maps = ("_states", "_codes")  # opened again where they are needed
        return {key: value for key, value in self.__dict__.items() if key not in maps} | {"_file": None}

    @property
    def _codes_start(self) -> int:
        return self._start + padded(self.crops * self.images)

    @cached_property
    def _states(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r", self._start, (self.crops, self.images))

    @cached_property
    def _codes(self) -> np.ndarray:
        shape = (self.crops, self.images, self.num_patches)
        return np.memmap(self.path, "<u2", "r", self._codes_start, shape)


def check_place(path: Path) -> None:
    """Whether a file of codes can lie at a path.

    Raises:
        FileNotFoundError: if there is no folder for it.
        ValueError: if it is a folder.
    """
    if path.is_dir():
        raise ValueError(f"objective.target.cache {path} is a folder; give a file, as {path / 'codes.bin'}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"objective.target.cache {path}: there is no folder {path.parent}; make it, or correct the path"
        )


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ValueError(
            f"the codes take {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free in {path.parent}; "
            "put objective.target.cache on another disk, or lower objective.target.crops"
        )


def _lock(file: BinaryIO, path: Path) -> None:
    """One process fills a file, until it closes it or ends."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"another process is filling {path}; wait for it, or give another objective.target.cache"
        ) from error
    except OSError:  # a file system without locks
        pass


def _write(file: BinaryIO, data: bytes, offset: int) -> None:
    """All of it; a full disk is an OSError here, where a memory map would end the process."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file.fileno(), rest, offset)
        rest, offset = rest[written:], offset + written
