"""A run that was stopped, in whatever way, ends exactly as one that was not."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from mpm import checkpoint
from mpm.data.datasets import SyntheticImages
from mpm.finetuning import finetune
from mpm.pretraining import pretrain
from mpm.training.loop import StepReport, StopRequest
from mpm.training.reporting import Reporter
from tests.integration.runs import (
    Launched,
    assert_identical,
    everything_saved,
    last_step,
    metrics,
    saved_step,
)
from tests.integration.settings import SCRATCH, finetune_config, pretrain_config

STEPS, BATCH, WORKERS = 80, 32, 2
SAVE_EVERY = 7
GRACE_S = 20  # to save and exit after SIGTERM

# Nothing divides anything: windows of the log, checkpoints, evaluations and epochs all straddle each other.
CADENCE = [f"run.workers={WORKERS}", "run.log_every=3", f"run.save_every={SAVE_EVERY}", "run.keep=1000"]
# All that draws a random number or keeps a state: crops, jitter, dropped paths, running statistics, ...
PRETRAIN = [
    "--config=configs/debug.yaml",
    "data.color_jitter=0.4",
    "backbone.drop_path=0.3",
    "backbone.stem={kind: hmlp, norm: batch, statistics: visible}",
    "monitor.every=19",
]
# ... mixing, erasing, augmentation and the average
FINETUNE = [
    "--config=configs/finetune/debug.yaml",
    "backbone.drop_path=0.3",
    "data.rand_augment=rand-m9-mstd0.5-inc1",
    "data.erasing=0.5",
    "evaluate_every=11",
]


class Finished(NamedTuple):
    folder: Path
    samples: list[list[list[str]]]  # of each process, of each batch


class Workplace:
    """Images on the disk, and runs that nothing stopped, each made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        for part, count in (("train", 150), ("val", 24)):
            images = SyntheticImages(count, image_size=(36, 44), channels=3, num_classes=3)
            for index in range(count):
                file = folder / part / str(images.label(index)) / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images.read(index).permute(1, 2, 0).numpy()).save(file)
        self._finished: dict[tuple[str, int], Finished] = {}

    def launch(self, script: str, folder: Path, *, processes: int, notes: Path) -> Launched:
        train, val = self.folder / "train", self.folder / "val"
        if script == "pretrain.py":
            words = [*PRETRAIN, "data.kind=folder", f"data.root={train}"]
        else:
            words = [*FINETUNE, f"init.checkpoint={self.finished('pretrain.py', processes=1).folder}"]
            words += [f"data.train={{kind: folder, root: {train}}}"]
            words += [f"data.{part}={{kind: folder, root: {val}}}" for part in ("val", "test")]
        words += [*CADENCE, f"optim.steps={STEPS}", f"optim.batch_size={BATCH}"]
        return Launched(script, words, folder=folder, notes=notes, images=train, processes=processes)

    def finished(self, script: str, *, processes: int) -> Finished:
        if (script, processes) not in self._finished:
            name = f"{script}-{processes}"
            folder, notes = self.folder / "uninterrupted" / name, self.folder / "notes" / name
            folder.parent.mkdir(exist_ok=True)
            with self.launch(script, folder, processes=processes, notes=notes) as run:
                run.finish()
                samples = run.samples(BATCH // processes, workers=WORKERS)
            self._finished[script, processes] = Finished(folder, samples)
        return self._finished[script, processes]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


def stop_at(run: Launched, step: int, number: signal.Signals) -> None:
    """Sends the signal when the step is logged."""
    run.wait_until(lambda: last_step(run.folder) >= step)
    if number == signal.SIGKILL:
        run.signal_everything(signal.SIGKILL)
        assert run.wait() != 0
    elif run.processes == 1:
        run.signal_everything(signal.SIGTERM)  # to the loader's workers too
        assert run.wait(GRACE_S) == 0, run.output
    else:  # torchrun itself exits with an error on SIGTERM; it exits with 0 if each training process does
        os.kill(run.training_process(1), signal.SIGTERM)
        assert run.wait(GRACE_S) == 0, run.output


PROCESSES = [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.torchrun)]


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_a_stopped_run_ends_as_an_uninterrupted_one(
    script: str, number: signal.Signals, processes: int, workplace: Workplace, tmp_path: Path
) -> None:
    expected = workplace.finished(script, processes=processes)
    folder = tmp_path / "run"
    step = random.Random(f"{script} {number.name} {processes}").randrange(SAVE_EVERY + 3, STEPS - 20)
    with workplace.launch(script, folder, processes=processes, notes=tmp_path / "first") as run:
        stop_at(run, step, number)
    saved = saved_step(folder)
    assert step - 2 * SAVE_EVERY < saved < STEPS
    if number == signal.SIGTERM:
        assert saved >= step  # it saved then, not at its cadence
    with workplace.launch(script, folder, processes=processes, notes=tmp_path / "second") as run:
        run.finish()
        samples = run.samples(BATCH // processes, workers=WORKERS)
    assert samples == [batches[saved:] for batches in expected.samples]
    assert metrics(folder) == metrics(expected.folder)
    assert_identical(everything_saved(folder), everything_saved(expected.folder))
    if script == "finetune.py":
        result = json.loads((folder / "result.json").read_text())
        assert result == json.loads((expected.folder / "result.json").read_text())


@pytest.mark.torchrun
def test_training_processes_save_and_exit_with_0_where_torchrun_is_told_to_stop(
    workplace: Workplace, tmp_path: Path
) -> None:
    """As on a cluster; torchrun hands the signal on to its processes, whose status it does not tell."""
    folder, notes = tmp_path / "run", tmp_path / "first"
    with workplace.launch("pretrain.py", folder, processes=2, notes=notes) as run:
        run.wait_until(lambda: last_step(folder) >= 2 * SAVE_EVERY)
        run.signal_everything(signal.SIGTERM)
        run.wait(GRACE_S)
    assert [(notes / f"status.{rank}").read_text() for rank in range(2)] == ["0", "0"]
    assert saved_step(folder) >= 2 * SAVE_EVERY


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_a_step_is_saved_once_where_a_run_is_stopped(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, save, saved = Reporter.add, checkpoint.save, []

    def add_and_stop(self: Reporter, report: StepReport) -> None:
        add(self, report)
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def save_and_note(*words: Any, step: int, **more: Any) -> Path:
        saved.append(step)
        return save(*words, step=step, **more)

    monkeypatch.setattr(Reporter, "add", add_and_stop)
    monkeypatch.setattr(checkpoint, "save", save_and_note)
    every_step = ["run.save_every=1", "optim.steps=4", "optim.warmup_steps=0", "optim.batch_size=8"]
    if script == "pretrain.py":
        pretrain(pretrain_config(tmp_path, *every_step, "data.count=16", "monitor.every=2"))
    else:
        finetune(finetune_config(tmp_path, *SCRATCH, *every_step, "data.test=null"))
    assert saved == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_an_evaluation_due_at_the_step_of_the_stop_is_not_lost(script: str, tmp_path: Path) -> None:
    def run(folder: Path) -> None:
        if script == "pretrain.py":
            pretrain(pretrain_config(folder, "data.count=64", "monitor.every=1", "optim.steps=8"))
        else:
            finetune(finetune_config(folder, *SCRATCH, "evaluate_every=1", "optim.steps=8"))

    def stop_early() -> None:
        while not last_step(tmp_path / "stopped"):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    run(tmp_path / "uninterrupted")
    stopping = threading.Thread(target=stop_early)
    stopping.start()
    with StopRequest():  # the tests survive a signal that comes after the run has ended
        run(tmp_path / "stopped")
        stopping.join()
    assert 0 < saved_step(tmp_path / "stopped") < 8
    run(tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "uninterrupted")
    assert_identical(everything_saved(tmp_path / "stopped"), everything_saved(tmp_path / "uninterrupted"))
