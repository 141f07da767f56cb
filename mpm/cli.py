"""The command line: `mpm pretrain` and the like, and what pretrain.py and finetune.py call.

Words and configurations are checked before torch is imported, so their mistakes are told at once.
"""

import errno
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from mpm import configfile
from mpm.commands.dispatch import COMMANDS
from mpm.commands.words import parse
from mpm.launch import give_way, is_first_process

__all__ = ["main"]

_USAGE = 2  # exit status of a user's mistake
_FAILED = 1  # of a run that could not go on
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def main(arguments: Sequence[str] | None = None, *, command: str | None = None) -> int:
    """Run a command; mistakes of users are told in one line on stderr, with exit status 2.

    Args:
        arguments: words of the command line; None: this process's.
        command: where the program itself is one command (pretrain.py).

    Returns: the exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse([command, *words] if command else words)
    _log_to_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: any path can be told
    # GNU OpenMP's threads spin for milliseconds while they wait, on cores that loader workers need; let them
    # sleep after some microseconds (docs/evidence.md). Read when torch is loaded; a user's own setting stands
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        COMMANDS[options.command](options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mpm config FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except configfile.ConfigError as error:  # the same on every process
        if is_first_process():
            return _complain(error, _USAGE)
        give_way()
        return _USAGE
    except Exception as error:
        if not _is_foreseen(error):
            raise
        return _complain(error, _USAGE if isinstance(error, _MISTAKES) else _FAILED)
    return 0


def _is_foreseen(error: Exception) -> bool:
    """Whether an error says what to do: what mpm or the file system raised. The rest is our bug."""
    if isinstance(error, OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_ours = frame.f_globals["__name__"].startswith("mpm.")
    return is_ours and isinstance(error, ValueError | FloatingPointError)


def _complain(error: Exception, status: int) -> int:
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno in _NO_SPACE:
            message += "; free space and start again: a run continues from its newest checkpoint"
    for line in message.splitlines():
        print(f"mpm: {line}", file=sys.stderr)
    return status


def _log_to_stderr() -> None:
    """Log what rank 0 says; the others only their warnings."""
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # a run's facts tell it
    logger = logging.getLogger("mpm")
    logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for handler in logging.root.handlers:  # the hub's own handler has told it
        handler.addFilter(_is_not_of_the_hub)


def _is_not_of_the_hub(record: logging.LogRecord) -> bool:
    return not record.name.startswith("huggingface_hub")
