"""What a file of rows says of itself: a line of text, then JSON, and whether it is what a run needs."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BLOCK", "Contents", "check_same", "padded", "plain", "read_header", "size_of"]

BLOCK = 4096  # header and states end at multiples of it


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


def padded(size: int) -> int:
    """Bytes up to the end of a block."""
    return -(-size // BLOCK) * BLOCK


def size_of(header: Mapping[str, Any], start: int, contents: Contents) -> int:
    """Bytes of the whole file, whose header takes `start`."""
    rows = header["crops"] * header["images"]
    return int(start + padded(rows) + contents.itemsize * rows * header[contents.width])


def read_header(path: Path, contents: Contents) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes it takes.

    Raises:
        ValueError: if the file is of another kind, or damaged.
    """
    with path.open("rb") as file:
        *magic, start = file.readline(BLOCK).decode("ascii", errors="replace").split() or [""]
        header: Any = None
        with contextlib.suppress(ValueError):
            if " ".join(magic) == contents.magic:
                file.seek(0)
                header = json.loads(file.read(int(start)).split(b"\n", 1)[1])
    if header is None:
        raise ValueError(f"{path} is no file of {contents.noun}; give another {contents.key}")
    have, want = path.stat().st_size, size_of(header, int(start), contents)
    if have != want:
        raise ValueError(
            f"{path} is damaged, it has {have} bytes and not {want}; remove it and run {contents.command}"
        )
    return header, int(start)


def check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], contents: Contents) -> None:
    """Compare headers, but for what is called `of`: where something lay, whose digest is compared.

    Raises:
        ValueError: saying in words what differs first.
    """
    have, want = _flat(found), _flat(wanted)
    for key in [*want, *have]:
        if have.get(key) != want.get(key) and not key.endswith(".of"):
            raise ValueError(
                f"{contents.key} {path} was filled {_difference(key, have, want)}; give another file, "
                f"or remove this one, and run {contents.command}"
            )


def _difference(key: str, have: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    name = key.removeprefix("fingerprint.").removesuffix(".sha256")
    if not key.endswith(".sha256"):
        return f"with {name} {json.dumps(have.get(key))}, not {json.dumps(want.get(key))}"
    then, now = (headers.get(f"{key.removesuffix('sha256')}of") for headers in (have, want))
    return f"before the {name} {now} changed" if then == now else f"with the {name} {then}, not {now}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plain(tree: Mapping[str, Any]) -> Any:
    """As it comes back from JSON: tuples as lists."""
    return json.loads(json.dumps(tree))
