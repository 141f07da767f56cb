"""Checkpoints: one directory per step, complete or absent, with the hash of every file.

    <run_dir>/checkpoints/
        latest, best            text: the name of a directory
        step_00000123/
            model.safetensors   and ema.safetensors where there is an average
            train_state.pt      optimizer, random generators, ...; read with weights_only=True
            config.yaml
            manifest.json       step, metadata, tied tensors, size and sha256 of each file

A directory is written as `*.partial` and renamed when everything is on the disk. What a killed process left
behind is removed by the next save.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpm import distributed

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
                _remove(leftover)
            weights = {"model": model, "ema": ema}
            _write(folder / _name(step), step, config, metadata, weights, train_state)
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


def write(
    path: str | Path,
    *,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    model: Mapping[str, Tensor],
) -> None:
    """Writes weights without a state of training, as a checkpoint of step 0 that `load` reads.

    Args:
        path: the checkpoint's directory, which must not exist yet.
        config: plain data, for YAML.
        metadata: plain data, for JSON.
        model: state dict.

    Raises:
        OSError: if it could not be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, 0, config, metadata, {"model": model, "ema": None}, None)


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run; broken ones are passed over with a warning."""
    folder = Path(run_dir) / "checkpoints"
    named = _pointed(folder, "latest")
    candidates = [path for path in folder.glob("step_*") if _STEP_NAME.fullmatch(path.name)]
    for path in sorted(candidates, key=lambda p: (p.name == named, _step(p), not p.suffix), reverse=True):
        fault = _fault(path)
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
    fault = _fault(folder / name)
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
    manifest = _manifest(path)
    return Checkpoint(
        path=path,
        step=manifest["step"],
        config=yaml.safe_load(_verified(path, "config.yaml").read_text(encoding="utf-8")),
        metadata=manifest["metadata"],
        model=_read_tensors(path, "model"),
        ema=_read_tensors(path, "ema") if "ema" in manifest["tied"] else None,
    )


def load_train_state(path: str | Path) -> dict[str, Any]:
    """Reads and verifies the state of training, on the CPU; arguments and errors as `load`."""
    file = _verified(_resolve(Path(path)), "train_state.pt")
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def rng_state(device: torch.device) -> dict[str, Any]:
    """This process's random generators (torch, `device`, Python, numpy) as tensors and numbers."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  libraries draw from it
    _, keys, *numpy_rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (torch.tensor(keys.tolist()), *numpy_rest),
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts this process's random generators where `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    keys, *numpy_rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), *numpy_rest))  # noqa: NPY002


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _write(
    final: Path,
    step: int,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor] | None],
    train_state: Mapping[str, Any] | None,
) -> None:
    new, old = (final.with_name(final.name + suffix) for suffix in (".partial", ".replaced"))
    try:
        new.mkdir()
        tied = {}
        for name, tensors in weights.items():
            if tensors is not None:
                stored, tied[name] = _independent(tensors)
                with _library_errors():
                    save_file(stored, new / f"{name}.safetensors", metadata={"format": "pt"})
        if train_state is not None:
            with _library_errors(), (new / "train_state.pt").open("wb") as file:
                torch.save(dict(train_state), file)
        (new / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        for path in new.iterdir():  # safetensors writes for its owner alone
            shutil.copymode(new / "config.yaml", path)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in new.iterdir()}
        manifest = {"step": step, "metadata": dict(metadata), "tied": tied, "files": files}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*new.iterdir(), new):
            _sync(path)
    except BaseException:
        _remove(new)
        raise
    if final.exists():
        _remove(old)
        final.rename(old)
    new.rename(final)
    _sync(final.parent)


def _independent(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, as safetensors needs, and {name left out: name that holds it}."""
    holders: dict[tuple[Any, ...], str] = {}
    stored, tied = {}, {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        holder = holders.setdefault(identity, name) if tensor.numel() else name
        if holder != name:
            tied[name] = holder
        elif tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes():
            stored[name] = tensor
        else:  # a part of a larger one, or transposed
            stored[name] = tensor.clone(memory_format=torch.contiguous_format)
    return stored, tied


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Raises as OSError again what torch and safetensors make of one."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _point(folder: Path, pointer: str, name: str) -> None:
    new = folder / f"{pointer}.partial"
    new.write_text(name, encoding="utf-8")
    _sync(new)
    new.replace(folder / pointer)
    _sync(folder)


def _pointed(folder: Path, pointer: str) -> str | None:
    file = folder / pointer
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _retain(folder: Path, step: int, keep: int) -> None:
    """Removes the checkpoints before `step` but the newest complete ones and the best."""
    best_name = _pointed(folder, "best")
    kept = 1
    for path in sorted(folder.glob("step_*"), reverse=True):
        if path.suffix == ".replaced":
            _remove(path)
        elif _STEP_NAME.fullmatch(path.name) and _step(path) < step and path.name != best_name:
            if kept < keep and _fault(path) is None:
                kept += 1
            else:
                _remove(path)


def _remove(path: Path) -> None:
    """Removes a file or directory; if that is interrupted, what remains is named as a leftover."""
    if path.is_dir():
        partial = path if path.suffix == ".partial" else path.rename(f"{path}.partial")
        shutil.rmtree(partial, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _resolve(path: Path) -> Path:
    if (path / "manifest.json").exists() or _STEP_NAME.fullmatch(path.name):
        return path
    found = best(path) or latest(path)
    if found is None:
        raise FileNotFoundError(
            f"no complete checkpoint in {path}; give a run's folder or a checkpoints/step_*"
        )
    return found


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise ValueError(f"{path} is incomplete: no readable manifest.json; use another checkpoint") from None
    return manifest


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, by the sizes of its files; None if nothing is."""
    try:
        files = _manifest(path)["files"]
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    for name, recorded in files.items():
        size = (path / name).stat().st_size if (path / name).exists() else 0
        if size != recorded["bytes"]:
            return f"{path / name} has {size} bytes of {recorded['bytes']}"
    return None


def _verified(path: Path, name: str) -> Path:
    file, recorded = path / name, _manifest(path)["files"][name]
    if not file.exists() or _sha256(file) != recorded["sha256"]:
        raise ValueError(f"{file} is missing or broken (its sha256 differs); use another checkpoint")
    return file


def _read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(_verified(path, f"{name}.safetensors"))
    return tensors | {alias: tensors[holder] for alias, holder in _manifest(path)["tied"][name].items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
