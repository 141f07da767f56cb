"""A run that was stopped, in whatever way, ends exactly as one that was not."""

import itertools
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
from mpm.commands.tokenizing import tokenize
from mpm.config import PretrainConfig
from mpm.configfile import load
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
from tests.integration.settings import (
    CLASS_PRETRAINING,
    CONFIGS,
    QUICK,
    SCRATCH,
    TOKENIZERS,
    codes_of,
    finetune_config,
    pretrain_config,
    tokenizer_config,
)

STEPS, BATCH, WORKERS = 80, 32, 2
SAVE_EVERY = 7
GRACE_S = 20  # to save and exit after SIGTERM

# Nothing divides anything: windows of the log, checkpoints, evaluations and epochs all straddle each other.
CADENCE = [f"run.workers={WORKERS}", "run.log_every=3", f"run.save_every={SAVE_EVERY}", "run.keep=1000"]
# All that draws a random number or keeps a state: crops, jitter, dropped paths, running statistics, ...
WATCHED = ["data.color_jitter=0.4", "monitor.every=19"]
MASKED = [
    *WATCHED,
    "backbone.drop_path=0.3",
    "backbone.stem={kind: hmlp, norm: batch, statistics: visible}",
]
# ... mixing, erasing, augmentation and the average
FINETUNE = [
    "backbone.drop_path=0.3",
    "data.rand_augment=rand-m9-mstd0.5-inc1",
    "data.erasing=0.5",
    "evaluate_every=11",
]
# ... a teacher and its center; crops that come again, with their codes; codebooks and Gumbel noise
LATENT = "objective.target={kind: latent, prototypes: 16, momentum: 0.9}"
METHODS = {  # configuration and words
    "mae": ("debug.yaml", MASKED),
    "fine-tuning": ("finetune/debug.yaml", FINETUNE),
    "latent": ("debug.yaml", [*MASKED, LATENT]),
    "beit, cached codes": ("debug.yaml", MASKED),
    **{name: ("tokenizers/debug.yaml", [*words, *WATCHED]) for name, words in TOKENIZERS.items()},
}
# where codes are looked at, not only training opens images
OPENED_BY_TRAINING = ("mae", "fine-tuning", "latent")


class Finished(NamedTuple):
    folder: Path
    samples: list[list[list[str]]]  # of each process, of each batch


class Workplace:
    """Images on the disk, codes of their crops, and runs that nothing stopped, each made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        for part, count in (("train", 150), ("val", 24)):
            images = SyntheticImages(count, image_size=(36, 44), channels=3, num_classes=3)
            for index in range(count):
                file = folder / part / str(images.label(index)) / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images.read(index).permute(1, 2, 0).numpy()).save(file)
        self._finished: dict[tuple[str, int], Finished] = {}

    def launch(self, method: str, folder: Path, *, processes: int, notes: Path) -> Launched:
        train, val = self.folder / "train", self.folder / "val"
        script = "finetune.py" if method == "fine-tuning" else "pretrain.py"
        file, words = METHODS[method]
        words = [*words, f"optim.steps={STEPS}", f"optim.batch_size={BATCH}"]
        if script == "pretrain.py":
            words += ["data.kind=folder", f"data.root={train}"]
        else:
            words += [f"init.checkpoint={self.finished('mae', processes=1).folder}"]
            words += [f"data.train={{kind: folder, root: {train}}}"]
            words += [f"data.{part}={{kind: folder, root: {val}}}" for part in ("val", "test")]
        if method == "beit, cached codes":
            words += self.cached_codes(file, words)
        words = [f"--config={CONFIGS / file}", *words, *CADENCE]
        return Launched(script, words, folder=folder, notes=notes, images=train, processes=processes)

    def cached_codes(self, file: str, words: list[str]) -> list[str]:
        """What names VQ-KD, and its codes of all crops that a run of these words sees."""
        tokenizer, cache = self.folder / "tokenizer", self.folder / "codes"
        named = [*codes_of(tokenizer), "objective.target.crops=3", f"objective.target.cache={cache}"]
        named += CLASS_PRETRAINING
        if not cache.exists():
            pretrain(tokenizer_config(tokenizer, *TOKENIZERS["vqkd"], "optim.steps=6"))
            words = [*QUICK, *words, *named, f"run.output_dir={self.folder}"]
            tokenize(load(CONFIGS / file, words, PretrainConfig).config)
        return named

    def finished(self, method: str, *, processes: int) -> Finished:
        if (method, processes) not in self._finished:
            name = f"{method}-{processes}"
            folder, notes = self.folder / "uninterrupted" / name, self.folder / "notes" / name
            folder.parent.mkdir(exist_ok=True)
            with self.launch(method, folder, processes=processes, notes=notes) as run:
                run.finish()
                samples = samples_of(run, method)
            self._finished[method, processes] = Finished(folder, samples)
        return self._finished[method, processes]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


def samples_of(run: Launched, method: str) -> list[list[list[str]]]:
    """Images of each batch of each process; nothing where others than training open images."""
    if method not in OPENED_BY_TRAINING:
        return [[] for _ in range(run.processes)]
    return run.samples(BATCH // run.processes, workers=WORKERS)


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


OPTIMIZERS = {
    "lamb": ["optim.kind=lamb"],
    "lars": ["optim.kind=lars", "head_norm=batch"],
    "sgd": ["optim.kind=sgd", "optim.nesterov=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_continues_bit_by_bit(name: str, tmp_path: Path) -> None:
    words = [*SCRATCH, *OPTIMIZERS[name], "data.three_augment=true", "data.crop=simple", "data.repeats=3"]
    words += ["optim.steps=9", "optim.warmup_steps=2", "optim.layer_decay=0.75"]
    finetune(finetune_config(tmp_path / "straight", *words))
    finetune(finetune_config(tmp_path / "stopped", *words), stop_after=4)
    finetune(finetune_config(tmp_path / "stopped", *words))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    assert_identical(everything_saved(tmp_path / "stopped"), everything_saved(tmp_path / "straight"))


SIGNALS, ON_ONE_AND_TWO = (signal.SIGKILL, signal.SIGTERM), ("mae", "fine-tuning")
STOPPED = [  # how a run stops and is spread is no matter of its method: the others are killed
    *itertools.product(ON_ONE_AND_TWO, SIGNALS, (1, 2)),
    *((method, signal.SIGKILL, 1) for method in METHODS if method not in ON_ONE_AND_TWO),
    ("vqkd", signal.SIGKILL, 2),
]


@pytest.mark.parametrize(
    ("method", "number", "processes"),
    [pytest.param(*run, marks=pytest.mark.slow if run[2] == 1 else pytest.mark.torchrun) for run in STOPPED],
    ids=[f"{method}-{number.name}-{processes}" for method, number, processes in STOPPED],
)
def test_a_stopped_run_ends_as_an_uninterrupted_one(
    method: str, number: signal.Signals, processes: int, workplace: Workplace, tmp_path: Path
) -> None:
    expected = workplace.finished(method, processes=processes)
    folder = tmp_path / "run"
    step = random.Random(f"{method} {number.name} {processes}").randrange(SAVE_EVERY + 3, STEPS - 20)
    with workplace.launch(method, folder, processes=processes, notes=tmp_path / "first") as run:
        stop_at(run, step, number)
    saved = saved_step(folder)
    assert step - 2 * SAVE_EVERY < saved < STEPS
    if number == signal.SIGTERM:
        assert saved >= step  # it saved then, not at its cadence
    with workplace.launch(method, folder, processes=processes, notes=tmp_path / "second") as run:
        run.finish()
        samples = samples_of(run, method)
    assert samples == [batches[saved:] for batches in expected.samples]
    assert metrics(folder) == metrics(expected.folder)
    assert_identical(everything_saved(folder), everything_saved(expected.folder))
    if method == "fine-tuning":
        result = json.loads((folder / "result.json").read_text())
        assert result == json.loads((expected.folder / "result.json").read_text())


@pytest.mark.torchrun
def test_training_processes_save_and_exit_with_0_where_torchrun_is_told_to_stop(
    workplace: Workplace, tmp_path: Path
) -> None:
    """As on a cluster; torchrun hands the signal on to its processes, whose status it does not tell."""
    folder, notes = tmp_path / "run", tmp_path / "first"
    with workplace.launch("mae", folder, processes=2, notes=notes) as run:
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
