"""Files of others: read where they are plain, refused in one line where they are not, and never run."""

import argparse
import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpm.interop.files import read_weights

STATE = {"blocks.0.norm1.weight": torch.arange(3.0), "head.bias": torch.ones(2)}


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def _assert_read(path: Path) -> None:
    state, _ = read_weights(path)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in state.items())
    assert not any(tensor.requires_grad for tensor in state.values())


def _refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=path.name) as error:
        read_weights(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def _prefixed(prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": tensor for key, tensor in STATE.items()}


ARGUMENTS = argparse.Namespace(lr=1)
SAVED: dict[str, Any] = {
    "plain": STATE,
    "with training": {"model": STATE, "epoch": 3, "optimizer": {"step": torch.ones(1)}, "args": ARGUMENTS},
    "with an average": {"model_ema": {"other": torch.ones(1)}, "model": STATE},
    "of DeepSpeed": {"module": STATE, "loss_scaler": None},
    "of timm": {"arch": "vit", "model": "vit_b", "state_dict": _prefixed("module.")},
    "compiled": {"model": {"module": _prefixed("_orig_mod.module.")}},
    "only an average": {"state_dict_ema": STATE},
    "parameters": {key: nn.Parameter(tensor) for key, tensor in STATE.items()} | {"epoch": 3},
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", SAVED.values(), ids=SAVED)
def test_weights_are_found_among_what_scripts_save(tmp_path: Path, content: Any, is_zip: bool) -> None:
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    _assert_read(tmp_path / "x.pth")


def test_arguments_are_facts(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": argparse.Namespace(lr=0.1, model="vit")}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").facts == {"args": {"lr": 0.1, "model": "vit"}}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrapped", [lambda bad: bad, lambda bad: {"model": STATE, "args": argparse.Namespace(x=bad)}]
)
def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path, wrapped: Any, is_zip: bool) -> None:
    bait = tmp_path / "ran"
    torch.save(wrapped(Shell(f"touch {bait}")), tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    message = _refusal(tmp_path / "x.pth")
    assert f"would run code ({os.system.__module__}.system)" in message
    assert "torch.save(model.state_dict()" in message
    assert not bait.exists()


def test_a_plain_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    bait = tmp_path / "ran"
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Shell(f"touch {bait}")))
    _refusal(tmp_path / "x.pkl")
    assert not bait.exists()


def test_a_pickled_module_is_refused_by_its_name(tmp_path: Path) -> None:
    """DALL-E's encoder.pkl is one."""
    torch.save(nn.Linear(2, 2), tmp_path / "encoder.pkl")
    assert "would run code (torch.nn.modules.linear.Linear)" in _refusal(tmp_path / "encoder.pkl")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "x.pt"))
    for name in ("data.pkl", "constants.pkl"):
        writer.write_record(name, b"\x80\x02}.", 4)
    writer.write_end_of_file()
    assert "would run code (TorchScript)" in _refusal(tmp_path / "x.pt")


def test_settings_and_results_beside_the_weights_need_none_of_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SimMIM keeps a configuration of yacs, others paths and NumPy's numbers and arrays."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    beside = {
        "config": yacs.CfgNode(LR=1),
        "best": np.float64(0.5),
        "history": [np.arange(3), np.array(["a"]), np.ones((2, 2), np.float32)],
        "args": argparse.Namespace(out=Path("x")),
    }
    beside["config"].__dict__["_immutable"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        torch.save({"model": STATE} | beside, tmp_path / "x.pth")
    _assert_read(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"\n<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"PK\x03\x04 but no archive", "cut short"),
        (b"my weights,\r\n\tin words\n", "is text, not weights"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_downloads_leave_behind_is_told(tmp_path: Path, content: bytes, message: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in _refusal(tmp_path / name)


def test_a_file_of_another_kind_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert _refusal(tmp_path / "x.pth").endswith("x.pth holds no weights, by its first bytes")


@pytest.mark.parametrize("name", ["x.pth", "legacy.pth", "x.safetensors"])
def test_a_file_cut_short_anywhere_is_told(tmp_path: Path, name: str) -> None:
    whole = tmp_path / "whole.safetensors"
    if name.endswith("safetensors"):
        save_file(STATE, whole)
    else:
        torch.save(STATE, whole, _use_new_zipfile_serialization=name == "x.pth")
    content = whole.read_bytes()
    for end in range(1, len(content) - 1, len(content) // 40):
        (tmp_path / name).write_bytes(content[:end])
        _refusal(tmp_path / name)


@pytest.mark.parametrize("content", [{"epoch": 3}, [STATE], torch.ones(2), {"model": {}}])
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    assert "holds no weights" in _refusal(tmp_path / "x.pth")


def test_a_dict_that_holds_itself_is_told(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "x.pth")
    assert "has dicts in dicts" in _refusal(tmp_path / "x.pth")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_the_hub_is_read_with_its_facts(tmp_path: Path, file_name: str) -> None:
    (save_file if file_name.endswith("safetensors") else torch.save)(STATE, tmp_path / file_name)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    facts = {"model_type": "vit", "preprocessor_config": {"image_mean": [0, 0, 0]}}
    for path in (tmp_path, tmp_path / file_name):
        _assert_read(path)
        assert read_weights(path).facts == facts


def test_a_folder_in_several_files_is_read_whole(tmp_path: Path) -> None:
    names = {key: f"model-{i:05}-of-00002.safetensors" for i, key in enumerate(STATE, start=1)}
    for key, name in names.items():
        save_file({key: STATE[key]}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    _assert_read(tmp_path)
    one = tmp_path / names["head.bias"]
    assert "give their folder" in _refusal(one)
    one.unlink()
    assert "lacks model-00002-of-00002.safetensors of its 2 files" in _refusal(tmp_path)


def test_a_folder_without_weights_or_with_broken_facts_is_told(tmp_path: Path) -> None:
    assert "has no model.safetensors or pytorch_model.bin" in _refusal(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    for content, message in {"{": "is no JSON", "[]": "holds a list"}.items():
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            read_weights(tmp_path)
