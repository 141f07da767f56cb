"""What each layout can hold, and what it refuses."""

from typing import Any

import pytest
import torch

from mpm.interop.layouts import LAYOUTS, layout_for
from mpm.interop.names import names
from mpm.interop.networks import network_of
from mpm.interop.official import to_official
from mpm.variants import Architecture

TOKEN, MEAN = {"kind": "token"}, {"kind": "mean"}


def _config(
    readout: dict[str, Any] | None = TOKEN, *, family: str = "deit", predictor: Any = None, **trunk: Any
) -> Any:
    sizes = {"patch_size": (4, 4), "dim": 8, "depth": 1, "heads": 2}
    return {
        "family": family,
        "image_size": (8, 8),
        "channels": 3,
        "backbone": Architecture(**sizes | trunk)._asdict(),
        "readout": readout,
        "num_classes": None if readout is None else 2,
        "predictor": predictor,
    }


CAIT = {"attention": "talking_heads", "layer_scale": 1e-5, "class_token": False}
QUERIES = [{"kind": "class_attention", "depth": 1, "queries": queries} for queries in (1, 2)]
BIASED = {"table": "none", "bias": "shared"}
GELU = {"kind": "linear", "activation": "gelu"}
DECODER = {"kind": "decoder", "dim": 8, "depth": 1, "heads": 2}
REFUSED = {
    "registers in deit": ("deit", _config(registers=2), "registers 2 .* takes 0;"),
    "LayerScale in deit": ("deit", _config(layer_scale=0.1), "layer_scale true .* takes false"),
    "no table in deit": ("deit", _config(positions=BIASED), r"positions\.table none .* learned or sincos"),
    "a mean in deit": ("deit", _config(MEAN), "readout mean .* takes token or none"),
    "two tokens in deit3": ("deit3", _config(distillation_token=True), "distillation_token true"),
    "branches in deit3": ("deit3", _config(branches=2), "branches 2 .* takes 1"),
    "two queries in cait": ("cait", _config(QUERIES[1], **CAIT), "readout class_attention of 2 queries"),
    "two queries in timm": ("timm", _config(QUERIES[1], **CAIT), "readout class_attention of 2 queries"),
    "a mean of cait in timm": ("timm", _config(MEAN, **CAIT), "takes class_attention of 1 query"),
    "hmlp in timm": ("timm", _config(stem={"kind": "hmlp"}), "stem hmlp .* linear or linear with layer norm"),
    "conv in timm": ("timm", _config(stem={"kind": "conv"}), "stem conv"),
    "GELU": ("three_things", _config(stem=GELU), "an activation"),
    "a decoder in timm": ("timm", _config(None, predictor=DECODER), "predictor decoder .* takes none"),
    "three tokens in timm": ("timm", _config(distillation_token=True, registers=1), "registers 1"),
    "registers in Beit": ("timm", _config(registers=1, qkv_bias="query_value"), "registers 1 .*timm Beit"),
    "a key bias in beit": ("beit", _config(positions=BIASED), "qkv_bias all .* takes query_value or none"),
    "an unknown layout": ("swin", _config(), "layout swin is unknown; use one of deit, deit3, .*timm$"),
    "one of timm's classes": ("timm Beit", _config(), "is unknown"),
}


@pytest.mark.parametrize(("layout", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_layout_cannot_hold_is_refused_with_the_reason(layout: str, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        to_official({}, config, layout=layout)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (_config(), "timm"),
        (_config(branches=3, layer_scale=0.1), "timm"),
        (_config(layer_scale=0.1, family="deit3"), "timm without slots"),
        (_config(MEAN, registers=2, class_token=False), "timm without slots"),
        (_config(distillation_token=True), "timm distilled"),
        (_config(MEAN, qkv_bias="query_value", positions=BIASED), "timm Beit"),
        (_config(QUERIES[0], **CAIT), "timm Cait"),
    ],
)
def test_a_network_is_written_for_the_class_of_timm_that_can_hold_it(config: Any, layout: str) -> None:
    assert layout_for("timm", config) == layout


def test_the_official_branches_are_numbered_from_the_second_on() -> None:
    """Two branches are published (norm1, norm11, gamma_1, gamma_1_1); the others follow."""
    table = names("three_things", _config(branches=3, layer_scale=0.1))
    assert [table[f"backbone.blocks.0.attns.{j}.norm.bias"] for j in range(3)] == [
        f"blocks.0.{name}.bias" for name in ("norm1", "norm11", "norm12")
    ]
    assert [table[f"backbone.blocks.0.ffns.{j}.mlp.fc1.bias"] for j in range(3)] == [
        f"blocks.0.{name}.fc1.bias" for name in ("mlp", "mlp1", "mlp2")
    ]
    assert [table[f"backbone.blocks.0.ffns.{j}.ls.gamma"] for j in range(3)] == [
        f"blocks.0.{name}" for name in ("gamma_2", "gamma_2_1", "gamma_2_2")
    ]


@pytest.mark.parametrize(
    "config",
    [
        _config(registers=1, layer_scale=0.1),
        _config(branches=2, stem={"kind": "hmlp"}),
        _config(branches=2, stem={"kind": "conv", "norm": "layer"}),
        _config(QUERIES[0], **CAIT),
        _config(None, predictor={"kind": "linear"}, qkv_bias="query_value", positions=BIASED),
        _config(None, predictor=DECODER, family="mae"),
        _config(MEAN, qkv_bias="none", positions={"table": "learned", "bias": "per_block"}),
    ],
)
def test_the_table_names_every_weight_once(config: Any) -> None:
    """All but prefix tokens and positions, which do not map one to one."""
    with torch.device("meta"):
        state = network_of(config, out_dim=48).state_dict()
    rest = {"backbone.prefix_tokens", "backbone.positions.table", "predictor.positions.table"}
    for layout in LAYOUTS:
        table = names(layout, config)
        assert table.keys() == state.keys() - rest
        assert len(set(table.values())) == len(table)


def test_a_state_of_another_network_is_refused() -> None:
    config = _config()
    state = network_of(config).state_dict()
    with pytest.raises(ValueError, match=r"heads\.1\.weight has no place in the deit layout"):
        to_official(state | {"heads.1.weight": torch.ones(1)}, config)
    del state["backbone.blocks.0.norm1.bias"]
    with pytest.raises(ValueError, match=r"the state lacks backbone\.blocks\.0\.norm1\.bias"):
        to_official(state, config)


def test_what_is_written_shares_no_memory_between_its_tensors() -> None:
    """Safetensors refuses it."""
    config = _config(distillation_token=True)
    official = to_official(network_of(config).state_dict(), config)
    places = [tensor.untyped_storage().data_ptr() for tensor in official.values()]
    assert len(set(places)) == len(places)
    assert all(tensor.is_contiguous() for tensor in official.values())
