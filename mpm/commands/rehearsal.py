"""`--dry-run`: everything a run needs, on two steps, with nothing left behind."""

import logging
import os
import shutil
from collections.abc import Callable

from mpm import configfile
from mpm.config import FinetuneConfig, PretrainConfig, TokenizerConfig
from mpm.run import refusal

__all__ = ["rehearse"]


def rehearse(train: Callable[..., object], config: PretrainConfig | TokenizerConfig | FinetuneConfig) -> None:
    """Build, take a step, save; build again, load, take another step, save; then remove it all.

    Saves beside `run.output_dir`, so that its disk is tried too. Evaluation is left out.

    Args:
        train: `pretrain` or `finetune`.
        config: of the run.

    Raises:
        ValueError: also where the run itself would refuse its folder.
    """
    folder = config.run.output_dir
    existing = next(above for above in folder.absolute().parents if above.is_dir())
    # one folder for all processes of a torchrun, another for every other command
    rehearsal = existing / f".{folder.name}.dry-run-{os.environ.get('MASTER_PORT', os.getpid())}"
    run = config.run.model_copy(update={"output_dir": rehearsal, "resume": "auto"})
    trial = config.model_copy(update={"run": run})
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        train(trial, stop_after=1)
        logging.getLogger("mpm").setLevel(logging.WARNING)  # the facts have been told
        train(trial, stop_after=2)
        if is_main:
            resolved, _ = configfile.load(rehearsal / "config.yaml", [], type(config))
            if reason := refusal(resolved.model_copy(update={"run": config.run})):
                raise ValueError(reason)
    finally:
        if is_main:
            shutil.rmtree(rehearsal, ignore_errors=True)
