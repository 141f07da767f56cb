"""Every test starts from the same seeds and one thread, so that numbers do not depend on order or machine."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command_line import CONFIGS, CommandLine, command_line, finished_run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  timm's Mixup draws from the global generator
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """Command lines, each in a process of its own."""
    with command_line(tmp_path_factory.mktemp("commands")) as run:
        yield run


@pytest.fixture(scope="session")
def pretrained(commands: CommandLine) -> Path:
    """A finished run of pretraining on generated images, checkpoints at steps 2 and 4."""
    return finished_run(commands, "pretrain.py", CONFIGS / "debug.yaml", "monitor.images=0")


@pytest.fixture(scope="session")
def finetuned(commands: CommandLine, pretrained: Path) -> Path:
    """A finished run of fine-tuning, from the pretrained one."""
    config = CONFIGS / "finetune" / "debug.yaml"
    return finished_run(
        commands, "finetune.py", config, f"init.checkpoint={pretrained}", "data.test.count=30"
    )
