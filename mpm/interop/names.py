"""Names of parameters in mpm and in the files of each family: one table, read both ways.

Prefix tokens and positions are not in it: they do not map one to one, see `mpm.interop.tokens`.
"""

from collections.abc import Mapping
from typing import Any

from mpm.patchify.stems import merge_factors

__all__ = ["PREFIX", "names"]

PREFIX = {"simmim": "encoder."}  # of all names but the decoder's

# the parts of a block: norm, attention, LayerScale, norm, MLP, LayerScale
_BLOCK = ("norm1", "attn", "ls1.gamma", "norm2", "mlp", "ls2.gamma")
_PARALLEL = tuple(
    f"{half}.{{j}}.{part}"
    for half, parts in {"attns": ("norm", "attn", "ls.gamma"), "ffns": ("norm", "mlp", "ls.gamma")}.items()
    for part in parts
)
# timm's are mpm's. The official ones number the branches from the second on; two are published, others follow
_OFFICIAL = ("norm1", "attn", "gamma_1", "norm2", "mlp", "gamma_2")
_OFFICIAL_NUMBERED = ("norm1{j}", "attn{j}", "gamma_1_{j}", "norm2{j}", "mlp{j}", "gamma_2_{j}")
_DECODER = {"branches": 1, "attention": "softmax", "qkv_bias": "all", "layer_scale": None}


def names(layout: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Name of each parameter of a network in mpm -> in a layout, without `PREFIX`.

    Args:
        layout: of `mpm.interop.layouts.LAYOUTS`.
        config: facts as `load_official` gives them.
    """
    trunk = config["backbone"]
    paired = _stem(trunk) | _biases(trunk)
    for index in range(trunk["depth"]):
        paired |= _block(f"backbone.blocks.{index}", f"blocks.{index}", trunk, layout)
    return paired | _reader(config["readout"], trunk, config["num_classes"]) | _predictor(layout, config)


def _affine(ours: str, theirs: str) -> dict[str, str]:
    """A Linear layer, a convolution or a norm."""
    return {f"{ours}.{leaf}": f"{theirs}.{leaf}" for leaf in ("weight", "bias")}


def _norm(ours: str, theirs: str, kind: str) -> dict[str, str]:
    statistics = ("running_mean", "running_var", "num_batches_tracked") if kind == "batch" else ()
    return _affine(ours, theirs) | {f"{ours}.{leaf}": f"{theirs}.{leaf}" for leaf in statistics}


def _stem(trunk: Mapping[str, Any]) -> dict[str, str]:
    ours, theirs, stem = "backbone.stem", "patch_embed", trunk["stem"]
    paired: dict[str, str] = {}
    match stem["kind"]:
        case "linear":
            paired |= _affine(f"{ours}.proj", f"{theirs}.proj")
            norm = stem.get("norm", "none")
            return paired if norm == "none" else paired | _norm(f"{ours}.norm", f"{theirs}.norm", norm)
        case "hmlp":  # a Sequential of convolution, norm, GELU, convolution, ...
            for step in range(len(merge_factors(trunk["patch_size"][0]))):
                paired |= _affine(f"{ours}.projs.{step}", f"{theirs}.proj.{3 * step}")
                paired |= _norm(
                    f"{ours}.norms.{step}", f"{theirs}.proj.{3 * step + 1}", stem.get("norm", "batch")
                )
        case "conv":  # nowhere published
            for step in range(trunk["patch_size"][0].bit_length() - 1):
                paired |= _affine(f"{ours}.convs.{step}", f"{theirs}.convs.{step}")
                paired |= _norm(f"{ours}.norms.{step}", f"{theirs}.norms.{step}", stem.get("norm", "batch"))
    return paired


def _biases(trunk: Mapping[str, Any]) -> dict[str, str]:
    ours = "backbone.relative_biases.{}.bias_table"
    match trunk["positions"]["bias"]:
        case "shared":
            return {ours.format(0): "rel_pos_bias.relative_position_bias_table"}
        case "per_block":
            theirs = "blocks.{}.attn.relative_position_bias_table"
            return {ours.format(index): theirs.format(index) for index in range(trunk["depth"])}
    return {}


def _block(ours: str, theirs: str, trunk: Mapping[str, Any], layout: str) -> dict[str, str]:
    paired: dict[str, str] = {}
    for j in range(trunk["branches"]):
        mine = _BLOCK if trunk["branches"] == 1 else _PARALLEL
        if layout.startswith("timm") and layout not in ("timm Beit", "timm Cait"):
            other = mine
        else:
            other = _OFFICIAL_NUMBERED if j else _OFFICIAL
        parts = [
            (f"{ours}.{a.format(j=j)}", f"{theirs}.{b.format(j=j)}") for a, b in zip(mine, other, strict=True)
        ]
        norm1, attention, scale1, norm2, mlp, scale2 = parts
        paired |= _affine(*norm1) | _attention(*attention, trunk) | _affine(*norm2)
        for layer in ("fc1", "fc2"):
            paired |= _affine(f"{mlp[0]}.{layer}", f"{mlp[1]}.{layer}")
        if trunk["layer_scale"] is not None:
            paired |= dict((scale1, scale2))
    return paired


def _attention(ours: str, theirs: str, trunk: Mapping[str, Any]) -> dict[str, str]:
    paired = {f"{ours}.qkv.weight": f"{theirs}.qkv.weight"} | _affine(f"{ours}.proj", f"{theirs}.proj")
    biases = {"all": ("qkv.bias",), "query_value": ("q_bias", "v_bias"), "none": ()}[trunk["qkv_bias"]]
    paired |= {f"{ours}.{bias}": f"{theirs}.{bias}" for bias in biases}
    if trunk["attention"] == "talking_heads":
        for mixing in ("proj_l", "proj_w"):
            paired |= _affine(f"{ours}.attend.{mixing}", f"{theirs}.{mixing}")
    return paired


def _reader(
    readout: Mapping[str, Any] | None, trunk: Mapping[str, Any], num_classes: int | None
) -> dict[str, str]:
    """Readout and heads."""
    if readout is None:
        return {}
    paired = _affine("readout.norm", "fc_norm" if readout["kind"] == "mean" else "norm")
    has_two = readout["kind"] == "token" and trunk["distillation_token"]
    if readout["kind"] == "class_attention":
        paired["readout.tokens"] = "cls_token"
        for index in range(readout.get("depth", 2)):
            paired |= _class_attention(f"readout.blocks.{index}", f"blocks_token_only.{index}", trunk)
    if num_classes is not None:
        paired |= _affine("heads.0", "head") | (_affine("heads.1", "head_dist") if has_two else {})
    return paired


def _class_attention(ours: str, theirs: str, trunk: Mapping[str, Any]) -> dict[str, str]:
    layers = ("norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    paired: dict[str, str] = {}
    for layer in layers:
        paired |= _affine(f"{ours}.{layer}", f"{theirs}.{layer}")
    if trunk["layer_scale"] is not None:
        paired |= {f"{ours}.ls{n}.gamma": f"{theirs}.gamma_{n}" for n in (1, 2)}
    return paired


def _predictor(layout: str, config: Mapping[str, Any]) -> dict[str, str]:
    """What reads the trunk in pretraining; its norm and mask token may be there without its head."""
    if config["readout"] is not None:
        return {}
    predictor = config["predictor"]
    paired = _affine("predictor.norm", "norm")
    if predictor is None or predictor["kind"] != "decoder":
        paired["predictor.encoder_mask_token"] = "mask_token"
        if predictor is None:
            return paired
        paired |= _affine("predictor.head", "decoder.0" if layout == "simmim" else "lm_head")
        for index in range(predictor.get("depth", 0)):  # of class pretraining
            ours, theirs = f"predictor.blocks.{index}", f"cls_pt_layers.{index}"
            paired |= _block(ours, theirs, config["backbone"], layout)
        return paired
    paired["predictor.mask_token"] = "mask_token"
    for ours, theirs in {"embed": "embed", "decoder_norm": "norm", "head": "pred"}.items():
        paired |= _affine(f"predictor.{ours}", f"decoder_{theirs}")
    for index in range(predictor["depth"]):
        paired |= _block(f"predictor.blocks.{index}", f"decoder_blocks.{index}", _DECODER, layout)
    return paired
