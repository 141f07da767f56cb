"""What several commands take."""

import argparse
from typing import Any

from mpm.commands.words.kinds import checkpoint_folder, existing, natural
from mpm.launch import available_cores


def add(
    commands: Any,
    name: str,
    summary: str,
    *,
    more: str = "",
    example: str,
) -> argparse.ArgumentParser:
    """A command with its help.

    Args:
        commands: of the parser.
        name: of the command.
        summary: one line, for the list of commands and its own help.
        more: lines below it.
        example: a whole command line.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n{more}".strip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=name, word=str)
    return command


def add_overrides(
    command: argparse.ArgumentParser, what: str = "replaces a value of the file, as optim.lr=3e-4"
) -> None:
    """`words`: values that replace those of a file."""
    command.add_argument("words", nargs="*", metavar="key=value", help=what)


def add_checkpoint(command: argparse.ArgumentParser, kind: str) -> None:
    """`checkpoint`, whose kind is told."""
    text = f"{kind}: a run's folder (its best, else its newest), a step_* in it, or a folder of mpm import"
    command.add_argument("checkpoint", type=checkpoint_folder, metavar="CHECKPOINT", help=text)


def add_images(command: argparse.ArgumentParser) -> None:
    """`words`: image files and folders."""
    command.set_defaults(word=existing)
    command.add_argument(
        "words", nargs="+", type=existing, metavar="IMAGES", help="image files, and folders of them"
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """`--device`."""
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def add_workers(command: argparse.ArgumentParser) -> None:
    """`--workers`."""
    most = min(4, available_cores())
    text = f"processes that read images (default {most})"
    command.add_argument("--workers", type=natural, default=most, metavar="N", help=text)
