import gzip
import socket
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from scripts import fetch_fashion_mnist
from scripts.fetch_fashion_mnist import NotFetched, broken_files, fetch

CONTENTS = {name: name.encode() for name in fetch_fashion_mnist.SHA256}
UNPACKED = "usr/share/datasets/fashion-mnist"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """No network, four small files as the data, and stand-ins for apt-get and dpkg-deb that bring them."""
    sums = {name: sha256(content).hexdigest() for name, content in CONTENTS.items()}
    monkeypatch.setattr(fetch_fashion_mnist, "SHA256", sums)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    packed, programs = tmp_path / "packed", tmp_path / "bin"
    packed.mkdir()
    programs.mkdir()
    for name, content in CONTENTS.items():
        (packed / f"{name}.gz").write_bytes(gzip.compress(content))
    # Without root, apt-get can keep its state and its cache only in the folder it is called in.
    own_state = 'case "$*" in *Dir::State=$PWD/*Dir::Cache=$PWD/*) ;; *) exit 1;; esac'
    (programs / "apt-get").write_text(f"#!/bin/sh\n{own_state}\n: > it.deb\n")
    (programs / "dpkg-deb").write_text(f"#!/bin/sh\nmkdir -p $3/{UNPACKED} && cp {packed}/* $3/{UNPACKED}\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    yield programs
    socket.setdefaulttimeout(None)


def test_the_package_steps_in_and_whole_files_are_left_alone(tmp_path: Path, programs: Path) -> None:
    raw = tmp_path / "data/FashionMNIST/raw"
    fetch(tmp_path / "data")
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == CONTENTS
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["FashionMNIST"]
    (programs / "dpkg-deb").unlink()  # nothing more can be fetched
    fetch(tmp_path / "data")


def test_a_damaged_file_is_fetched_again(tmp_path: Path, programs: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    fetch(tmp_path)
    name, content = next(iter(CONTENTS.items()))
    (raw / name).write_bytes(content[:-1])
    assert broken_files(raw) == [name]
    fetch(tmp_path)
    assert not broken_files(raw)


def test_the_error_names_both_ways_with_their_reasons(tmp_path: Path, programs: Path) -> None:
    (programs / "apt-get").write_text("#!/bin/sh\necho 'E: no such package' >&2; exit 100\n")
    both = r"torchvision's download \(.+\) nor by the Debian package dataset-.+ \(E: no such package\)"
    with pytest.raises(NotFetched, match=both):
        fetch(tmp_path)
