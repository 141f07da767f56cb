"""The checkpoints of a run: which is the newest, which the best, which stay."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from mpm import distributed
from mpm.checkpoint.directory import (
    fault_of,
    manifest_of,
    read_tensors,
    remove,
    sync,
    verified,
    write_directory,
)

__all__ = ["Checkpoint", "best", "latest", "load", "load_train_state", "save"]

log = logging.getLogger(__name__)

# `.replaced` is a checkpoint in the moment when another of the same step takes its place
_STEP_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")


class Checkpoint(NamedTuple):
    """Weights and what they are."""

    path: Path
    step: int
    config: dict[str, Any]
    metadata: dict[str, Any]
    model: dict[str, Tensor]  # on the CPU
    ema: dict[str, Tensor] | None


def save(
    run_dir: str | Path,
    *,
    step: int,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    model: Mapping[str, Tensor],
    train_state: Mapping[str, Any],
    ema: Mapping[str, Tensor] | None = None,
    keep: int,
    best: bool = False,
) -> Path:
    """Writes a checkpoint; every process calls it, the main one writes.

    Args:
        run_dir: the run's folder.
        step: finished steps. A checkpoint of the same step is replaced.
        config: plain data, for YAML.
        metadata: plain data, for JSON: the kind of run, class names, metrics.
        model: state dict. A tensor with several names (tied weights) is stored under the first.
        train_state: tensors, numbers, strings, lists and dicts.
        ema: state dict of the moving average.
        keep: how many of the newest complete checkpoints stay, this one included; the best stays besides.
        best: whether this is the best so far.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: on every process, if it could not be written (a full disk, say). Earlier ones are untouched.
    """
    folder = Path(run_dir) / "checkpoints"
    failure = None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.partial"):
                remove(leftover)
            weights = {"model": model, "ema": ema}
            write_directory(folder / _name(step), step, config, metadata, weights, train_state)
            if best:
                _point(folder, "best", _name(step))
            _point(folder, "latest", _name(step))
            _retain(folder, step, keep)
        except OSError as error:
            last = latest(run_dir)
            failure = (
                f"could not save step {step} to {folder}: {error.strerror or error}; free space and start "
                "again with run.resume=auto, the last good checkpoint is "
                + (f"step {_step(last)}" if last else "none")
            )
    failure = distributed.broadcast_object(failure)
    if failure:
        raise OSError(failure)
    return folder / _name(step)


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run; broken ones are passed over with a warning."""
    folder = Path(run_dir) / "checkpoints"
    named = _pointed(folder, "latest")
    candidates = [path for path in folder.glob("step_*") if _STEP_NAME.fullmatch(path.name)]
    for path in sorted(candidates, key=lambda p: (p.name == named, _step(p), not p.suffix), reverse=True):
        fault = fault_of(path)
        if fault is None:
            return path
        log.warning("passing over a broken checkpoint: %s", fault)
    return None


def best(run_dir: str | Path) -> Path | None:
    """The checkpoint that was saved as the best, if it is complete."""
    folder = Path(run_dir) / "checkpoints"
    name = _pointed(folder, "best")
    if name is None:
        return None
    fault = fault_of(folder / name)
    if fault is not None:
        log.warning("the best checkpoint is broken: %s", fault)
        return None
    return folder / name


def load(path: str | Path) -> Checkpoint:
    """Reads and verifies weights, configuration and metadata.

    Args:
        path: a checkpoint's directory, or a run's (its best checkpoint, else its newest).

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if a file is broken.
    """
    path = _resolve(Path(path))
    manifest = manifest_of(path)
    return Checkpoint(
        path=path,
        step=manifest["step"],
        config=yaml.safe_load(verified(path, "config.yaml").read_text(encoding="utf-8")),
        metadata=manifest["metadata"],
        model=read_tensors(path, "model"),
        ema=read_tensors(path, "ema") if "ema" in manifest["tied"] else None,
    )


def load_train_state(path: str | Path) -> dict[str, Any]:
    """Reads and verifies the state of training, on the CPU; arguments and errors as `load`."""
    file = verified(_resolve(Path(path)), "train_state.pt")
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _point(folder: Path, pointer: str, name: str) -> None:
    new = folder / f"{pointer}.partial"
    new.write_text(name, encoding="utf-8")
    sync(new)
    new.replace(folder / pointer)
    sync(folder)


def _pointed(folder: Path, pointer: str) -> str | None:
    file = folder / pointer
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _retain(folder: Path, step: int, keep: int) -> None:
    """Removes the checkpoints before `step` but the newest complete ones and the best."""
    best_name = _pointed(folder, "best")
    kept = 1
    for path in sorted(folder.glob("step_*"), reverse=True):
        if path.suffix == ".replaced":
            remove(path)
        elif _STEP_NAME.fullmatch(path.name) and _step(path) < step and path.name != best_name:
            if kept < keep and fault_of(path) is None:
                kept += 1
            else:
                remove(path)


def _resolve(path: Path) -> Path:
    if (path / "manifest.json").exists() or _STEP_NAME.fullmatch(path.name):
        return path
    found = best(path) or latest(path)
    if found is None:
        raise FileNotFoundError(
            f"no complete checkpoint in {path}; give a run's folder or a checkpoints/step_*"
        )
    return found
