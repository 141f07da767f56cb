"""What the headers of the files under configs/ tell to type: commands, and words that change a recipe."""

import re
import shlex

import pytest

from mpm import build
from mpm.config import FinetuneConfig
from mpm.configfile import load
from tests.test_build import (
    FINETUNE,
    NAMES,
    PRETRAIN,
    ROOT,
    classifier,
    fine_tuning_config,
    masked_prediction,
    pretrain_config,
)
from tests.test_configs import model_of

# key=value, where what stands between quotes is one value; not an option such as --nproc_per_node=8
WORD = r"(?<![\w./-])[a-z_]+(?:\.[a-z_]+)*=(?:'[^']*'|[^\s,;()']+)"
IMAGES = 1_281_167


def header(name: str) -> str:
    lines = (ROOT / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def words_of(name: str) -> list[tuple[str, ...]]:
    """Each run of words, as a shell gives them to the script."""
    runs = re.findall(rf"{WORD}(?:\s+{WORD})*", header(name))
    return list(dict.fromkeys(tuple(shlex.split(run.rstrip(".:"))) for run in runs))


TOLD = [(name, words) for name in NAMES for words in words_of(name)]
IDS = [f"{name}: {' '.join(words)}" for name, words in TOLD]
QUICK_TO_BUILD = ("finetune/deit_in1k",)


def test_sizes_without_a_file_of_their_own_are_told() -> None:
    for told in (
        ("finetune/inat18", "data.train.annotations=train2019.json"),
        ("finetune/cait_384_in1k", "data.image_size=448"),
        ("finetune/vitl_mae_in1k", "init.checkpoint=runs/vith_mae"),
        ("finetune/deit3_in1k", "backbone.variant=deit3_s"),
        ("finetune/deit3_in1k", "backbone.variant=deit3_l"),
        ("finetune/deit3_in1k", "backbone.variant=deit3_h"),
        ("finetune/cifar10", "optim.schedule={kind: constant, start: 1.0e-6}"),
    ):
        assert any(name == told[0] and told[1] in words for name, words in TOLD), told


@pytest.mark.parametrize(("name", "words"), TOLD, ids=IDS)
def test_words_of_a_header_are_understood(name: str, words: tuple[str, ...]) -> None:
    path = ROOT / f"{name}.yaml"
    load(path, words, model_of(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param(name, words, id=label, marks=() if name in QUICK_TO_BUILD else pytest.mark.slow)
        for (name, words), label in zip(TOLD, IDS, strict=True)
        if name in FINETUNE
    ],
)
def test_words_of_a_header_build_and_run(name: str, words: tuple[str, ...]) -> None:
    """On meta, from what the header's checkpoint would hold; with a schedule."""
    network, images = classifier(name, 7, *words)
    assert network(images).shape == (2, network.readout.num_vectors, 7)
    optim = fine_tuning_config(name, *words).optim
    schedule = build.Schedule(optim, IMAGES)
    rates = [schedule.lr_at(step) for step in (0, schedule.steps // 2, schedule.steps - 1)]
    assert 0 <= min(rates) <= max(rates) <= optim.lr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [row for row in TOLD if row[0] in PRETRAIN], ids=str)
def test_words_of_a_header_make_an_objective(name: str, words: tuple[str, ...]) -> None:
    masked_prediction(pretrain_config(name, *words))


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_a_header_name_files_of_their_script(name: str) -> None:
    commands = re.findall(r"(pretrain|finetune)\.py --config configs/(\S+\.yaml)", header(name))
    assert commands
    for script, file in commands:
        assert (ROOT / file).is_file()
        assert (model_of(ROOT / file) is FinetuneConfig) == (script == "finetune")
