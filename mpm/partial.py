"""Checkpoints of partial tuning: what was trained, over a base that holds the rest.

Metadata of such a checkpoint has a `base`: where it was, which tensors are taken from it, and their digest. A
base that moved is named by a file: `checkpoints/base`, beside `latest` and `best`, holds its place.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpm import checkpoint
from mpm.backbones.classifier import fold_head_norms
from mpm.imported import TIMM, fetch

__all__ = ["better_weights", "describe_base", "is_checkpoint", "load", "without_base"]

_PREFIX = "classifier."  # of an objective's state; in a pretrained base the backbone is at the top
_POINTER = "base"


def load(path: str | Path) -> checkpoint.Checkpoint:
    """A checkpoint, whole: one that holds a part is laid over its base. See `mpm.checkpoint.load`.

    Raises:
        FileNotFoundError: if there is no checkpoint, or its base is gone.
        ValueError: if a file is broken, or the base is another network.
    """
    saved = checkpoint.load(path)
    record = saved.metadata.get("base")
    if record is None:
        return saved
    base = _find(saved.path, record)
    ema = None if saved.ema is None else base | saved.ema
    return saved._replace(model=base | saved.model, ema=ema)


def describe_base(
    objective: nn.Module, base: Mapping[str, Tensor], *, path: Path, run_dir: Path
) -> dict[str, Any]:
    """What the checkpoints of a run are to say of their base, for their metadata.

    Taken from it is what is frozen, and equal to the last bit: what was resampled for another image size,
    recalibrated, or started afresh is the run's own.

    Args:
        objective: before its first step, in train mode.
        base: its weights, named from the parts of a network on.
        path: of the checkpoint, or of published weights.
        run_dir: the run's folder.
    """
    state = objective.state_dict()
    names = sorted(
        name
        for name in _frozen(objective)
        if (theirs := base.get(name.removeprefix(_PREFIX))) is not None
        and theirs.dtype == state[name].dtype
        and theirs.equal(state[name].cpu())
    )
    chosen = {name: base[name.removeprefix(_PREFIX)] for name in names}
    place = {"path": str(path)}
    if not str(path).startswith(TIMM):
        path = path.expanduser().absolute()
        place = {"path": str(path), "relative": os.path.relpath(path, (run_dir / "checkpoints").absolute())}
    return {**place, "sha256": _digest(chosen), "names": names}


def without_base(state: Mapping[str, Tensor], record: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """A state dict without what the base holds."""
    held = set() if record is None else set(record["names"])
    return {name: tensor for name, tensor in state.items() if name not in held}


def is_checkpoint(source: str | Path) -> bool:
    """Whether it is a folder of mpm's, and not weights of others."""
    if str(source).startswith(TIMM):
        return False
    path = Path(source).expanduser()
    return not path.is_file() and not (path / "config.json").exists()


def better_weights(saved: checkpoint.Checkpoint) -> dict[str, Tensor]:
    """The weights that were the better ones, trained or averaged; norms before heads are folded into them."""
    is_average = saved.ema is not None and saved.metadata.get("weights") == "ema"
    return fold_head_norms(saved.ema if is_average and saved.ema is not None else saved.model)


def _frozen(objective: nn.Module) -> Iterator[str]:
    """Names of what training does not change: frozen parameters, statistics in eval mode."""
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            yield name
    for name, _ in objective.named_buffers():
        if not objective.get_submodule(name.rpartition(".")[0]).training:
            yield name


def _find(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a checkpoint takes from its base.

    Raises:
        FileNotFoundError: if it is in none of its places.
        ValueError: if what is there is another network.
    """
    pointer = path.absolute().parent / _POINTER
    if pointer.exists():
        places = [pointer.read_text(encoding="utf-8").strip()]
    elif "relative" in record:
        places = [os.path.normpath(pointer.parent / record["relative"]), record["path"]]
    else:
        places = [record["path"]]
    other = None
    for place in dict.fromkeys(places):
        try:
            theirs = _weights_at(place)
        except FileNotFoundError:
            continue
        chosen = {
            name: theirs[key] for name in record["names"] if (key := name.removeprefix(_PREFIX)) in theirs
        }
        if _digest(chosen) == record["sha256"]:
            return chosen
        other = place
    what_to_do = f"put it back, or write where it is into {pointer}"
    if other is not None:
        raise ValueError(
            f"{path} was trained on top of {record['path']}, but {other} is another network; {what_to_do}"
        )
    where = " and ".join(dict.fromkeys(places))
    raise FileNotFoundError(
        f"{path} holds only what was trained on top of {record['path']}, and there is nothing at {where}; "
        f"{what_to_do}"
    )


def _weights_at(source: str) -> dict[str, Tensor]:
    """The state of a checkpoint or of published weights, named from the parts of a network on."""
    state = better_weights(load(source)) if is_checkpoint(source) else fetch(source).state
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
