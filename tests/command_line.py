"""Command lines as a user types them, each in a process of its own; all share one import of torch.

A server imports what is heavy once. For every command line it forks a process that runs pretrain.py,
finetune.py or `python -m mpm` from their first line.
"""

import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TINY = ("optim.steps=4", "optim.warmup_steps=1", "optim.batch_size=16", "run.save_every=2", "run.log_every=1")


class Ended(NamedTuple):
    """A process that has ended.

    Attributes:
        status: of its exit.
        out: what it wrote to standard output.
        err: what it wrote to standard error.
    """

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The line that tells the user what is wrong, once it is sure that there is no other."""
        complaints = [line for line in self.err.splitlines() if line.startswith("mpm: ")]
        assert len(complaints) == 1, self.err
        assert "Traceback" not in self.err, self.err
        return complaints[0]


class CommandLine:
    """Runs command lines, by default in an empty folder of its own."""

    def __init__(self, server: subprocess.Popen, folder: Path):
        self._server = server
        self.folder = folder

    def __call__(
        self, program: str, *words: object, cwd: Path | None = None, limit: int | None = None
    ) -> Ended:
        """`program`: mpm, pretrain.py or finetune.py; `limit`: bytes of the largest file it can write."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        request = {"program": program, "words": [str(word) for word in words], "limit": limit}
        request |= {"cwd": str(cwd or folder), "out": str(folder / "out"), "err": str(folder / "err")}
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return Ended(status, (folder / "out").read_text(), (folder / "err").read_text())


@contextmanager
def command_line(folder: Path) -> Iterator[CommandLine]:
    """A server, until the end of the block."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.command_line"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        yield CommandLine(server, folder)
        assert server.stdin
        server.stdin.close()


def finished_run(commands: CommandLine, program: str, config: Path, *words: object) -> Path:
    """Folder of a run of four steps."""
    folder = Path(tempfile.mkdtemp(dir=commands.folder)) / "run"
    ended = commands(program, "--config", config, *TINY, f"run.output_dir={folder}", *words)
    assert ended.status == 0, ended.err
    return folder


def _serve() -> None:
    import torch._dynamo  # the first optimizer imports it
    import torch.utils.tensorboard  # noqa: F401
    import torchvision.io  # noqa: F401

    import mpm.commands.evaluation
    import mpm.commands.features
    import mpm.commands.prediction
    import mpm.commands.probing
    import mpm.commands.reconstruction
    import mpm.commands.rehearsal
    import mpm.commands.survey
    import mpm.finetuning
    import mpm.pretraining  # noqa: F401

    for line in sys.stdin:
        process = os.fork()
        if not process:
            _run(json.loads(line))
        _, waited = os.waitpid(process, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(waited)}\n")
        sys.stdout.flush()
    os._exit(0)  # tearing torch down takes a second


def _run(request: dict[str, Any]) -> None:
    """What the forked process does; it does not return."""
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[stream], os.O_WRONLY | os.O_CREAT), number)
    os.chdir(request["cwd"])
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    sys.argv = [request["program"], *request["words"]]
    status = 0
    try:
        if request["program"] == "mpm":
            runpy.run_module("mpm", run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(str(ROOT / request["program"]), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
