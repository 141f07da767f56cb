"""Several runs by one command: which they are, what they end with, and how they go on after a stop."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mpm import cli
from mpm.commands.seeds import members, table
from mpm.commands.words import parse
from mpm.configfile import ConfigError
from mpm.finetuning import finetune
from mpm.training.loop import StopRequest
from tests.integration.runs import assert_identical, everything_saved, last_step
from tests.integration.settings import CONFIGS, QUICK, SCRATCH, finetune_config

FILE = CONFIGS / "finetune" / "debug.yaml"
SHORT = [*SCRATCH, "optim.steps=3", "optim.warmup_steps=0", "data.train.count=64", "data.test.count=24"]
ROWS = [
    {"fraction": 0.1, "seed": 0, "train_images": 10, "top1": 0.5},
    {"fraction": 0.1, "seed": 1, "train_images": 10, "top1": 0.6},
    {"fraction": 0.1, "seed": 2, "train_images": 10, "top1": 0.65},
    {"fraction": 1.0, "seed": 0, "train_images": 100, "top1": 0.8},
]


@pytest.mark.parametrize(
    "words",
    [
        ["a=1", "--seeds", "0", "2", "b=2", "--fractions", "0.1", "c=3"],
        ["--seeds", "0", "2", "--fractions", "0.1", "--", "a=1", "b=2", "c=3"],
    ],
)
def test_words_may_stand_between_lists(words: list[str]) -> None:
    options = parse(["finetune", "--config", "x.yaml", *words])
    assert (options.seeds, options.fractions) == ([0, 2], [0.1])
    assert options.words == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize(
    "words",
    [["--seeds", "a=1"], ["--seeds", "0.5"], ["--seeds", "-1"], ["--fractions", "0"], ["--fractions", "2"]],
)
def test_what_is_no_number_is_refused(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["finetune", "--config", "x.yaml", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("mpm: ")


def test_members_differ_in_seed_labels_and_folder() -> None:
    runs = members(FILE, ["run.output_dir=out"], seeds=[3, 4], fractions=[0.5, 1.0])
    facts = [
        (
            r.fraction,
            r.config.seed,
            r.config.labels.fraction,
            r.config.labels.seed,
            str(r.config.run.output_dir),
        )
        for r in runs
    ]
    assert facts == [
        (0.5, 3, 0.5, 3, "out/labels_0.5/seed_3"),
        (0.5, 4, 0.5, 4, "out/labels_0.5/seed_4"),
        (1.0, 3, 1.0, 3, "out/labels_1/seed_3"),
        (1.0, 4, 1.0, 4, "out/labels_1/seed_4"),
    ]


@pytest.mark.parametrize(
    ("words", "draws"),
    [([], [None, None]), (["labels.count=9"], [7, 8]), (["labels={count: 9, seed: 1}"], [1, 1])],
)
def test_the_draw_of_labels_follows_the_seed_unless_it_is_stated(
    words: list[str], draws: list[int | None]
) -> None:
    runs = members(FILE, words, seeds=[7, 8], fractions=[])
    assert [run.config.labels and run.config.labels.seed for run in runs] == draws
    assert [run.config.seed for run in runs] == [7, 8]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["seed=1"], {"seeds": [0]}, "seed is given as a word and varied by --seeds"),
        (
            ["labels.count=5"],
            {"fractions": [0.1]},
            "labels.count is given as a word and varied by --fractions",
        ),
        (["data.test=null"], {"seeds": [0]}, "data.test is null"),
        ([], {"seeds": [0, 0]}, "given twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        members(FILE, words, **({"seeds": [], "fractions": []} | options))


def test_the_table_has_mean_and_deviation_of_a_sample() -> None:
    _, first, second = table(ROWS).splitlines()
    scores = [50, 60, 65]
    assert f"{np.mean(scores):.2f}%" in first
    assert f"{np.std(scores, ddof=1):.2f}%" in first
    assert first.startswith("0.1 ")
    assert first.endswith("0: 50.00%, 1: 60.00%, 2: 65.00%")
    assert second.split() == ["1", "100", "80.00%", "-", "0:", "80.00%"]


@pytest.mark.slow
def test_each_run_is_the_one_that_its_seed_gives_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*QUICK, *SHORT, f"run.output_dir={tmp_path / 'all'}", "labels.fraction=0.5"]
    assert cli.main(["finetune", "--config", str(FILE), "--seeds", "0", "5", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    scores = []
    for seed in (0, 5):
        alone = [f"seed={seed}", f"labels.seed={seed}", "labels.fraction=0.5"]
        finetune(finetune_config(tmp_path / str(seed), *SHORT, *alone))
        assert_identical(
            everything_saved(tmp_path / "all" / f"seed_{seed}"), everything_saved(tmp_path / str(seed))
        )
        scores.append(json.loads((tmp_path / str(seed) / "result.json").read_text())["test"]["top1"])
    assert "validation top-1 of model weights" in caplog.text
    assert f" weights: top-1 {100 * scores[-1]:.2f} %" in caplog.text
    summary = json.loads((tmp_path / "all" / "seeds.json").read_text())
    assert [run["top1"] for run in summary["runs"]] == scores
    assert summary["groups"][0]["mean"] == pytest.approx(np.mean(scores))
    assert summary["groups"][0]["deviation"] == pytest.approx(np.std(scores, ddof=1))
    # one more: the table is of what was asked for, and the others are named
    caplog.clear()
    assert cli.main(["finetune", "--config", str(FILE), "--seeds", "5", *words]) == 0
    assert "seed_0 too; name those seeds" in caplog.text
    assert len(json.loads((tmp_path / "all" / "seeds.json").read_text())["runs"]) == 1
    capsys.readouterr()
    # again: finished runs are passed through
    assert cli.main(["finetune", "--config", str(FILE), "--seeds", "0", "5", *words]) == 0
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.slow
def test_a_stop_ends_the_command_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*QUICK, *SHORT, "optim.steps=30", f"run.output_dir={tmp_path}"]
    command = ["finetune", "--config", str(FILE), "--seeds", "0", "1", *words]

    def stop_early() -> None:
        while not last_step(tmp_path / "seed_0"):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop_early)
    stopping.start()
    with StopRequest():  # the tests survive a signal that comes after the run has ended
        assert cli.main(command) == 0
        stopping.join()
    assert capsys.readouterr().out == ""
    assert 0 < last_step(tmp_path / "seed_0") < 30
    assert not (tmp_path / "seed_1").exists()
    assert cli.main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert last_step(tmp_path / "seed_1") == 30
