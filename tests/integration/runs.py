"""Real runs for the tests: start a script as a user does, watch it, stop it, read what it left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from mpm import checkpoint

ROOT = Path(__file__).parents[2]
TIMINGS = {"train/images_per_s", "train/data_wait", "train/mfu", "train/memory_gib"}
PATIENCE_S = 180


class Launched:
    """A script that runs, on one process or under torchrun; nothing of it outlives the `with` block.

    Args:
        script: pretrain.py or finetune.py.
        words: of the command line.
        folder: the run's.
        notes: where `observed` writes; another one for every launch.
        images: folder whose images are noted when they are opened.
        processes: number of training processes.
    """

    def __init__(
        self, script: str, words: Sequence[str], *, folder: Path, notes: Path, images: Path, processes: int
    ):
        self.folder, self.notes, self.processes = folder, notes, processes
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        observed = ["-m", "tests.integration.observed", str(notes), str(images), script, *words]
        self._log = folder.with_name(f"{notes.name}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), *observed, f"run.output_dir={folder}"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.signal_everything(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    @property
    def output(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Looks often, so that what follows hits the run in the middle of whatever it does."""
        begin = time.monotonic()
        while not happened():
            assert self._process.poll() is None, f"the run ended too early:\n{self.output}"
            assert time.monotonic() - begin < PATIENCE_S, self.output
            time.sleep(0.002)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Exit status of the process, or of torchrun."""
        return self._process.wait(timeout_s)

    def finish(self) -> None:
        status = self.wait()
        assert status == 0, self.output
        for file in self.notes.glob("threads.*"):  # one that frees a tensor now would abort the process
            assert "gloo" not in file.read_text(), file.name

    def training_process(self, rank: int) -> int:
        return int((self.notes / f"process.{rank}").read_text())

    def signal_everything(self, number: signal.Signals) -> None:
        """To the group of the command, and to those that torchrun gives each training process."""
        known = [self.training_process(int(path.suffix[1:])) for path in self.notes.glob("process.*")]
        for leader in {self._process.pid, *known}:
            try:
                os.killpg(leader, number)
            except ProcessLookupError:
                continue  # ended, or one process, which is in the command's group

    def samples(self, share: int, *, workers: int) -> list[list[list[str]]]:
        """Paths of the images of each batch of each process, as the loader's workers opened them."""
        batches = []
        for rank in range(self.processes):
            opened = [self._opened(rank, worker) for worker in range(workers)]
            count = sum(map(len, opened)) // share
            # batch i is made by worker i % workers
            places = [(i % workers, i // workers * share) for i in range(count)]
            batches.append([opened[worker][first : first + share] for worker, first in places])
        return batches

    def _opened(self, rank: int, worker: int) -> list[str]:
        (file,) = self.notes.glob(f"opened.{rank}.{worker}.*")
        return file.read_text().splitlines()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl but its timings; a line that is being written does not count."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: v for name, v in record.items() if name not in TIMINGS} for record in records]


def last_step(folder: Path) -> int:
    """Of those that are logged."""
    return max((record["step"] for record in metrics(folder)), default=0)


def saved_step(folder: Path) -> int:
    """Of the newest complete checkpoint."""
    path = checkpoint.latest(folder)
    return 0 if path is None else checkpoint.load(path).step


def everything_saved(folder: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds but its path and how long things took."""
    path = checkpoint.latest(folder)
    assert path is not None
    saved = checkpoint.load(path)._asdict()
    del saved["path"], saved["config"]["run"]
    state = checkpoint.load_train_state(path)
    for process in state["processes"]:
        del process["reporter"]["wait_s"], process["reporter"]["seconds"]
    return saved | {"train_state": state}


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit: keys, types, and every number in every tensor."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where} differs by up to {(a.double() - b.double()).abs().max():g}"
    elif isinstance(a, Mapping):
        assert list(a) == list(b), where
        for name in a:
            assert_identical(a[name], b[name], f"{where}/{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_identical(left, right, f"{where}[{place}]")
    else:
        assert a == b, where
