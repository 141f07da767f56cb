"""The schedule that a configuration makes: durations, and what they are stated in."""

import numpy as np
import pytest

from mpm import build
from mpm.config import FinetuneConfig, PretrainConfig, TokenizerConfig
from mpm.configfile import load
from tests.test_build import ROOT

CONFIGS = {
    "debug": PretrainConfig,
    "tokenizers/dvae_in1k": TokenizerConfig,
    "finetune/debug": FinetuneConfig,
}
SHAPES = (
    "{kind: cosine, start: 1.0e-6}",
    "{kind: cosine, start: 1.0e-6, over: run}",
    "{kind: constant, start: 1.0e-6}",
    "{kind: multistep, start: 1.0e-6, milestones: [3]}",
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_warmup_steps_count_where_there_are_no_warmup_epochs(name: str, shape: str) -> None:
    """BEiT's `cosine_scheduler` warms up only where `warmup_epochs` is positive, and else fails."""
    words = ["optim.epochs=4", "optim.batch_size=10", "optim.lr=1e-3", f"optim.schedule={shape}"]
    words += ["optim.warmup_epochs=0", "optim.warmup_steps=7", "run.micro_batch=null"]
    optim = load(ROOT / f"{name}.yaml", words, CONFIGS[name]).config.optim
    assert (optim.warmup_epochs, optim.warmup_steps) == (0, 7)
    schedule = build.Schedule(optim, 105)
    assert (schedule.steps, schedule.per_epoch) == (40, 10)
    rates = [schedule.lr_at(step) for step in range(8)]
    np.testing.assert_allclose(rates[:7], np.linspace(1e-6, 1e-3, 7), rtol=1e-12)
    assert rates[7] > rates[5]


def test_warmup_epochs_are_as_many_steps() -> None:
    words = ["optim.epochs=4", "optim.batch_size=10", "optim.lr=1e-3", "optim.schedule.kind=constant"]
    rates = []
    for warmup in ("optim.warmup_epochs=1.5", "optim.warmup_steps=15"):
        optim = load(ROOT / "finetune" / "debug.yaml", [*words, warmup], FinetuneConfig).config.optim
        schedule = build.Schedule(optim, 105)
        rates.append([schedule.lr_at(step) for step in range(schedule.steps)])
    assert rates[0] == rates[1]
    assert rates[0][13] < rates[0][14] == 1e-3
