"""Models of timm by name; what a folder says is run by nobody."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from mpm.interop.timm_hub import OutOfReach, create_timm, load_timm
from tests.interop.published import CASES, CLASSES, HEADS, SIDE, SIZES, published

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
CLASS_NAMES = [f"class {index}" for index in range(CLASSES)]


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def write_folder(folder: Path, **arguments: Any) -> Path:
    """A folder as timm reads it, with the weights of a tiny ViT."""
    folder.mkdir(exist_ok=True)
    save_file(published(CASES["deit"], dtype=torch.float32).state_dict(), folder / "model.safetensors")
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_pct": 0.8, "interpolation": "lanczos"}
    facts = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": CLASSES,
        "label_names": CLASS_NAMES,
        "model_args": SIZES | arguments,
        "pretrained_cfg": preprocessing | {"input_size": [3, SIDE, SIDE], "num_classes": CLASSES},
    }
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that somebody wanted to sleep; the hub is at a port that nobody listens to, its cache empty."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k"])
def test_weights_that_cannot_be_fetched_are_told_at_once(name: str, waits: list[float]) -> None:
    with pytest.raises(OutOfReach, match=f"for {name}: they are not on this disk, and .* cannot be reached"):
        create_timm(name)
    assert waits == []


def test_weights_on_the_disk_need_no_connection(tmp_path: Path, waits: list[float]) -> None:
    trained = timm.create_model("test_vit.r160_in1k", pretrained=False).state_dict()
    repository, commit = tmp_path / "hub" / "models--timm--test_vit.r160_in1k", "0" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(trained, repository / "snapshots" / commit / "model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    state = create_timm("test_vit.r160_in1k").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    assert waits == []


def test_a_folder_is_read_with_its_facts(tmp_path: Path) -> None:
    config, state, report = load_timm(f"local-dir:{write_folder(tmp_path / 'x')}")
    assert config["backbone"]["heads"] == HEADS
    assert (config["mean"], config["crop"], config["image_size"]) == ((0.1, 0.2, 0.3), 0.8, (SIDE, SIDE))
    assert config["classes"] == tuple(CLASS_NAMES)
    assert config["interpolation"] == "bicubic"
    assert ["lanczos" in note for note in report.notes if "resized by" in note] == [True]
    assert not any("not told" in note for note in report.notes)
    expected = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).state_dict()
    assert torch.equal(state["heads.0.weight"], expected["head.weight"])


def test_positions_are_resampled_from_the_grid_of_the_model(tmp_path: Path) -> None:
    """16 patches: 4x4 by the model, whatever else they could be."""
    official = load_timm(f"local-dir:{write_folder(tmp_path / 'x')}", image_size=(8, 32))
    assert official.config["image_size"] == (8, 32)
    assert official.report.resized == ("pos_embed",)


def test_a_network_that_mpm_has_not_is_made_with_its_weights(tmp_path: Path) -> None:
    trained = timm.create_model("test_resnet.r160_in1k", pretrained=False)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    facts = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": {"num_classes": 1000}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    state = create_timm(f"local-dir:{tmp_path}").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())
    with pytest.raises(ValueError, match="is timm's ResNet; of timm's networks mpm has"):
        load_timm(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("read", [load_timm, create_timm])
@pytest.mark.parametrize("as_old_timm", [False, True])
def test_a_file_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_old_timm: bool, read: Callable[[str], Any]
) -> None:
    """timm 1.0.22 loads with weights_only=False."""
    bait = tmp_path / "ran"
    folder = write_folder(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Shell(f"touch {bait}")}, folder / "pytorch_model.bin")
    builder = timm.models._builder
    if as_old_timm:
        loader = functools.partial(builder.load_state_dict_from_path, weights_only=False)
        monkeypatch.setattr(builder, "load_state_dict_from_path", loader)
    with pytest.raises(ValueError, match="would run code, and mpm reads plain tensors only") as error:
        read(f"local-dir:{folder}")
    assert "\n" not in str(error.value)
    assert not bait.exists()
    if as_old_timm:  # it is the variable that keeps it from running
        with pytest.raises((RuntimeError, AttributeError, TypeError)):
            timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert bait.exists()


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_environment_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    if before is not None:
        monkeypatch.setenv(FORCE, before)
    load_timm(f"local-dir:{write_folder(tmp_path / 'x')}")
    with pytest.raises(ValueError, match="gives no weights"):
        load_timm(f"local-dir:{tmp_path}")
    assert os.environ.get(FORCE) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_path": "evil.pth"}, "model_args of config.json has checkpoint_path, which is no part"),
        ({"pretrained_cfg_overlay": {"url": "x"}}, "has pretrained_cfg_overlay"),
        ({"num_heads": "a"}, r"has model_args\.num_heads 'a', where a positive integer"),
        ({"act_layer": "quick_gelu"}, "an activation other than GELU"),
    ],
)
def test_a_config_that_says_more_than_an_architecture_is_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_timm(f"local-dir:{write_folder(tmp_path / 'x', **arguments)}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [load_timm, create_timm])
def test_the_config_of_the_hub_is_checked_before_its_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[str], Any]
) -> None:
    facts: Any = ({}, "vit_tiny_patch16_224", {"checkpoint_path": "evil.pth"})
    monkeypatch.setattr(timm.models, "load_model_config_from_hf", lambda name: facts)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)  # it answers
    with pytest.raises(ValueError, match="has checkpoint_path, which is no part"):
        read("hf-hub:someone/evil")


@pytest.mark.parametrize("name", ["vit_of_tomorrow", "local-dir:nowhere", "swift:x/y"])
def test_what_timm_has_not_is_told_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"timm gives no weights for {name}") as error:
        load_timm(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"), [("resnet5O", "resnet50"), ("vit_base_patch16_224.mea", "vit_base_patch16_224.mae")]
)
def test_near_names_are_told_of_one_that_timm_has_not(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"timm gives no weights for {name}: .*; did you mean {near} or "):
        create_timm(name)
