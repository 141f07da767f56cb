"""What a process knows of the machine and of the others before torch is loaded.

`torchrun` tells it by the environment.
"""

import os
import time

__all__ = ["available_cores", "cores_of_a_process", "give_way", "is_first_process"]

_PATIENCE_S = 10.0


def is_first_process() -> bool:
    """Whether this is the process that talks."""
    return os.environ.get("RANK", "0") == "0"


def available_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_of_a_process() -> int:
    """This machine's cores, shared out to the processes of the run."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def give_way() -> None:
    """Let the process that says what is wrong end first; what starts processes ends this one then.

    torchrun ends all processes as soon as one has failed, also the one that was about to speak.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(_PATIENCE_S)
