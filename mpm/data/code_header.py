"""What a file of codes says of itself: a line of text, then JSON, and whether it is what a run needs."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["BLOCK", "MAGIC", "check_same", "padded", "plain", "read_header", "size_of"]

MAGIC = "mpm codes 1"
BLOCK = 4096  # header and states end at multiples of it


def padded(size: int) -> int:
    """Bytes up to the end of a block."""
    return -(-size // BLOCK) * BLOCK


def size_of(header: Mapping[str, Any], start: int) -> int:
    """Bytes of the whole file, whose header takes `start`."""
    rows = header["crops"] * header["images"]
    return start + padded(rows) + 2 * rows * header["num_patches"]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes it takes.

    Raises:
        ValueError: if the file is of another kind, or damaged.
    """
    with path.open("rb") as file:
        *magic, start = file.readline(BLOCK).decode("ascii", errors="replace").split() or [""]
        header: Any = None
        with contextlib.suppress(ValueError):
            if " ".join(magic) == MAGIC:
                file.seek(0)
                header = json.loads(file.read(int(start)).split(b"\n", 1)[1])
    if header is None:
        raise ValueError(f"{path} is no file of codes; give another objective.target.cache")
    have, want = path.stat().st_size, size_of(header, int(start))
    if have != want:
        raise ValueError(
            f"{path} is damaged, it has {have} bytes and not {want}; remove it and run mpm tokenize CONFIG"
        )
    return header, int(start)


def check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare headers, but for what is called `of`: where something lay, whose digest is compared.

    Raises:
        ValueError: saying in words what differs first.
    """
    have, want = _flat(found), _flat(wanted)
    for key in [*want, *have]:
        if have.get(key) != want.get(key) and not key.endswith(".of"):
            raise ValueError(
                f"objective.target.cache {path} was filled {_difference(key, have, want)}; give another "
                "file, or remove this one, and run mpm tokenize CONFIG"
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
