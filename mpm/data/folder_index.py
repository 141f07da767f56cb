"""Which images a folder tree holds, written down once and checked cheaply at every later start.

Listing a million files takes minutes on a network drive, so the list is kept in one file. It is valid as long
as every directory has the modification time it had then: adding, removing or renaming a file changes it.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
import zipfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mpm import distributed
from mpm.data.images import EXTENSIONS

_log = logging.getLogger(__name__)
_VERSION = f"1 {' '.join(EXTENSIONS)}"
_FOLDER = (
    ".mpm"  # hidden, so no scan enters it; a folder of its own, so that writing leaves the root's time alone
)
_TIMESTAMP_TICK_S = (
    0.05  # file systems stamp with the kernel's clock tick; later changes within one tick look unchanged
)

_Found = tuple[
    bytes, int, list[bytes]
]  # directory, its modification time in ns (-1: unknown), names of its images


class PathTable:
    """Many paths in two arrays: worker processes share them, which they cannot do with a list of strings.

    (Reading a Python string writes its reference count, and so copies its page into every worker.)

    Args:
        text: uint8, all paths one after the other.
        ends: int64 [n], where each path ends in `text`.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, paths: Iterable[bytes]) -> "PathTable":
        """Table of the paths, in their order."""
        text, ends = bytearray(), array("q")
        for path in paths:
            text += path
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The body runs on the main process, then on all others, which find what it left on the disk."""
    if not distributed.is_main():
        distributed.barrier()
    try:
        yield
    finally:
        if distributed.is_main():
            distributed.barrier()


def indexed_paths(root: Path, *, index_file: Path | None = None) -> PathTable:
    """Paths of all images below `root`, relative to it, in sorted order of their directories.

    Hidden files and directories are left out, links are followed. The main process reads or builds the index,
    then the others read it.

    Args:
        root: an existing directory.
        index_file: where the index is kept. None: in `root`, or in the user's cache if that is read-only.
    """
    with main_process_first():
        candidates = [index_file] if index_file else [root / _FOLDER / "index.npz", _cache_file(root)]
        for candidate in candidates:
            if (paths := _load(candidate, root)) is not None:
                return paths
        return _build(root, candidates)


def _cache_file(root: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mpm" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.npz"


def _load(file: Path, root: Path) -> PathTable | None:
    """The index in `file`, or None where there is none, or it is damaged or out of date."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            if str(stored["version"]) != _VERSION:
                return None
            directories = PathTable(stored["directories"], stored["directory_ends"])
            for directory, modified in zip(directories, stored["modified_ns"].tolist(), strict=True):
                if os.stat(os.path.join(os.fsencode(root), directory)).st_mtime_ns != modified:  # noqa: PTH116, PTH118
                    return None
            return PathTable(stored["paths"], stored["path_ends"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _build(root: Path, candidates: list[Path]) -> PathTable:
    file = next((candidate for candidate in candidates if _can_write(candidate)), None)
    time.sleep(_TIMESTAMP_TICK_S)  # the folder for the index may just have changed the root's time
    start = time.perf_counter()
    found = list(_walk(os.fsencode(root), b"", frozenset()))
    paths = PathTable.of(os.path.join(directory, name) for directory, _, names in found for name in names)  # noqa: PTH118
    directories = PathTable.of(directory for directory, _, _ in found)
    _log.info("found %d images in %s in %.1f s", len(paths), root, time.perf_counter() - start)
    if file is None:
        _log.warning(
            "the list of images cannot be kept, neither in %s nor in %s", *(c.parent for c in candidates)
        )
        return paths
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:  # a temporary file is its owner's alone
        whole = Path(temporary) / "index.npz"
        np.savez(
            whole,
            version=np.array(_VERSION),
            directories=directories.text,
            directory_ends=directories.ends,
            modified_ns=np.array([modified for _, modified, _ in found], np.int64),
            paths=paths.text,
            path_ends=paths.ends,
        )
        whole.replace(file)
    return paths


def _can_write(file: Path) -> bool:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(file.parent, os.W_OK)


def _walk(root: bytes, directory: bytes, ancestors: frozenset[tuple[int, int]]) -> Iterator[_Found]:
    path = os.path.join(root, directory)  # noqa: PTH118  bytes, which pathlib does not take: any file name is legal
    status = os.stat(path)  # noqa: PTH116  before the listing, so that a change in between is noticed
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a directory above
        return
    images, directories = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                directories.append(entry.name)
            elif entry.name.lower().endswith(_SUFFIXES):
                images.append(entry.name)
    age_s = time.time() - status.st_mtime_ns / 1e9
    is_certain = not 0 <= age_s < _TIMESTAMP_TICK_S
    yield directory, status.st_mtime_ns if is_certain else -1, sorted(images)
    for name in sorted(directories):
        yield from _walk(root, os.path.join(directory, name), ancestors | {identity})  # noqa: PTH118


_SUFFIXES = tuple(extension.encode() for extension in EXTENSIONS)
