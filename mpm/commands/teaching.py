"""`mpm teach`: what a teacher says of all crops that a fine-tuning run will see, computed once."""

import os

import torch

from mpm import build
from mpm.commands.filling import LARGEST_BATCH, fill
from mpm.config import FinetuneConfig
from mpm.configfile import ConfigError
from mpm.data.answers import ANSWERS, create_answer_cache
from mpm.data.loading import ViewDataset
from mpm.data.rows import check_place
from mpm.distillation import answer_fingerprint, read_teacher
from mpm.inheritance import inherit, with_statistics
from mpm.labelled import open_labelled
from mpm.run import log_facts, started
from mpm.training.loop import StopRequest
from mpm.trunk import read_start

__all__ = ["teach"]


def teach(config: FinetuneConfig) -> str:
    """Fill `distillation.cache`, or continue to; SIGTERM and SIGINT stop between two batches.

    Args:
        config: of the fine-tuning run.

    Returns: what was done, in a line.

    Raises:
        ConfigError: if the configuration names no cache, or this is one of several processes.
        ValueError: if the teacher does not fit, or the file holds answers to something else.
        OSError: if the disk is full or another process fills the file; what is done stays.
    """
    stated = config.distillation
    if stated is None:
        raise ConfigError("distillation is null: there is no teacher to ask; give it a section in the file")
    if stated.cache is None:
        raise ConfigError(
            "distillation.cache is not given; name the file: distillation.cache=FILE distillation.crops=10"
        )
    check_place(stated.cache, ANSWERS)  # before all the work
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("mpm teach is one process; start it without torchrun")
    with started(config) as device, StopRequest() as stop:
        return _teach(config, device=device, stop=stop)


def _teach(config: FinetuneConfig, *, device: torch.device, stop: StopRequest) -> str:
    trunk = read_start(config.init)
    config = inherit(config, trunk)
    data, stated = open_labelled(config), config.distillation
    config, _ = with_statistics(config, data.train)
    taught = read_teacher(config, data.classes)
    assert taught is not None and stated is not None and config.data.image_size is not None
    assert stated.cache is not None and stated.crops is not None
    cache = create_answer_cache(
        stated.cache,
        fingerprint=answer_fingerprint(config, taught, data.train),
        crops=stated.crops,
        images=len(data.train),
        num_classes=len(data.classes),
    )
    with cache:
        done, total = cache.progress
        log_facts(
            {
                "images": f"{len(data.train):,}, {stated.crops} crop(s) of each"
                + (f"; {done:,} of {total:,} are done" if done else ""),
                "teacher": taught.told,
                "device": f"{device}, {torch.get_num_threads()} thread(s)",
                "writes to": f"{cache.path}, {cache.path.stat().st_size / 1e6:.1f} MB",
            }
        )
        filled = fill(
            cache,
            ViewDataset(
                data.train,
                build.train_view(config.data, config.data.image_size),
                seed=config.seed,
                crops=stated.crops,
            ),
            taught.teacher.to(device),
            batch_size=config.run.micro_batch or min(config.optim.batch_size, LARGEST_BATCH),
            workers=config.run.workers,
            device=device,
            stop=stop,
        )
        if not filled.is_complete:
            return filled.stopped
        return f"wrote {cache.path}: the teacher's answers to {filled.done:,} crops{filled.left}"
