"""Small copies of a folder of images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import shrink_images

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes of 6 images."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(256, size=(9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "source" / name / f"{index}.png")
    return tmp_path / "source"


def shrink(source: Path, target: Path, *words: str) -> str:
    """What it tells."""
    command = [sys.executable, "scripts/shrink_images.py", source, target, "--side", "4", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


def test_what_a_killed_run_left_is_not_mixed_in(source: Path, tmp_path: Path) -> None:
    shrink(source, tmp_path / "whole")
    shrink(source, tmp_path / "again.partial")  # as a run that was killed
    Image.new("RGB", (4, 4)).save(tmp_path / "again.partial" / "train" / "cat" / "old.png")
    shrink(source, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    assert len(files(tmp_path / "again")) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "again"}
    assert "nothing to do" in shrink(source, tmp_path / "again")


@pytest.mark.parametrize(("share", "part"), [("0", "train"), ("1", "test")])
def test_a_part_without_images_is_not_there(source: Path, tmp_path: Path, share: str, part: str) -> None:
    shrink(source, tmp_path / "target", "--test-share", share)
    assert [path.name for path in (tmp_path / "target").iterdir()] == [part]
    assert "nothing to do" in shrink(source, tmp_path / "target", "--test-share", share)


def test_large_images_are_taken_without_a_word(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns above its limit, and refuses above twice as many pixels. A warning is an error here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # each has 108
    monkeypatch.setattr(sys, "argv", ["shrink_images.py", str(source), str(tmp_path / "target")])
    assert shrink_images.main() == 0
    assert len(files(tmp_path / "target")) == 12
