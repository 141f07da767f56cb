"""Configurations for runs inside a test: configs/debug.yaml with words, short, on one thread."""

from pathlib import Path

from mpm.config import FinetuneConfig, PretrainConfig, TokenizerConfig
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


def tokenizer_config(folder: Path, *words: str) -> TokenizerConfig:
    """A k-means tokenizer, or what the words make of it."""
    words = (*QUICK, "monitor.every=1000000", "monitor.images=0", f"run.output_dir={folder}", *words)
    return load(CONFIGS / "tokenizers" / "debug.yaml", words, TokenizerConfig).config


def codes_of(tokenizer: Path) -> list[str]:
    """Words for BEiT on a tokenizer, on a grid of 8x8."""
    return [
        f"objective.target={{kind: codes, tokenizer: {tokenizer}, min_live: 0.0}}",
        "objective.predictor={kind: linear}",
        "mask={kind: block, ratio: 0.4, min_area: 4}",
    ]


TOKENIZERS = {
    "kmeans": [],
    "dvae": [
        "objective={kind: dvae, codes: 16, layers: 2, hidden: 8, code_dim: 8}",
        "optim.lr=1e-2",
    ],
    "vqkd": [
        "objective={kind: vqkd, codes: 16, code_dim: 4, teacher: {kind: hog}}",
        "backbone={patch_size: 4, dim: 12, depth: 1, heads: 3}",
        "optim.lr=1e-2",
    ],
}
CLASS_PRETRAINING = [
    "objective.predictor={kind: class_pretraining, early_layer: 1, depth: 2}",
    "backbone.positions={table: none, bias: shared}",
    "backbone.drop_path=0.2",
]
SCRATCH = ["init=null", "backbone={variant: debug, positions: {table: sincos}, initialization: mae}"]
# a token for what a teacher says
DISTILLED = [
    "init=null",
    "backbone={patch_size: 8, dim: 16, depth: 2, heads: 2, distillation_token: true}",
    "readout={kind: token}",
    "distillation={kind: hard, teacher: {kind: timm, model: test_resnet, random: true}}",
]
HMLP, CONV = "backbone.stem={kind: hmlp, norm: %s}", "backbone.stem={kind: conv, norm: %s}"
SIMMIM = [
    "objective.predictor={kind: linear}",
    "objective.loss=l1",
    "mask={kind: random, unit: 2, ratio: 0.6}",
]
