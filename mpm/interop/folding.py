"""What other programs lack, moved into what they have; the network computes the same."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["fold_layer_scale", "fold_stem_norm", "unit_layer_scale"]

_EPSILON = 1e-5  # of batch norm


def fold_layer_scale(state: dict[str, Tensor]) -> None:
    """Factors of a residual branch into the map before them, in place: g (W x + b) = (g W) x + g b."""
    for name in [name for name in state if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block, factor = name[: -len(".ls1.gamma")], state.pop(name)
        layer = f"{block}.attn.proj" if name.endswith(".ls1.gamma") else f"{block}.mlp.fc2"
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * factor[:, None]
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * factor


def fold_stem_norm(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Batch norm after a linear stem into its map: a norm of fixed statistics is a factor and a shift.

    Args:
        state: of mpm.
        config: facts as `load_official` gives them.

    Returns: state, config, and notes; as they are where there is no such norm, or an activation after it.
    """
    state, stem = dict(state), config["backbone"]["stem"]
    is_plain = stem["kind"] == "linear" and stem.get("activation", "none") == "none"
    if not is_plain or stem.get("norm") != "batch":
        return state, dict(config), ()
    norm, proj = "backbone.stem.norm", "backbone.stem.proj"
    weight, bias, mean, variance = (
        state.pop(f"{norm}.{leaf}") for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    state.pop(f"{norm}.num_batches_tracked")
    factor = weight * torch.rsqrt(variance + _EPSILON)
    state[f"{proj}.weight"] = state[f"{proj}.weight"] * factor[:, None]
    state[f"{proj}.bias"] = (state[f"{proj}.bias"] - mean) * factor + bias
    trunk = config["backbone"] | {"stem": {"kind": "linear"}}
    return state, {**config, "backbone": trunk}, ("Batch norm of the stem is folded into its map (exact).",)


def unit_layer_scale(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LayerScale with factors of 1 where there is none, for CaiT, whose files always have it."""
    trunk = config["backbone"]
    if trunk["layer_scale"] is not None:
        return dict(state), dict(config)
    ones = torch.ones_like(state["readout.norm.weight"])
    blocks = {name.rpartition(".norm1.")[0] for name in state if ".norm1." in name}
    factors = {f"{block}.ls{n}.gamma": ones.clone() for block in blocks for n in (1, 2)}
    return {**state, **factors}, {**config, "backbone": trunk | {"layer_scale": 1.0}}
