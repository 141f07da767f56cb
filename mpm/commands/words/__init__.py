"""The words of the `mpm` command line and their help; nothing here imports torch."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mpm.commands.words.kinds import natural, share, sides
from mpm.commands.words.looking import LOOKING
from mpm.commands.words.training import TRAINING
from mpm.commands.words.weights import WEIGHTS
from mpm.launch import give_way, is_first_process

__all__ = ["parse"]

_USAGE = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        told = f"mpm: {message}; see {self.prog} --help\n"
        if not is_first_process():
            give_way()
            self.exit(_USAGE)
        self.exit(_USAGE, told)


def parse(words: list[str]) -> argparse.Namespace:
    """Options of a command; its name is `command`. A mistake ends the process with status 2 and one line."""
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    parser.prog = f"mpm {options.command}"  # whose help is to be read from here on
    # argparse takes a list only where it stands together, but options may stand between its words
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "words")):
        parser.error(f"{' '.join(rest)} means nothing here")
    try:
        options.words = getattr(options, "words", []) + [options.word(word) for word in rest]
        for name, kind in _lists().items():
            if isinstance(given := getattr(options, name, None), list) and given:
                setattr(options, name, _numbers(given, kind, options))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return options


def _lists() -> dict[str, Callable[[str], Any]]:
    """Options that take several numbers, and what reads one."""
    return {
        "seeds": natural,
        "fractions": share,
        "labels": natural,
        "image_sizes": sides,
        "crops": share,
    }


def _numbers(given: list[str], kind: Callable[[str], Any], options: argparse.Namespace) -> list[Any]:
    """The numbers of a list that has also taken the words after it, which join the others."""
    words = [word for word in given if "=" in word or (Path(word).expanduser() / "config.yaml").is_file()]
    numbers = [kind(word) for word in given if word not in words]
    if not numbers:
        raise argparse.ArgumentTypeError(f"no number stands before {given[0]}")
    options.words += [options.word(word) for word in words]
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpm",
        description="Masked-patch pretraining of vision transformers, fine-tuning, and what comes after.",
        epilog="`mpm COMMAND --help` tells more, with an example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for add in (*TRAINING, *LOOKING, *WEIGHTS):
        add(commands)
    return parser
