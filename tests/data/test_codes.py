import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpm.data.codes import CodeCache

SIZES = {"crops": 2, "images": 30, "num_patches": 6, "vocab_size": 50}
FINGERPRINT = {
    "crops": 2,
    "images": 30,
    "seed": 0,
    "tokenizer": {"sha256": "5f3a", "of": "runs/a"},
    "data": {"crop_scale": (0.2, 1.0), "flip": True},
}


def create(path: Path, *, fingerprint: dict = FINGERPRINT, **sizes: int) -> CodeCache:
    return CodeCache.create_or_open(path, fingerprint=fingerprint, **SIZES | sizes)


def codes_of(crop: int, first: int, stop: int, *, vocab_size: int = 50) -> np.ndarray:
    """Something else for every crop, image and patch."""
    images = np.arange(first, stop)[:, None]
    return (crop * 1009 + images * 31 + np.arange(6)) * 7919 % vocab_size


def fill(cache: CodeCache, *, rows: int = 7) -> None:
    with cache:
        for crop, first, stop in list(cache.missing()):
            for start in range(first, stop, rows):
                end = min(start + rows, stop)
                cache.write(crop, start, codes_of(crop, start, end, vocab_size=cache.vocab_size))


@pytest.mark.parametrize("vocab_size", [50, 65536])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int) -> None:
    path = tmp_path / "codes"
    fill(create(path, vocab_size=vocab_size))
    cache = CodeCache.open(path, fingerprint=FINGERPRINT)
    assert cache.is_complete
    assert cache.progress == (60, 60)
    assert not list(cache.missing())
    assert cache.fingerprint == FINGERPRINT | {"data": {"crop_scale": [0.2, 1.0], "flip": True}}
    for crop in range(2):
        read = np.stack([cache.read(crop, image) for image in range(30)])
        np.testing.assert_array_equal(read, codes_of(crop, 0, 30, vocab_size=vocab_size))


def test_codes_take_two_bytes_each(tmp_path: Path) -> None:
    sizes = {"images": 10_000, "crops": 3}
    create(tmp_path / "codes", **sizes).close()
    size = (tmp_path / "codes").stat().st_size
    assert 0 <= size - 3 * 10_000 * (2 * 6 + 1) <= 2 * 4096
    assert os.listdir(tmp_path) == ["codes"]  # noqa: PTH208


def test_header_is_text_that_people_can_read(tmp_path: Path) -> None:
    create(tmp_path / "codes").close()
    line, text = (tmp_path / "codes").read_bytes()[:4096].decode("ascii").split("\n", 1)
    assert line == "mpm codes 1 00004096"
    assert json.loads(text)["fingerprint"]["tokenizer"]["of"] == "runs/a"


def test_large_fingerprints_have_room(tmp_path: Path) -> None:
    fingerprint = {"mean": list(np.linspace(0, 1, 1000))}
    fill(create(tmp_path / "codes", fingerprint=fingerprint))
    cache = CodeCache.open(tmp_path / "codes", fingerprint=fingerprint)
    np.testing.assert_array_equal(cache.read(1, 29), codes_of(1, 29, 30)[0])


def test_filling_continues_where_it_stopped(tmp_path: Path) -> None:
    with create(tmp_path / "codes") as cache:
        assert list(cache.missing()) == [(0, 0, 30), (1, 0, 30)]
        cache.write(0, 0, codes_of(0, 0, 10))
        cache.write(0, 20, codes_of(0, 20, 25))
        cache.flush()
        assert cache.progress == (15, 60)
        assert not cache.is_complete
    with create(tmp_path / "codes") as cache:
        assert list(cache.missing()) == [(0, 10, 20), (0, 25, 30), (1, 0, 30)]
    with pytest.raises(ValueError, match="incomplete, 15 of 60; mpm tokenize CONFIG continues"):
        CodeCache.open(tmp_path / "codes", fingerprint=FINGERPRINT)
    fill(create(tmp_path / "codes"))
    cache = CodeCache.open(tmp_path / "codes", fingerprint=FINGERPRINT)
    np.testing.assert_array_equal(cache.read(0, 12), codes_of(0, 12, 13)[0])
    np.testing.assert_array_equal(cache.read(0, 22), codes_of(0, 22, 23)[0])


KILLED = """
import sys
from tests.data.test_codes import codes_of, create
cache = create(sys.argv[1])
cache.write(0, 0, codes_of(0, 0, 10))
cache.flush()
cache.write(0, 10, codes_of(0, 10, 20))
print("written", flush=True)
sys.stdin.read()
"""


def test_killed_process_leaves_what_it_marked(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", KILLED, tmp_path / "codes"]
    with subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        with pytest.raises(BlockingIOError, match=r"another process is filling .*codes"):
            create(tmp_path / "codes")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with create(tmp_path / "codes") as cache:  # its lock is gone with it
        assert list(cache.missing()) == [(0, 10, 30), (1, 0, 30)]


def test_codes_are_on_the_disk_before_they_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = create(tmp_path / "codes")
    events = []
    write, sync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *words: (events.append(len(words[1])), write(*words))[1])
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), sync(descriptor))[1])
    cache.write(0, 0, codes_of(0, 0, 10))
    cache.write(1, 5, codes_of(1, 5, 10))
    assert events == [120, 60]
    cache.flush()
    assert events[2:] == ["sync", 10, 5, "sync"]
    cache.close()


def test_marks_do_not_wait_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(tmp_path / "codes") as cache:
        cache.write(0, 0, codes_of(0, 0, 10))
        assert cache.progress == (0, 60)
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        cache.write(0, 10, codes_of(0, 10, 11))
        assert cache.progress == (11, 60)


@pytest.mark.parametrize("left", ["nothing", "zeros"])
def test_creation_that_was_killed_is_repeated(tmp_path: Path, left: str) -> None:
    (tmp_path / "codes").write_bytes(b"" if left == "nothing" else bytes(20_000))
    fill(create(tmp_path / "codes"))
    assert CodeCache.open(tmp_path / "codes", fingerprint=FINGERPRINT).is_complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "with seed 0, not 3"),
        ({"tokenizer": {"sha256": "77", "of": "runs/b"}}, "with the tokenizer runs/a, not runs/b"),
        ({"tokenizer": {"sha256": "77", "of": "runs/a"}}, "before the tokenizer runs/a changed"),
        (
            {"data": {"crop_scale": (0.1, 1.0), "flip": True}},
            "with data.crop_scale [0.2, 1.0], not [0.1, 1.0]",
        ),
        ({"data": {"crop_scale": (0.2, 1.0)}}, "with data.flip true, not null"),
    ],
)
def test_codes_of_something_else_are_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    fill(create(tmp_path / "codes"))
    for attempt in (create, CodeCache.open):
        with pytest.raises(ValueError, match="was filled") as caught:
            attempt(tmp_path / "codes", fingerprint=FINGERPRINT | change)
        assert str(caught.value) == (
            f"objective.target.cache {tmp_path / 'codes'} was filled {message}; give another file, or remove "
            "this one, and run mpm tokenize CONFIG"
        )


def test_a_tokenizer_that_was_moved_is_the_same(tmp_path: Path) -> None:
    fill(create(tmp_path / "codes"))
    moved = FINGERPRINT | {"tokenizer": {"sha256": "5f3a", "of": "runs/b"}}
    assert CodeCache.open(tmp_path / "codes", fingerprint=moved).is_complete


def test_codes_lie_in_a_file_in_a_folder_that_is_there(tmp_path: Path) -> None:
    for attempt in (create, CodeCache.open):
        with pytest.raises(ValueError, match=r"objective\.target\.cache .* is a folder; give a file, as"):
            attempt(tmp_path, fingerprint=FINGERPRINT)
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*/mistyped; make it, or"):
            attempt(tmp_path / "mistyped" / "codes", fingerprint=FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


def test_other_sizes_are_refused_by_name(tmp_path: Path) -> None:
    create(tmp_path / "codes").close()
    with pytest.raises(ValueError, match="with num_patches 6, not 8"):
        create(tmp_path / "codes", num_patches=8)


def test_missing_foreign_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "codes"
    with pytest.raises(FileNotFoundError, match=r"no cached codes at objective\.target\.cache .*; run mpm"):
        CodeCache.open(path, fingerprint=FINGERPRINT)
    for foreign in (b"seed: 0\n", b"\xff\xd8\xff" * 5000, b"mpm codes 1 00004096\n{]", b"mpm codes 1 x\n"):
        path.write_bytes(foreign)
        for attempt in (create, CodeCache.open):
            with pytest.raises(ValueError, match="codes is no file of codes"):
                attempt(path, fingerprint=FINGERPRINT)
        assert path.read_bytes() == foreign
    path.unlink()
    create(path).close()
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match="damaged, it has 5000 bytes and not"):
        CodeCache.open(path, fingerprint=FINGERPRINT)


def test_room_is_asked_for_before_anything_is_created(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the codes take .* GB, but .* GB are free in") as caught:
        create(tmp_path / "codes", images=10**13)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "codes").exists()
    with pytest.raises(ValueError, match="vocabulary of 65537 does not fit 16 bits"):
        create(tmp_path / "codes", vocab_size=65537)


def test_images_that_could_not_be_read_have_no_codes(tmp_path: Path) -> None:
    with create(tmp_path / "codes") as cache:
        readable = np.ones(30, bool)
        readable[[4, 5]] = False
        cache.write(0, 0, codes_of(0, 0, 30), readable=readable)
        cache.write(1, 0, codes_of(1, 0, 30))
    cache = CodeCache.open(tmp_path / "codes", fingerprint=FINGERPRINT)  # nothing more can be done
    assert cache.progress == (58, 60)
    with pytest.raises(ValueError, match=r"no codes for image 4: it could not be read .* mpm tokenize"):
        cache.read(0, 4)
    with create(tmp_path / "codes") as cache:
        assert list(cache.missing()) == [(0, 4, 6)]


def _reader(connection, cache: CodeCache) -> None:
    connection.send((cache.read(1, 8).tolist(), len(pickle.dumps(cache))))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_other_processes_read_it(tmp_path: Path, method: str) -> None:
    fill(create(tmp_path / "codes"))
    cache = CodeCache.open(tmp_path / "codes", fingerprint=FINGERPRINT)
    cache.read(0, 0)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_reader, args=(theirs, cache))
    process.start()
    read, pickled = ours.recv()
    process.join()
    assert read == codes_of(1, 8, 9)[0].tolist()
    assert pickled < 2000  # not the codes
