"""What a word of the command line may be: readers for argparse.

Each raises `argparse.ArgumentTypeError` with what to do.
"""

import argparse
from pathlib import Path


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 on")
    return int(text)


def share(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; use a number above 0, at most 1, as 0.875")
    return value


def sides(text: str) -> tuple[int, int]:
    """Height and width, of `S` or `HxW`."""
    height, _, width = text.partition("x")
    return natural(height), natural(width or height)


def existing(text: str) -> Path:
    """A path of something."""
    if not (path := Path(text).expanduser()).exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def folder(text: str) -> Path:
    """A path of a folder."""
    if not (path := Path(text).expanduser()).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder; give a folder of images")
    return path


def utf8_path(text: str) -> Path:
    """One that safetensors reads, and that a model card can tell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"the name {text} is not UTF-8; use another, or a link") from None
    return Path(text).expanduser()


def checkpoint_folder(text: str) -> Path:
    """A path of a checkpoint, or of a run."""
    if not ((path := utf8_path(text)) / "config.yaml").is_file():
        raise argparse.ArgumentTypeError(
            f"no checkpoint in {text}; give a run's folder or a checkpoints/step_* in it"
        )
    return path


def checkpoint_or_override(text: str) -> Path | str:
    """The path of a checkpoint, or `key=value`."""
    return text if "=" in text and not Path(text).exists() else checkpoint_folder(text)


def output(text: str) -> Path:
    """A path of a file that can be written."""
    path = utf8_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist; make it first")
    return path


def picture(text: str) -> Path:
    """A path of a picture that can be written."""
    path = output(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"pictures are PNG; give {text} the ending .png")
    return path
