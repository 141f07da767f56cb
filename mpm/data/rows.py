"""What a frozen network says of crops that are seen again: kept in one file, read through a memory map."""

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

from mpm.data.row_header import BLOCK, Contents, check_same, padded, plain, read_header, size_of

__all__ = ["RowCache", "check_place"]

_MISSING, _DONE, _UNREADABLE = 0, 1, 2  # states of a row
_PATIENCE_S = 5  # of work that a power failure may cost


class RowCache:
    """A row of numbers for every crop of every image, [crops,images,width], in one file.

    The file is a header (a line, then JSON) and the state of each row (a byte for a crop of an image), both
    padded to 4096 bytes, and the rows. A row is marked as done only when
    it is on the disk, so whoever fills the file may be killed at any time and continues.
    It is filled by one process and read by any number; loader workers get it pickled or forked.

    Attributes:
        path: of the file.
        contents: what the rows are.
        crops: crops of an image.
        images: of the source.
        width: numbers of a row.
        fingerprint: what the rows depend on, plain data.
    """

    def __init__(
        self,
        path: Path,
        contents: Contents,
        header: Mapping[str, Any],
        start: int,
        file: BinaryIO | None = None,
    ):
        """Use `create_or_open` or `open`. `start`: bytes of the header; `file`: to write to."""
        self.path = path
        self.contents = contents
        self.crops: int = header["crops"]
        self.images: int = header["images"]
        self.width: int = header[contents.width]
        self.fingerprint: dict[str, Any] = header["fingerprint"]
        self._start = start
        self._file = file
        self._unmarked: list[tuple[int, np.ndarray]] = []  # first row and states of what is written
        self._marked_at = time.monotonic()

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        contents: Contents,
        *,
        fingerprint: Mapping[str, Any],
        crops: int,
        images: int,
        width: int,
        facts: Mapping[str, Any] | None = None,
    ) -> "RowCache":
        """A cache to be filled: a new one, or the rest of the one that is there.

        Args:
            path: of the file.
            contents: what the rows are.
            fingerprint: what the rows depend on, plain data for JSON. Of a mapping with `sha256`, `of` says
                where that lay, and is not compared.
            crops: crops of an image.
            images: of the source.
            width: numbers of a row.
            facts: more of the header, plain data for JSON.

        Raises:
            FileNotFoundError: if there is no folder for it.
            ValueError: if the file is of something else, or the disk too small.
            BlockingIOError: if another process is filling it.
        """
        path = Path(path)
        check_place(path, contents)
        header = {
            "fingerprint": plain(fingerprint),
            "crops": crops,
            "images": images,
            contents.width: width,
            **(facts or {}),
        }
        text = json.dumps(header, indent=1)
        start = padded(len(f"{contents.magic} {0:08d}\n{text}\n"))
        size = size_of(header, start, contents)
        if not path.exists():
            _check_space(path, size, contents)
            path.touch()
        file = path.open("r+b", buffering=0)
        try:
            _lock(file, path, contents)
            if not any(file.read(BLOCK)):  # new, or whoever created it was killed
                os.ftruncate(file.fileno(), size)
                os.fsync(file.fileno())
                opening = f"{contents.magic} {start:08d}\n{text}".ljust(start - 1).encode() + b"\n"
                _write(file, opening, 0)
                os.fsync(file.fileno())
            found, start = read_header(path, contents)
            check_same(path, found, header, contents)
        except BaseException:
            file.close()
            raise
        return cls(path, contents, found, start, file)

    @classmethod
    def open(cls, path: str | Path, contents: Contents, *, fingerprint: Mapping[str, Any]) -> "RowCache":
        """A complete cache, to be read.

        Args:
            path: of the file.
            contents: what the rows are.
            fingerprint: what the rows must depend on.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if the rows are of something else, or incomplete.
        """
        path = Path(path)
        check_place(path, contents)
        noun, command = contents.noun, contents.command
        if not path.exists():
            raise FileNotFoundError(
                f"there are no cached {noun} at {contents.key} {path}; run {command} first, or remove the key"
            )
        header, start = read_header(path, contents)
        check_same(path, header, {**header, "fingerprint": plain(fingerprint)}, contents)
        cache = cls(path, contents, header, start)
        if not cache.is_complete:
            done, total = cache.progress
            raise ValueError(f"the {noun} in {path} are incomplete, {done} of {total}; {command} continues")
        return cache

    @property
    def is_complete(self) -> bool:
        """Whether every image has been looked at; those that could not be read have no rows."""
        return bool((self._states != _MISSING).all())

    @property
    def progress(self) -> tuple[int, int]:
        """How many rows are filled, and how many there are."""
        return int((self._states == _DONE).sum()), self._states.size

    def missing(self) -> Iterator[tuple[int, int, int]]:
        """Rows that are not filled, also of broken images, as (crop, first image, one after the last)."""
        for crop, states in enumerate(self._states):
            edges = np.flatnonzero(np.diff(states != _DONE, prepend=False, append=False))
            for first, stop in edges.reshape(-1, 2).tolist():
                yield crop, first, stop

    def read(self, crop: int, image: int) -> np.ndarray:
        """A row [width].

        Raises:
            ValueError: if the image could not be read when the rows were computed.
        """
        if self._states[crop, image] != _DONE:
            raise ValueError(
                f"{self.path} has no {self.contents.noun} for image {image}: it could not be read when they "
                f"were computed; {self.contents.command} tries again"
            )
        return self._rows[crop, image]

    def write(self, crop: int, first: int, rows: np.ndarray, *, readable: np.ndarray | None = None) -> None:
        """Rows of consecutive images of one crop; marked as done some seconds later, or by `flush`.

        Args:
            crop: number of the crop.
            first: the first image.
            rows: [n,width], numbers that the type of the file holds exactly.
            readable: bool [n], False for images that could not be read, whose rows mean nothing; None: all.

        Raises:
            OSError: if the disk is full.
        """
        assert self._file is not None, "opened to be read"
        assert rows.ndim == 2 and rows.shape[1] == self.width
        kept = rows.astype(self.contents.dtype)
        assert np.array_equal(kept, rows)
        row = crop * self.images + first
        _write(self._file, kept.tobytes(), self._rows_start + row * self.contents.itemsize * self.width)
        states = np.full(len(rows), _DONE, np.uint8)
        if readable is not None:
            states[~readable] = _UNREADABLE
        self._unmarked.append((row, states))
        if time.monotonic() - self._marked_at > _PATIENCE_S:
            self.flush()

    def flush(self) -> None:
        """Put all rows on the disk, then mark them as done."""
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
        maps = ("_states", "_rows")  # opened again where they are needed
        return {key: value for key, value in self.__dict__.items() if key not in maps} | {"_file": None}

    @property
    def _rows_start(self) -> int:
        return self._start + padded(self.crops * self.images)

    @cached_property
    def _states(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r", self._start, (self.crops, self.images))

    @cached_property
    def _rows(self) -> np.ndarray:
        shape = (self.crops, self.images, self.width)
        return np.memmap(self.path, self.contents.dtype, "r", self._rows_start, shape)


def check_place(path: Path, contents: Contents) -> None:
    """Whether a file of rows can lie at a path.

    Raises:
        FileNotFoundError: if there is no folder for it.
        ValueError: if it is a folder.
    """
    if path.is_dir():
        example = path / f"{contents.noun}.bin"
        raise ValueError(f"{contents.key} {path} is a folder; give a file, as {example}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{contents.key} {path}: there is no folder {path.parent}; make it first, or correct the path"
        )


def _check_space(path: Path, size: int, contents: Contents) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ValueError(
            f"the {contents.noun} take {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free in "
            f"{path.parent}; put {contents.key} on another disk, or draw fewer crops"
        )


def _lock(file: BinaryIO, path: Path, contents: Contents) -> None:
    """One process fills a file, until it closes it or ends."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"another process is filling {path}; wait for it, or give another {contents.key}"
        ) from error
    except OSError:  # a file system without locks
        pass


def _write(file: BinaryIO, data: bytes, offset: int) -> None:
    """All of it; a full disk is an OSError here, where a memory map would end the process."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file.fileno(), rest, offset)
        rest, offset = rest[written:], offset + written
