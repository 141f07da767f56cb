"""Weights out of files that others wrote. Nothing in a file is ever run."""

import argparse
import json
import pickle
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["NotWeights", "Weights", "read_json", "read_weights", "some", "unwrap"]

# where training scripts keep the weights; the first that is there counts
_WRAPPERS = (
    "model",
    "module",  # DeepSpeed
    "state_dict",
    "model_state_dict",
    "weights",
    "model_ema",
    "state_dict_ema",
)
_DEEPEST = 8  # of wrappers in wrappers; more is a dict that holds itself
_PREFIX = re.compile(r"(module\.|_orig_mod\.)*")  # of DataParallel and torch.compile
_FOLDER = ("model.safetensors", "pytorch_model.bin")
# values that stand beside weights, of classes whose code is not needed to pass them over
_UNREAD = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"pathlib.{kind}Path" for kind in ("Posix", "Windows")),
    *(f"pathlib._local.{kind}Path" for kind in ("Posix", "Windows")),
)
_SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
# what torch's reader of plain tensors raises on bytes that are none
_BROKEN = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
)


_TORCH = (b"PK", b"\x80")  # a zip archive, before torch 1.6 a pickle


class NotWeights(ValueError):
    """A file of another kind. Who asked for weights knows what else would do."""


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        state: tensors by name, on the CPU.
        facts: the config.json beside them, if any; under "preprocessor_config" the file of that name; under
            "args" the training script's arguments.
    """

    state: dict[str, Tensor]
    facts: dict[str, Any]


class _Unread:
    """Stands for a value that is no weight, so that none of its code is needed."""

    def __init__(self, *_: Any) -> None:
        """Nothing is kept."""

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""


class _Settings:
    """Stands for a mapping of settings; it is one that torch fills."""

    def __new__(cls) -> OrderedDict[str, Any]:  # type: ignore[misc]
        """An empty one."""
        return OrderedDict()


def read_weights(path: str | Path) -> Weights:
    """Tensors and facts of a checkpoint.

    Args:
        path: a file of torch (.pth, .pt, .bin, ...) or safetensors, or a folder as of the Hugging Face hub:
            weights, in one file or several, and config.json.

    Raises:
        FileNotFoundError: if there is none.
        NotWeights: if it is a file of another kind.
        ValueError: if it is broken, holds no weights, or would run code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_dir():
        return _read_folder(path)
    if _SHARD.fullmatch(path.name):
        raise ValueError(f"{path} is one of several files of the same weights; give their folder")
    if path.name in _FOLDER:
        return _with_config(path.parent, _read_file(path))
    return _read_file(path)


def unwrap(content: Mapping[str, Any], *, name: str = "the state dict") -> Weights:
    """The weights among all that a training script saved.

    Args:
        content: a state dict, or a dict that has one under "model", "module", "state_dict", ...
        name: of the file, for errors.

    Raises:
        ValueError: if there are no tensors.
    """
    facts: dict[str, Any] = {}
    state: Any = content
    for _ in range(_DEEPEST):
        if not isinstance(state, Mapping):
            break
        args = state.get("args")
        facts |= {"args": vars(args)} if isinstance(args, argparse.Namespace) else {}
        inner = next((key for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = state[inner]
    else:
        raise ValueError(f"{name} has dicts in dicts, {_DEEPEST} deep; give the state dict that they hold")
    tensors = {
        _PREFIX.sub("", key, count=1): tensor.detach()
        for key, tensor in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(key, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        there = some(map(str, content)) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{name} holds no weights, but {there}; give a file with a model's state dict")
    return Weights(tensors, facts)


def _read_folder(folder: Path) -> Weights:
    for name in _FOLDER:
        if (folder / name).is_file():
            return _with_config(folder, _read_file(folder / name))
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            if lost := [shard for shard in shards if not (folder / Path(shard).name).is_file()]:
                raise ValueError(f"{folder} lacks {some(lost)} of its {len(shards)} files; download it again")
            parts = [_read_file(folder / Path(shard).name) for shard in shards]
            state = {key: tensor for part in parts for key, tensor in part.state.items()}
            return _with_config(folder, Weights(state, {}))
    raise ValueError(f"{folder} has no {' or '.join(_FOLDER)}; give a file of weights")


def _with_config(folder: Path, weights: Weights) -> Weights:
    """Facts that the Hugging Face hub keeps beside weights."""
    config, preprocessor = folder / "config.json", folder / "preprocessor_config.json"
    facts = read_json(config) if config.is_file() else {}
    if preprocessor.is_file():
        facts["preprocessor_config"] = read_json(preprocessor)
    return weights._replace(facts=facts | weights.facts)


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file of JSON.

    Raises:
        ValueError: if it holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where an object is expected")
    return content


def _read_file(path: Path) -> Weights:
    _refuse_what_is_no_checkpoint(path)
    if path.suffix == ".safetensors":
        try:
            return unwrap(load_file(path), name=str(path))
        except SafetensorError as error:
            raise _damaged(path, error) from None
    return unwrap(_load_plain(path), name=str(path))


def _refuse_what_is_no_checkpoint(path: Path) -> None:
    """What downloads leave behind when they go wrong, and files of other kinds."""
    with path.open("rb") as file:
        head = file.read(256)
    start = head.lstrip().lower()
    if not start:
        raise ValueError(f"{path} is empty; download it again")
    if start.startswith(b"<"):
        raise ValueError(f"{path} is a web page, not weights; download the file that the page offers")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} only points to its content; fetch it with git lfs pull")
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]+", head):
        raise NotWeights(f"{path} is text, not weights")
    if path.suffix != ".safetensors" and not head.startswith(_TORCH):
        raise NotWeights(f"{path} holds no weights, by its first bytes")


def _load_plain(path: Path) -> Any:
    """The content of a file of torch, of plain values and tensors only."""
    harmless: list[Any] = [
        argparse.Namespace,
        (_Settings, "yacs.config.CfgNode"),
        *((_Unread, name) for name in _UNREAD),
    ]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # before the error, the same in other words
            return torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        if code := re.search(r"GLOBAL (\S+)|unrecognized function (<.*?>)|(TorchScript)", str(error)):
            needed = next(filter(None, code.groups()))
            raise ValueError(
                f"{path} would run code ({needed}), and mpm reads plain tensors only; if you trust it, load "
                'it with its own code and save its weights: torch.save(model.state_dict(), "weights.pth")'
            ) from None
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    """In torch's words, without its advice to load the file unsafely."""
    words = str(error).rpartition("error: ")[2].strip() or type(error).__name__
    reason = words.splitlines()[0].partition(". ")[0]
    return ValueError(f"{path} is no file of weights, or cut short ({reason[:120]}); download it again")


def some(names: Iterable[str]) -> str:
    """The first of many names, for an error."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
