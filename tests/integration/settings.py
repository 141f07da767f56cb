"""Configurations for runs inside a test: configs/debug.yaml with words, short, on one thread."""

from pathlib import Path

from mpm.config import FinetuneConfig, PretrainConfig
from mpm.configfile import load

CONFIGS = Path(__file__).parents[2] / "configs"
# The allocator is the whole process's, the tests' too.
QUICK = [
    "run.log_every=1",
    "run.save_every=1000",
    "run.threads=1",
    "run.tune_allocator=false",
    "run.compile=false",
]


def pretrain_config(folder: Path, *words: str) -> PretrainConfig:
    """Without anything to watch."""
    quiet = ["monitor.train=null", "monitor.test=null", "monitor.every=1000000", "monitor.images=0"]
    words = (*QUICK, *quiet, f"run.output_dir={folder}", *words)
    return load(CONFIGS / "debug.yaml", words, PretrainConfig).config


def finetune_config(folder: Path, *words: str) -> FinetuneConfig:
    """From the checkpoint that the words name, or from scratch with `SCRATCH`."""
    words = (*QUICK, f"run.output_dir={folder}", *words)
    return load(CONFIGS / "finetune" / "debug.yaml", words, FinetuneConfig).config


SCRATCH = ["init=null", "backbone={variant: debug, positions: {table: sincos}, initialization: mae}"]
HMLP, CONV = "backbone.stem={kind: hmlp, norm: %s}", "backbone.stem={kind: conv, norm: %s}"
SIMMIM = [
    "objective.predictor={kind: linear}",
    "objective.loss=l1",
    "mask={kind: random, unit: 2, ratio: 0.6}",
]
