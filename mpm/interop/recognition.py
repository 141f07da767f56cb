"""Which network a state dict is, from its keys and shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mpm.interop.families import FAMILIES, decoder_heads_of, heads_of, layer_scale_of, preprocessing_of
from mpm.interop.files import some
from mpm.interop.geometry import grid_of_positions, is_sincos
from mpm.interop.keys import count, outputs_of, ratio_of, stem_of
from mpm.interop.tokens import TOKENS, check_tokens
from mpm.variants import Architecture

__all__ = ["Recognized", "Stated", "recognize"]

_RECOMPUTED = re.compile(r"(.*\.)?relative_position_index")
# BEiT v2's class pretraining: what reads the trunk a second time, and what mpm's has not
_SECOND = "cls_pt_"
_OWN = re.compile(r"cls_pt_(?!layers\.).*|cls_pt_layers\..*\.relative_position_bias_table")
_BIASES = {
    "shared": "rel_pos_bias.relative_position_bias_table",
    "per_block": "blocks.0.attn.relative_position_bias_table",
}


class Stated(NamedTuple):
    """What is known of a file beside its tensors.

    Attributes:
        facts: config.json and arguments.
        source: name of the file, which tells BEiT v2 from BEiT.
        is_simmim: whether its names had SimMIM's prefix.
        heads: of attention, where the keys do not say.
        decoder_heads: of MAE's decoder.
        image_size: height and width in pixels, where the positions do not say.
    """

    facts: Mapping[str, Any]
    source: str = ""
    is_simmim: bool = False
    heads: int | None = None
    decoder_heads: int | None = None
    image_size: tuple[int, int] | None = None


class Recognized(NamedTuple):
    """A network.

    Attributes:
        layout: of its names, "timm" too where the family is DeiT III.
        config: facts as `load_official` gives them.
        dropped: keys that mpm has no use for.
        notes: what a reader should know.
    """

    layout: str
    config: dict[str, Any]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def recognize(state: Mapping[str, Tensor], stated: Stated) -> Recognized:
    """The network of a state dict.

    Raises:
        ValueError: if it is of no family, or a size cannot be told.
    """
    stem, patch_size, channels = stem_of(state)
    blocks, has_timm_names, head_notes = _blocks(state, stated)
    class_attention = count(state, "blocks_token_only.{}.")
    check_tokens(state, blocks["dim"], *TOKENS.values(), "pos_embed")
    trunk = Architecture(
        patch_size=patch_size,
        stem=stem,
        class_token="cls_token" in state and not class_attention,
        distillation_token="dist_token" in state,
        registers=state["reg_token"].shape[1] if "reg_token" in state else 0,
        **blocks,
    )
    image_size, positions, has_slots = _positions(state, trunk, stated)
    trunk = trunk._replace(positions=positions)
    predictor, predictor_notes = _predictor(state, trunk, stated)
    readout = _readout(state, trunk, class_attention, stated, is_pretrained=predictor is not None)
    layout = _layout(trunk, readout, predictor, stated, has_timm_names=has_timm_names, has_slots=has_slots)
    one = trunk.num_prefix == trunk.branches == 1
    is_deit3 = layout == "timm" and one and not has_slots and blocks["layer_scale"] is not None
    family = "deit3" if is_deit3 else layout
    trunk = trunk._replace(drop_path_rule=FAMILIES[family].drop_path_rule)
    if trunk.layer_scale is not None:
        trunk = trunk._replace(layer_scale=layer_scale_of(family, dim=trunk.dim, depth=trunk.depth))
    preprocessing, notes = preprocessing_of(
        family,
        image_size=image_size,
        channels=channels,
        facts=stated.facts,
        is_beit2=_is_beit2(state, stated),
    )
    num_classes, alone = _classes(state, trunk, readout)
    config = {
        "family": family,
        "image_size": image_size,
        "channels": channels,
        **preprocessing,
        "backbone": trunk._asdict(),
        "readout": readout,
        "num_classes": num_classes,
        "predictor": predictor,
    }
    is_twice = predictor is not None and predictor["kind"] == "class_pretraining"
    dropped = tuple(
        key for key in state if _RECOMPUTED.fullmatch(key) or (key.startswith(_SECOND) and not is_twice)
    )
    notes = (*head_notes, *predictor_notes, *notes)
    if alone:
        notes += (f"of the classes' heads there is only {some(alone)}, so the classes are left out",)
    return Recognized(layout, config, (*dropped, *alone), notes)


def _blocks(state: Mapping[str, Tensor], stated: Stated) -> tuple[dict[str, Any], bool, tuple[str, ...]]:
    """What fixes the blocks, whether their names are timm's, and notes. LayerScale is there (1) or not."""
    listed = count(state, "blocks.0.attns.{}.")
    attention, mlp = ("attns.0.attn", "ffns.0.mlp") if listed else ("attn", "mlp")
    dim = outputs_of(state, f"blocks.0.{attention}.proj.weight")
    biases = {"qkv.bias": "all", "q_bias": "query_value"}
    kinds = [kind for bias, kind in biases.items() if f"blocks.0.{attention}.{bias}" in state]
    is_timm_scale = any(f"blocks.0.{name}.gamma" in state for name in ("ls1", "attns.0.ls"))
    has_talking_heads = f"blocks.0.{attention}.proj_l.weight" in state
    bias = next((kind for kind, table in _BIASES.items() if table in state), "none")
    per_head = (*_BIASES.values(), "blocks.0.attn.proj_l.weight")
    told = [state[key].shape[-1] for key in per_head if key in state]
    heads, notes = _heads(dim, told, stated)
    fixed: dict[str, Any] = {
        "dim": dim,
        "depth": count(state, "blocks.{}."),
        "heads": heads,
        "mlp_ratio": ratio_of(outputs_of(state, f"blocks.0.{mlp}.fc1.weight"), dim),
        "branches": listed or count(state, "blocks.0.attn{}.qkv.weight"),
        "attention": "talking_heads" if has_talking_heads else "softmax",
        "qkv_bias": kinds[0] if kinds else "none",
        "layer_scale": 1.0 if is_timm_scale or "blocks.0.gamma_1" in state else None,
        "positions": {"table": "learned" if "pos_embed" in state else "none", "bias": bias},
    }
    return fixed, bool(listed) or is_timm_scale, notes


def _heads(dim: int, told: list[int], stated: Stated) -> tuple[int, tuple[str, ...]]:
    """Heads as the file tells, else as is stated, else those of networks of this width, with a note."""
    known = _section(stated, "model_args").get("num_heads") if stated.heads is None else stated.heads
    heads = told[0] if told else heads_of(dim) if known is None else known
    if stated.heads not in (None, heads):
        raise ValueError(
            f"heads {stated.heads} contradicts the file, whose attention has {heads}; leave it out"
        )
    is_assumed = not told and known is None
    notes = (f"{heads} attention heads are not told: they are as published for width {dim}",) * is_assumed
    return _divisor(heads, dim, "heads"), notes


def _divisor(heads: int, dim: int, argument: str) -> int:
    if heads < 1 or dim % heads:
        raise ValueError(f"{argument} {heads} does not divide the width {dim}; give another {argument}=")
    return heads


def _section(stated: Stated, key: str) -> Mapping[str, Any]:
    """A part of config.json; empty where it is not there."""
    return stated.facts.get(key) or {}


def _positions(
    state: Mapping[str, Tensor], trunk: Architecture, stated: Stated
) -> tuple[tuple[int, int], dict[str, str], bool]:
    """Image size, positions, and whether `pos_embed` has rows for the prefix tokens."""
    table = state.get("pos_embed")
    bias = next((state[key] for key in _BIASES.values() if key in state), None)
    has_positions = table is not None or bias is not None
    says_none = _section(stated, "model_args").get("pos_embed") == "none"
    size = _section(stated, "pretrained_cfg").get("input_size") if has_positions or says_none else None
    grid = grid_of_positions(
        None if table is None else table.shape[1],
        None if bias is None else len(bias),
        prefix=trunk.num_prefix,
        patch_size=trunk.patch_size,
        stated=None if size is None else (size[1], size[2]),
        image_size=stated.image_size,
    )
    positions = dict(trunk.positions)
    if table is not None:
        slots, rows = table[0].tensor_split([-math.prod(grid)])
        if not slots.any() and is_sincos(rows, grid):
            positions["table"] = "sincos"
    has_slots = table is not None and table.shape[1] > math.prod(grid)
    return (grid[0] * trunk.patch_size[0], grid[1] * trunk.patch_size[1]), positions, has_slots


def _predictor(
    state: Mapping[str, Tensor], trunk: Architecture, stated: Stated
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Who predicts in pretraining, if anyone, and notes."""
    if "decoder_embed.weight" in state:
        width = outputs_of(state, "decoder_embed.weight")
        check_tokens(state, width, "decoder_pos_embed")
        is_assumed = stated.decoder_heads is None
        heads = decoder_heads_of(width) if stated.decoder_heads is None else stated.decoder_heads
        heads = _divisor(heads, width, "decoder_heads")
        notes = (f"{heads} heads of the decoder are not told: they are as published for width {width}",)
        depth = count(state, "decoder_blocks.{}.")
        predictor = {"kind": "decoder", "dim": width, "depth": depth, "heads": heads}
        return predictor, notes * is_assumed
    if ("decoder.0.weight" if stated.is_simmim else "lm_head.weight") not in state:
        return None, ()
    depth = count(state, "cls_pt_layers.{}.")
    if own := [key for key in state if _OWN.fullmatch(key)]:
        told = f"class pretraining is left out: it has {some(own)} of its own, where mpm's shares the trunk's"
        return {"kind": "linear"}, (told,)
    if not depth:
        return {"kind": "linear"}, ()
    early_layer = max(1, trunk.depth - 3)
    notes = (f"early_layer of cls_pt_layers is not told: it is {early_layer}, as published 3 from the last",)
    return {"kind": "class_pretraining", "early_layer": early_layer, "depth": depth}, notes


def _readout(
    state: Mapping[str, Tensor], trunk: Architecture, depth: int, stated: Stated, *, is_pretrained: bool
) -> dict[str, Any] | None:
    """Who reads the trunk for a classifier; None: the file is of pretraining."""
    pool = stated.facts.get("global_pool")
    is_fixed = trunk.positions["table"] == "sincos"
    unread = is_pretrained or "mask_token" in state or not trunk.class_token or is_fixed or pool == "avg"
    if depth:
        ratio = ratio_of(outputs_of(state, "blocks_token_only.0.mlp.fc1.weight"), trunk.dim)
        readout = {"kind": "class_attention", "depth": depth, "queries": 1, "mlp_ratio": ratio}
    elif "fc_norm.weight" in state:
        readout = {"kind": "mean"}
    elif "head.weight" not in state and unread:
        return None
    else:
        readout = {"kind": "token"}
    legal = ("avg",) if readout["kind"] == "mean" else ("token",)
    if (readout["kind"] == "token" and not trunk.class_token) or pool not in (None, "", *legal):
        raise ValueError(
            f"the file pools its tokens ({pool or 'it has no class token'}) in another way than mpm, which "
            "reads the class token after the norm or the mean of patches before it; drop head.* and norm.*"
        )
    return readout


def _classes(
    state: Mapping[str, Tensor], trunk: Architecture, readout: Mapping[str, Any] | None
) -> tuple[int | None, tuple[str, ...]]:
    """Number of classes, and the keys of heads that are not all there."""
    has_two = trunk.distillation_token and readout == {"kind": "token"}
    whole = [f"{head}.{leaf}" for head in ("head", "head_dist")[: 1 + has_two] for leaf in ("weight", "bias")]
    there = tuple(key for key in whole if key in state)
    return (outputs_of(state, "head.weight"), ()) if len(there) == len(whole) else (None, there)


def _layout(
    trunk: Architecture,
    readout: Mapping[str, Any] | None,
    predictor: Mapping[str, Any] | None,
    stated: Stated,
    *,
    has_timm_names: bool,
    has_slots: bool,
) -> str:
    """The first family whose mark is there; DeiT's files have none."""
    reads = None if readout is None else readout["kind"]
    marks = (
        ("timm", has_timm_names),
        ("simmim", stated.is_simmim),
        ("mae", predictor is not None and predictor["kind"] == "decoder"),
        ("cait", trunk.attention == "talking_heads" or reads == "class_attention"),
        ("beit", trunk.qkv_bias == "query_value" or trunk.positions["bias"] != "none"),
        ("timm", trunk.registers > 0 or not trunk.class_token),
        ("three_things", trunk.branches > 1 or trunk.stem != {"kind": "linear"}),
        ("mae", reads == "mean" or (reads is None and trunk.positions["table"] == "sincos")),
        ("deit3", trunk.layer_scale is not None),
        ("three_things", not has_slots),
    )
    layout = next((family for family, is_there in marks if is_there), "deit")
    if layout == "deit3" and has_slots:  # no family has both; timm's networks with rotary positions have
        raise ValueError(
            "blocks.0.gamma_1 and a class slot in pos_embed are found together with rotary positions only, "
            "which mpm has not"
        )
    return layout


def _is_beit2(state: Mapping[str, Tensor], stated: Stated) -> bool:
    """BEiT v2's files are BEiT's, but for the layers of its class-token pretraining."""
    told = f"{stated.source} {stated.facts.get('architecture', '')}".lower()
    return "beitv2" in told or any(key.startswith(_SECOND) for key in state)
