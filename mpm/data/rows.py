"""What a frozen network says of crops that are seen again: kept in one file, read through a memory map."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

__all__ = ["Contents", "RowCache"]

_BLOCK = 4096  # header and states end at multiples of it
_MISSING, _DONE, _UNREADABLE = 0, 1, 2  # states of a row
_PATIENCE_S = 5  # of work that a power failure may cost


class Contents(NamedTuple):
    """What the rows of a cache are, and how a user knows them.

    Attributes:
        magic: first words of a file.
        dtype: of a number, in numpy's words.
        width: what counts the numbers of a row.
        noun: of them all: "codes".
        key: the configuration's, that names the file.
        command: that fills it.
    """

    magic: str
    dtype: str
    width: str
    noun: str
    key: str
    command: str

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return np.dtype(self.dtype).itemsize


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
            path: of the file; its folder is created.
            contents: what the rows are.
            fingerprint: what the rows depend on, plain data for JSON.
            crops: crops of an image.
            images: of the source.
            width: numbers of a row.
            facts: more of the header, plain data for JSON.

        Raises:
            ValueError: if the file is of something else, or the disk too small.
            BlockingIOError: if another process is filling it.
        """
        path = Path(path)
        header = {
            "fingerprint": _plain(fingerprint),
            "crops": crops,
            "images": images,
            contents.width: width,
            **(facts or {}),
        }
        text = json.dumps(header, indent=1)
        start = _padded(len(f"{contents.magic} {0:08d}\n{text}\n"))
        size = _size(header, start, contents)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _check_space(path, size, contents)
            path.touch()
        file = path.open("r+b", buffering=0)
        try:
            _lock(file, path, contents)
            if not any(file.read(_BLOCK)):  # new, or whoever created it was killed
                os.ftruncate(file.fileno(), size)
                os.fsync(file.fileno())
                opening = f"{contents.magic} {start:08d}\n{text}".ljust(start - 1).encode() + b"\n"
                _write(file, opening, 0)
                os.fsync(file.fileno())
            found, start = _read_header(path, contents)
            _check_same(path, found, header, contents)
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
        noun, command = contents.noun, contents.command
        if not path.exists():
            raise FileNotFoundError(
                f"there are no cached {noun} at {path}; run {command} first, or remove {contents.key}"
            )
        header, start = _read_header(path, contents)
        _check_same(path, header, {**header, "fingerprint": _plain(fingerprint)}, contents)
        cache = cls(path, contents, header, start)
        if not cache.is_complete:
            done, total = cache.progress
            raise ValueError(f"the {noun} in {path} are incomplete, {done} of {total}; {command} continues")
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
        return self._start + _padded(self.crops * self.images)

    @cached_property
    def _states(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r", self._start, (self.crops, self.images))

    @cached_property
    def _rows(self) -> np.ndarray:
        shape = (self.crops, self.images, self.width)
        return np.memmap(self.path, self.contents.dtype, "r", self._rows_start, shape)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _size(header: Mapping[str, Any], start: int, contents: Contents) -> int:
    rows = header["crops"] * header["images"]
    return int(start + _padded(rows) + contents.itemsize * rows * header[contents.width])


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


def _read_header(path: Path, contents: Contents) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes it takes."""
    with path.open("rb") as file:
        *magic, start = file.readline(_BLOCK).decode("ascii", errors="replace").split() or [""]
        header: Any = None
        with contextlib.suppress(ValueError):
            if " ".join(magic) == contents.magic:
                file.seek(0)
                header = json.loads(file.read(int(start)).split(b"\n", 1)[1])
    if header is None:
        raise ValueError(f"{path} is no file of {contents.noun}; give another {contents.key}")
    have, want = path.stat().st_size, _size(header, int(start), contents)
    if have != want:
        raise ValueError(
            f"{path} is damaged, it has {have} bytes and not {want}; remove it and run {contents.command}"
        )
    return header, int(start)


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], contents: Contents) -> None:
    have, want = _flat(found), _flat(wanted)
    for key in [*want, *have]:
        if have.get(key) != want.get(key):
            name = key.removeprefix("fingerprint.")
            raise ValueError(
                f"the {contents.noun} in {path} are of another {name}: {have.get(key)} not {want.get(key)}; "
                f"give another {contents.key}, or remove the file, and run {contents.command}"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(tree: Mapping[str, Any]) -> Any:
    """As it comes back from JSON: tuples as lists."""
    return json.loads(json.dumps(tree))
