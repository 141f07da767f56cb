import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpm import checkpoint

FILES = ("model.safetensors", "ema.safetensors", "train_state.pt", "config.yaml")


def save(run_dir: Path, step: int, **options: Any) -> Path:
    arguments: dict[str, Any] = {
        "config": {"optim": {"lr": 1e-3}, "seed": 0},
        "metadata": {"kind": "pretrain", "classes": ["ä", "b"]},
        "model": {"weight": torch.full((3, 2), float(step)), "steps": torch.tensor(step)},
        "train_state": {"step": step, "moments": [torch.arange(4.0)]},
        "keep": 9,
    }
    return checkpoint.save(run_dir, step=step, **(arguments | options))


def steps_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7, ema={"weight": torch.ones(2, dtype=torch.bfloat16)})
    assert path == tmp_path / "checkpoints" / "step_00000007"
    loaded = checkpoint.load(path)
    assert (loaded.path, loaded.step) == (path, 7)
    assert loaded.config == {"optim": {"lr": 1e-3}, "seed": 0}
    assert loaded.metadata == {"kind": "pretrain", "classes": ["ä", "b"]}
    assert loaded.model["weight"].equal(torch.full((3, 2), 7.0))
    assert loaded.model["steps"].equal(torch.tensor(7))
    assert loaded.ema is not None
    assert loaded.ema["weight"].equal(torch.ones(2, dtype=torch.bfloat16))
    state = checkpoint.load_train_state(path)
    assert state["step"] == 7
    assert state["moments"][0].equal(torch.arange(4.0))


def test_every_file_has_the_mode_that_the_user_s_mask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 7, ema={"weight": torch.ones(2)})
    finally:
        os.umask(before)
    assert {file.name: f"{stat.S_IMODE(file.stat().st_mode):o}" for file in path.iterdir()} == dict.fromkeys(
        (*FILES, "manifest.json"), "640"
    )


def test_a_run_s_folder_means_its_best_else_its_newest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path).step == 2
    save(tmp_path, 3, best=True)
    save(tmp_path, 4)
    assert checkpoint.load(tmp_path).step == 3
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000004"
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoints" / "step_00000003"


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    module["b"].weight = module["a"].weight
    path = save(tmp_path, 1, model=module.state_dict())
    assert set(load_file(path / "model.safetensors")) == {"a.weight"}
    loaded = checkpoint.load(path).model
    assert loaded["b.weight"] is loaded["a.weight"]
    module.load_state_dict(loaded, strict=True)


def test_views_and_transposed_tensors_are_stored_whole(tmp_path: Path) -> None:
    table = torch.randn(4, 3)
    model = {"row": table[1], "rest": table[1:], "turned": table.T, "empty": table[:0]}
    loaded = checkpoint.load(save(tmp_path, 1, model=model)).model
    assert loaded.keys() == model.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in model.items())


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=2, best=step == 2)
    assert steps_in(tmp_path) == ["step_00000002", "step_00000005", "step_00000006"]


def test_a_broken_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=2)
    shorten(save(tmp_path, 2, keep=2) / "train_state.pt")
    save(tmp_path, 3, keep=2)
    assert steps_in(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1, metadata={"accuracy": 0.1})
    path = save(tmp_path, 1, metadata={"accuracy": 0.2}, best=True)
    assert checkpoint.load(path).metadata == {"accuracy": 0.2}
    assert steps_in(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_one_byte_less_is_one_line_and_the_one_before_is_used(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2, ema={"weight": torch.ones(2)})
    shorten(path / name)
    with pytest.raises(ValueError, match=r"broken|incomplete") as raised:
        (checkpoint.load_train_state if name == "train_state.pt" else checkpoint.load)(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"
    assert "step_00000002" in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_is_noticed(name: str, tmp_path: Path) -> None:
    file = save(tmp_path, 1, ema={"weight": torch.ones(2)}) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is missing or broken"):
        (checkpoint.load_train_state if name == "train_state.pt" else checkpoint.load)(file.parent)


def test_no_checkpoint_is_none_or_one_line(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.best(tmp_path) is None
    for path in (tmp_path, tmp_path / "absent", tmp_path / "step_00000001"):
        with pytest.raises(FileNotFoundError, match=r"no (complete )?checkpoint"):
            checkpoint.load(path)


def test_pointers_are_only_hints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, best=True)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert checkpoint.load(tmp_path).step == 2
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    (tmp_path / "checkpoints" / "best").write_text("")
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert latest.name == "step_00000002"


CHILD = """
import os, resource, signal, sys, torch
from pathlib import Path
from tests.test_checkpoint import save
run_dir = Path(sys.argv[1])
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
big = {"weight": torch.zeros(100_000)}
for options in ({"model": big}, {"train_state": big}):
    try:
        save(run_dir, 3, **options)
    except OSError as error:
        print(error)
print(sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
torch.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save(run_dir, 3)
"""


@pytest.mark.slow
def test_a_full_disk_and_a_kill_leave_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path, 1, best=True)
    save(tmp_path, 2)
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    child = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )

    *messages, left = child.stdout.splitlines()
    assert len(messages) == 2, child.stderr
    for message in messages:
        assert message.startswith(f"could not save step 3 to {tmp_path}/checkpoints: ")
        assert "File too large" in message
        assert message.endswith("with run.resume=auto, the last good checkpoint is step 2")
    assert left == "['step_00000001', 'step_00000002']"

    assert child.returncode == -signal.SIGKILL
    assert steps_in(tmp_path) == ["step_00000001", "step_00000002", "step_00000003.partial"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000002"
    assert checkpoint.load(tmp_path).step == 1
    save(tmp_path, 4)
    assert steps_in(tmp_path) == ["step_00000001", "step_00000002", "step_00000004"]


def test_killed_between_two_renames_nothing_is_lost(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    path.rename(f"{path}.replaced")  # as if the process had died before the new one took the name
    assert checkpoint.load(tmp_path).step == 2
    save(tmp_path, 2)
    save(tmp_path, 2)
    assert steps_in(tmp_path) == ["step_00000002"]


def test_the_manifest_has_size_and_hash_of_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) | {"manifest.json"} == {file.name for file in path.iterdir()}
    assert all(files[name]["bytes"] == (path / name).stat().st_size for name in files)


def test_random_generators_resume(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, Tensor]:
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(2)  # noqa: NPY002

    draw()  # an odd number of gaussians: the second of each pair is in the state
    cpu = torch.device("cpu")
    path = save(tmp_path, 1, train_state={"rng": [checkpoint.rng_state(cpu)]})
    expected = draw()
    draw()
    checkpoint.set_rng_state(checkpoint.load_train_state(path)["rng"][0], cpu)
    resumed = draw()
    assert resumed[:3] == expected[:3]
    assert resumed[3].equal(expected[3])
