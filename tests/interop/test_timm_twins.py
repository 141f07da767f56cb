"""Networks of timm that mpm would misread by their names are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from mpm.interop import load_official
from mpm.interop.timm_twins import check_timm_model
from tests.interop.published import CASES, HEADS, SIZES, published


def _other_eps(*arguments: Any, **options: Any) -> nn.LayerNorm:
    return nn.LayerNorm(*arguments, **options | {"eps": 1e-5})


VIT, MEAN = VisionTransformer, {"global_pool": "avg"}
UNLIKE: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "rotary positions": (Eva, {"use_rot_pos_emb": True}, "timm's Eva"),
    "quick GELU": (VIT, {"act_layer": "quick_gelu"}, "an activation other than GELU"),
    "GELU by tanh": (VIT, {"act_layer": "gelu_tanh"}, "an activation other than GELU"),
    "norms after the maps": (VIT, {"block_fn": ResPostBlock}, "blocks of another kind, ResPostBlock"),
    "the maximum": (VIT, {"global_pool": "max"}, "the pooling max"),
    "a mean after the norm": (VIT, MEAN | {"fc_norm": False}, "the pooling avg"),
    "a mean with the class token": (
        VIT,
        MEAN | {"pool_include_prefix": True},
        "prefix tokens in the pooling",
    ),
    "eps": (VIT, {"norm_layer": _other_eps}, "norms of another eps than 1e-6"),
}


@pytest.mark.parametrize(("build", "arguments", "message"), UNLIKE.values(), ids=UNLIKE)
def test_what_computes_something_else_is_refused(build: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_timm_model(build(**SIZES | arguments), "x")


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.in_timm])
def test_what_mpm_computes_passes(case: Any) -> None:
    check_timm_model(published(case), "x")


def test_the_architecture_in_config_json_is_checked(tmp_path: Path) -> None:
    state = published(CASES["deit"], dtype=torch.float32).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": SIZES, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_official(tmp_path).config["backbone"]["heads"] == HEADS
    wrong = {
        "vit_base_patch16_clip_quickgelu_224": "an activation other than GELU and norms of another eps",
        "vit_of_tomorrow": rf"timm {timm.__version__} does not make the vit_of_tomorrow .* update timm",
    }
    for architecture, message in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": architecture}))
        with pytest.raises(ValueError, match=message) as error:
            load_official(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": SIZES | {"checkpoint_path": "BAIT"}}, "has checkpoint_path, which is no part of an"),
        (
            {"model_args": SIZES | {"pretrained": True, "pretrained_cfg": {"url": "http://127.0.0.1:9/x"}}},
            "has pretrained, pretrained_cfg, which is no part of an architecture",
        ),
        ({"model_args": SIZES | {"embed_dim": {"a": 1}}}, "has embed_dim {'a': 1}, where a number or a name"),
        ({"model_args": SIZES | {"img_size": [[4]]}}, r"has img_size \[\[4\]\], where a number or a name"),
        ({"model_args": SIZES | {"patch_size": 0}}, "does not make the vit_tiny_patch16_224"),
        ({"architecture": "hf-hub:someone/evil"}, "unknown model hf-hub:someone/evil"),
        ({"architecture": "local-dir:BAIT"}, "unknown model local-dir:"),
        (
            {"architecture": "vit_tiny_patch16_224.a/resnet18"},
            "unknown model vit_tiny_patch16_224.a/resnet18",
        ),
        ({"architecture": "resnet18", "model_args": {}}, "timm's ResNet"),
    ],
)
def test_config_json_runs_and_downloads_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it reached for weights")

    for loader in ("load_pretrained", "load_state_dict_from_url", "load_state_dict_from_path"):
        monkeypatch.setattr(timm.models._builder, loader, fail)
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", fail)
    monkeypatch.setattr(timm.models._factory, "load_model_config_from_hf", fail)
    save_file(published(CASES["deit"], dtype=torch.float32).state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": SIZES, "pretrained_cfg": {}} | changes
    (tmp_path / "config.json").write_text(json.dumps(config).replace("BAIT", str(tmp_path)))
    with pytest.raises(ValueError, match=message) as error:
        load_official(tmp_path)
    assert "\n" not in str(error.value)
    assert "reached" not in str(error.value)


def test_rotary_networks_with_positions_are_told_by_their_names() -> None:
    """The official families have either LayerScale under this name, or a class slot."""
    state = Eva(**SIZES, init_values=0.1, use_rot_pos_emb=True, qkv_fused=False).state_dict()
    state = published(CASES["deit"]).state_dict() | {key: state[key] for key in state if "gamma" in key}
    with pytest.raises(ValueError, match="rotary positions only"):
        load_official(state, heads=HEADS)
