import os
import time
from pathlib import Path

import numpy as np
import pytest

from mpm.data import folder_index
from mpm.data.folder_index import PathTable, indexed_paths


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for path in ["b/2.jpg", "a/1.png", "a/deep/er/0.tif", "4.npy"]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    settle(root)
    return root


def settle(root: Path) -> None:
    """Date everything back, as if the data had been there for a while."""
    for directory in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        os.utime(directory, (0, 1e9 + len(str(directory))))


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one with each listing of a tree."""
    calls: list[Path] = []
    build = folder_index._build
    monkeypatch.setattr(folder_index, "_build", lambda root, files: calls.append(root) or build(root, files))
    return calls


def names(root: Path, **options: Path) -> list[str]:
    return [path.decode() for path in indexed_paths(root, **options)]


EXPECTED = ["4.npy", "a/1.png", "a/deep/er/0.tif", "b/2.jpg"]


def test_tree_is_listed_once(tree: Path, walks: list[Path]) -> None:
    assert names(tree) == EXPECTED
    assert names(tree) == EXPECTED
    assert len(walks) == 1
    (index,) = (tree / ".mpm").iterdir()
    assert index.name == "index.npz"
    (tree / "own").touch()
    assert index.stat().st_mode == (tree / "own").stat().st_mode  # others may read it


@pytest.mark.parametrize("change", ["add", "add deep", "remove", "rename", "new folder"])
def test_changed_tree_is_listed_again(tree: Path, walks: list[Path], change: str) -> None:
    names(tree)
    match change:
        case "add":
            (tree / "9.jpg").touch()
        case "add deep":
            (tree / "a/deep/er/9.jpg").touch()
        case "remove":
            (tree / "b/2.jpg").unlink()
        case "rename":
            (tree / "a/1.png").rename(tree / "a/9.png")
        case "new folder":
            (tree / "z").mkdir()
            (tree / "z/9.jpg").touch()
    expected = sorted(
        str(path.relative_to(tree))
        for path in tree.rglob("*.*")
        if path.is_file() and ".mpm" not in path.parts
    )
    assert names(tree) == expected
    assert len(walks) == 2


def test_files_added_while_listing_are_found_later(tree: Path) -> None:
    (tree / "b/2.jpg").rename(tree / "b/3.jpg")  # the folder has just changed, so its time proves nothing
    os.utime(tree / "b", ns=(time.time_ns() + 10**7, time.time_ns() + 10**7))
    before = (tree / "b").stat().st_mtime_ns
    while time.time_ns() < before:
        time.sleep(0.001)
    found = list(folder_index._walk(os.fsencode(tree), b"", frozenset()))
    assert {directory: modified for directory, modified, _ in found}[b"b"] == -1


def test_read_only_data_is_indexed_in_the_users_cache(
    tree: Path, tmp_path: Path, walks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_index, "_can_write", lambda file: tree not in file.parents and _made(file))
    assert names(tree) == EXPECTED == names(tree)
    assert len(walks) == 1
    assert not (tree / ".mpm").exists()
    assert len(list((tmp_path / "cache" / "mpm").glob("*.npz"))) == 1


def _made(file: Path) -> bool:
    file.parent.mkdir(parents=True, exist_ok=True)
    return True


def test_index_file_can_be_chosen(tree: Path, tmp_path: Path, walks: list[Path]) -> None:
    file = tmp_path / "elsewhere" / "images.npz"
    assert names(tree, index_file=file) == EXPECTED == names(tree, index_file=file)
    assert len(walks) == 1
    assert file.is_file()
    assert not (tree / ".mpm").exists()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn"])
def test_damaged_index_is_rebuilt(tree: Path, damage: bytes) -> None:
    names(tree)
    (tree / ".mpm" / "index.npz").write_bytes(damage)
    assert names(tree) == EXPECTED


def test_links_are_followed_but_not_in_circles(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "5.webp").touch()
    (tree / "linked").symlink_to(tmp_path / "more")
    (tree / "circle").symlink_to(tree)
    assert names(tree) == [*EXPECTED, "linked/5.webp"]


def test_paths_live_in_arrays() -> None:
    paths = [b"a.jpg", b"", b"\xff.png", "ä/b.png".encode()]
    table = PathTable.of(paths)
    assert list(table) == paths
    assert table.text.dtype == np.uint8
    assert table.text.nbytes + table.ends.nbytes == sum(map(len, paths)) + 8 * len(paths)
    assert list(PathTable.of([])) == []


@pytest.mark.parametrize("is_main", [True, False])
def test_others_wait_for_the_main_process_even_if_it_fails(
    monkeypatch: pytest.MonkeyPatch, is_main: bool
) -> None:
    events = []
    monkeypatch.setattr("mpm.distributed.is_main", lambda: is_main)
    monkeypatch.setattr("mpm.distributed.barrier", lambda: events.append("barrier"))
    with pytest.raises(ValueError, match="empty"), folder_index.main_process_first():  # noqa: PT012
        events.append("body")
        raise ValueError("empty")
    assert events == (["body", "barrier"] if is_main else ["barrier", "body"])
