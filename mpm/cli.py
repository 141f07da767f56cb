"""The command line: `mpm pretrain` and the like, and what pretrain.py and finetune.py call.

Configurations are read before torch is imported, so their errors come at once.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from mpm import configfile
from mpm.config import FinetuneConfig, PretrainConfig

__all__ = ["main"]

_USAGE = 2  # exit status of a user's error


def main(arguments: Sequence[str] | None = None, *, command: str | None = None) -> int:
    """Run a command; errors of users are one line on stderr and exit status 2.

    Args:
        arguments: words of the command line; None: this process's.
        command: where the program itself is one command (pretrain.py).

    Returns: the exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args([command, *words] if command else words)
    _log_to_stderr()
    try:
        options.run(options)
    except (ValueError, FileNotFoundError) as error:
        return _complain(error, _USAGE)
    except (FloatingPointError, OSError) as error:
        return _complain(error, 1)
    return 0


def _complain(error: Exception, status: int) -> int:
    print(f"mpm: {error}", file=sys.stderr)
    return status


def _log_to_stderr() -> None:
    """Log what rank 0 says; the others only their warnings."""
    logging.captureWarnings(True)
    logger = logging.getLogger("mpm")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpm", description="Masked-patch pretraining of vision transformers."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, summary in (
        ("pretrain", _pretrain, "pretrain on unlabelled images"),
        ("finetune", _finetune, "train a classifier, from a checkpoint or from scratch"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        _add_config(command)
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="build everything, take two steps, save and load, tell the facts, and leave nothing behind",
        )
        command.set_defaults(run=run)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", required=True, metavar="FILE", help="a YAML file, such as those in configs/"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a value of the file, as optim.lr=3e-4"
    )


def _pretrain(options: argparse.Namespace) -> None:
    config = configfile.load(options.config, options.overrides, PretrainConfig).config
    from mpm.pretraining import pretrain

    _train(pretrain, config, dry_run=options.dry_run)


def _finetune(options: argparse.Namespace) -> None:
    config = configfile.load(options.config, options.overrides, FinetuneConfig).config
    from mpm.finetuning import finetune

    _train(finetune, config, dry_run=options.dry_run)


def _train(train: Any, config: PretrainConfig | FinetuneConfig, *, dry_run: bool) -> None:
    if not dry_run:
        train(config)
        return
    with tempfile.TemporaryDirectory() as folder:
        run = config.run.model_copy(update={"output_dir": folder, "save_every": 1})
        dry = config.model_copy(update={"run": run})
        train(dry, stop_after=1)
        train(dry, stop_after=2)  # continues from what the first saved
