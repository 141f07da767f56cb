"""A checkpoint's directory: written whole or not at all, and verified where it is read."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "fault_of",
    "manifest_of",
    "read_tensors",
    "remove",
    "sync",
    "verified",
    "write",
    "write_directory",
]


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
    write_directory(path, 0, config, metadata, {"model": model, "ema": None}, None)


def write_directory(
    final: Path,
    step: int,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor] | None],
    train_state: Mapping[str, Any] | None,
) -> None:
    """Writes a directory beside its place, then renames it; one that is there is replaced.

    Args:
        final: its place.
        step: finished steps.
        config: plain data, for YAML.
        metadata: plain data, for JSON.
        weights: state dicts by the names of their files; None: there is none.
        train_state: tensors, numbers, strings, lists and dicts; None: there is none.

    Raises:
        OSError: if it could not be written; what was there stays.
    """
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
            sync(path)
    except BaseException:
        remove(new)
        raise
    if final.exists():
        remove(old)
        final.rename(old)
    new.rename(final)
    sync(final.parent)


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


def remove(path: Path) -> None:
    """Removes a file or directory; if that is interrupted, what remains is named as a leftover."""
    if path.is_dir():
        partial = path if path.suffix == ".partial" else path.rename(f"{path}.partial")
        shutil.rmtree(partial, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Puts a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_of(path: Path) -> dict[str, Any]:
    """What manifest.json says.

    Raises:
        FileNotFoundError: if there is no directory.
        ValueError: if it is not complete.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise ValueError(f"{path} is incomplete: no readable manifest.json; use another checkpoint") from None
    return manifest


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, by the sizes of its files; None if nothing is."""
    try:
        files = manifest_of(path)["files"]
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    for name, recorded in files.items():
        size = (path / name).stat().st_size if (path / name).exists() else 0
        if size != recorded["bytes"]:
            return f"{path / name} has {size} bytes of {recorded['bytes']}"
    return None


def verified(path: Path, name: str) -> Path:
    """A file of a directory, whose hash is that of the manifest.

    Raises:
        ValueError: if it is not.
    """
    file, recorded = path / name, manifest_of(path)["files"][name]
    if not file.exists() or _sha256(file) != recorded["sha256"]:
        raise ValueError(f"{file} is missing or broken (its sha256 differs); use another checkpoint")
    return file


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """A state dict on the CPU, tied tensors under all of their names; errors as `verified`."""
    tensors: dict[str, Tensor] = load_file(verified(path, f"{name}.safetensors"))
    return tensors | {alias: tensors[holder] for alias, holder in manifest_of(path)["tied"][name].items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
