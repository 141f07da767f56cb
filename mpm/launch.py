"""What a process knows of the others before torch is loaded; `torchrun` tells it by the environment."""

import os
import time

__all__ = ["give_way", "is_first_process"]

_PATIENCE_S = 10.0


def is_first_process() -> bool:
    """Whether this is the process that talks."""
    return os.environ.get("RANK", "0") == "0"


def give_way() -> None:
    """Let the process that says what is wrong end first; what starts processes ends this one then.

    torchrun ends all processes as soon as one has failed, also the one that was about to speak.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(_PATIENCE_S)
