"""`mpm tokenize`: the codes of all crops that a pretraining run will see, computed once."""

import os

import torch

from mpm import build
from mpm.commands.filling import LARGEST_BATCH, fill
from mpm.config import CodeTarget, PretrainConfig
from mpm.configfile import ConfigError
from mpm.data.codes import CODES, create_code_cache
from mpm.data.loading import ViewDataset
from mpm.data.rows import check_place
from mpm.data.substitution import Substituting
from mpm.masked_pretraining import code_fingerprint, code_target
from mpm.run import log_facts, started
from mpm.tokenization import read_tokenizer
from mpm.training.loop import StopRequest

__all__ = ["tokenize"]


def tokenize(config: PretrainConfig) -> str:
    """Fill `objective.target.cache`, or continue to; SIGTERM and SIGINT stop between two batches.

    Crops and codes are those of a run of this configuration without the cache, as long as it draws
    `objective.target.crops` crops of an image.

    Args:
        config: of the pretraining run.

    Returns: what was done, in a line.

    Raises:
        ConfigError: if the configuration names no cache, or this is one of several processes.
        FileNotFoundError: if there is no folder for the file, or no tokenizer.
        ValueError: if the file holds codes of something else, or the codebook has collapsed.
        OSError: if the disk is full or another process fills the file; what is done stays.
    """
    stated = config.objective.target
    if not isinstance(stated, CodeTarget):
        raise ConfigError(
            f"objective.target.kind is {stated.kind}, which needs no tokenizer; only codes can be cached"
        )
    if stated.cache is None:
        raise ConfigError(
            "objective.target.cache is not given; name the file: "
            "objective.target.cache=FILE objective.target.crops=10"
        )
    check_place(stated.cache, CODES)  # before all the work
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("mpm tokenize is one process; start it without torchrun")
    with started(config) as device, StopRequest() as stop:
        return _tokenize(config, stated, device=device, stop=stop)


def _tokenize(config: PretrainConfig, stated: CodeTarget, *, device: torch.device, stop: StopRequest) -> str:
    assert stated.cache is not None and stated.crops is not None
    data = config.data
    images = build.source(data, image_size=data.image_size, channels=data.channels, labelled=False)
    tokenizer = read_tokenizer(stated.tokenizer)
    target, facts = code_target(config, tokenizer, Substituting(images), device=device)
    cache = create_code_cache(
        stated.cache,
        fingerprint=code_fingerprint(config, target, images),
        crops=stated.crops,
        images=len(images),
        num_patches=config.num_patches,
        vocab_size=tokenizer.vocab_size,
    )
    with cache:
        done, total = cache.progress
        size = cache.path.stat().st_size
        log_facts(
            {
                "images": f"{len(images):,}, {stated.crops} crop(s) of each"
                + (f"; {done:,} of {total:,} are done" if done else ""),
                **facts,
                "device": f"{device}, {torch.get_num_threads()} thread(s)",
                "writes to": f"{cache.path}, {size / 1e6:.1f} MB",
            }
        )
        # the tokenizer's view alone: the network's image and the mask change nothing in it
        view = build.pretrain_view(config, tokenizer).target_only()
        filled = fill(
            cache,
            ViewDataset(images, view, seed=config.seed, crops=stated.crops),
            target.codes,
            batch_size=config.run.micro_batch or min(config.optim.batch_size, LARGEST_BATCH),
            workers=config.run.workers,
            device=device,
            stop=stop,
        )
        if not filled.is_complete:
            return filled.stopped
        return (
            f"wrote {cache.path}: the codes of {filled.done:,} crops of {config.num_patches} patches"
            f"{filled.left}"
        )
