"""Weights of transformers' ViT, DeiT, BEiT and ViTMAE to mpm's, and back."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mpm.interop.files import some
from mpm.interop.folding import fold_layer_scale
from mpm.interop.geometry import is_sincos
from mpm.interop.huggingface_classes import Kind, classic, head_of, kind_for, kind_of, names_of, rename
from mpm.interop.huggingface_settings import (
    facts_of,
    preprocessor_of,
    settings_of,
    stated_preprocessing,
    with_defaults,
)
from mpm.interop.networks import network_of
from mpm.interop.official import Official, Report
from mpm.patchify.patches import grid_of

__all__ = ["TransformersFiles", "from_transformers", "to_transformers"]

_TYPES = {"vit": "vit.", "deit": "deit.", "beit": "beit.", "vit_mae": "vit."}  # and their trunks' prefix
_TOKENS = ("embeddings.cls_token", "embeddings.distillation_token")
_UNUSED = re.compile(r"pooler\.dense\.|relative_position_index|embeddings\.mask_token$")
_PIXELS = "(c h w) ... -> (h w c) ..."  # their order of a patch's pixels, where a convolution has them


class TransformersFiles(NamedTuple):
    """What a folder for `from_pretrained` holds.

    Attributes:
        state: of model.safetensors, classic names.
        config: of config.json.
        preprocessor: of preprocessor_config.json.
        notes: what a reader of the folder should know.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    notes: tuple[str, ...]


# In


def from_transformers(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Official:
    """A ViT, DeiT, BEiT or ViTMAE: alone, as a classifier, or for masked modelling.

    Args:
        state: its weights, with the names of version 4 or 5.
        facts: its config.json; under "preprocessor_config" the file of that name, where there is one.

    Raises:
        ValueError: if it is another network, or has what mpm does not express.
    """
    model_type = facts.get("model_type")
    if model_type not in _TYPES:
        raise ValueError(
            f"config.json has model_type {model_type}; of transformers, mpm reads {', '.join(_TYPES)}"
        )
    files_names = {classic(name): name for name in state}
    kind = kind_of(model_type, files_names)
    if not kind.trunk:  # a classifier that has lost its head has a prefix, too
        files_names = {name.removeprefix(_TYPES[model_type]): file for name, file in files_names.items()}
    tokens = [name for token in _TOKENS if (name := kind.trunk + token) in files_names]
    heads, dropped = _heads(kind, files_names)
    num_classes = len(state[heads[0]]) if heads else None
    config, notes = facts_of(kind, with_defaults(facts), num_classes=num_classes, tokens=len(tokens))
    preprocessing, more = stated_preprocessing(
        facts.get("preprocessor_config", {}), channels=config["channels"]
    )
    names = _names(kind, config)
    ours: dict[str, Tensor] = {}
    if dropped:
        more += (f"of the classes' heads there is only {some(dropped)}, so the classes are left out",)
    for name, file_name in files_names.items():
        if new := rename(name, names):
            ours[new] = state[file_name]
        elif name not in tokens and _UNUSED.search(name):
            dropped.append(file_name)
        elif name not in tokens:
            raise ValueError(f"{file_name} is no weight that mpm knows of a {kind.name}")
    lost = [theirs for theirs, part in names.items() if _is_lost(part, ours, config)]
    if lost or not tokens:
        first = lost[0] if lost else f"{kind.trunk}{_TOKENS[0]}"
        raise ValueError(f"the weights lack {first} of the {kind.name} that config.json describes")
    ours["backbone.prefix_tokens"] = torch.cat([state[files_names[token]][0] for token in tokens])  # [R,D]
    _take_their_shapes(ours, config)
    _name_positions(ours, config)
    missing = _check(ours, config)
    loaded = tuple(name for name in state if name not in dropped)
    report = Report(config["family"], loaded, (), tuple(dropped), missing, notes + more)
    return Official({**config, **preprocessing}, ours, report)


def _heads(kind: Kind, files_names: dict[str, str]) -> tuple[list[str], list[str]]:
    """The file's names of the heads, and of heads that are not all there; those are taken out, in place."""
    theirs = [head for head, ours in kind.reader.items() if ours.startswith("heads.")]
    whole = [f"{head}.{leaf}" for head in theirs for leaf in ("weight", "bias")]
    if all(name in files_names for name in whole):
        return [files_names[name] for name in whole], []
    return [], [files_names.pop(name) for name in whole if name in files_names]


def _name_positions(state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Positions of a MAE are learned ones where they are not the fixed ones, in place: it was resized."""
    backbone = config["backbone"]
    if backbone["positions"]["table"] == "sincos":
        grid = grid_of(config["image_size"], backbone["patch_size"])
        if not is_sincos(state["backbone.positions.table"], grid):
            backbone["positions"] = backbone["positions"] | {"table": "learned"}


def _names(kind: Kind, config: Mapping[str, Any]) -> dict[str, str]:
    backbone, predictor = config["backbone"], config["predictor"] or {}
    return names_of(
        kind,
        depth=backbone["depth"],
        decoder_depth=predictor.get("depth", 0),
        bias=backbone["positions"]["bias"],
        mean=kind.model_type == "beit" and config["readout"] == {"kind": "mean"},
    )


def _is_lost(part: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a part that every trunk has is not there; LayerScale and biases are checked later."""
    if part == "backbone.positions.table" and config["backbone"]["positions"]["table"] == "none":
        return False
    is_needed = part.startswith("backbone.") and not part.endswith(".gamma")
    return is_needed and part not in state and f"{part}.weight" not in state


def _check(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare weights with the network that a description says.

    Returns: names of that network that are missing, none of its trunk or of a classifier.

    Raises:
        ValueError: if one has another shape or no place, or the trunk is not whole.
    """
    head = state.get("predictor.head.weight")
    with torch.device("meta"):
        expected = network_of(config, out_dim=0 if head is None else len(head)).state_dict()
    for name, tensor in state.items():
        shape = list(expected[name].shape) if name in expected else list(tensor.shape)
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, where config.json makes it {shape}")
        if name.startswith("backbone.") and name not in expected:
            raise ValueError(f"the weights have {name}, and by config.json there is none")
    missing = tuple(name for name in expected if name not in state)
    whole = ("backbone.", "readout.") if config["num_classes"] else "backbone."
    if lost := [name for name in missing if name.startswith(whole)]:
        raise ValueError(f"the weights lack {lost[0]}, which there is by config.json")
    return missing


def _take_their_shapes(state: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Our names with their shapes -> our shapes, in place."""
    backbone = config["backbone"]
    stem = "backbone.stem.proj.weight"
    state[stem] = rearrange(state[stem], "d c h w -> d (h w c)")
    table = "backbone.positions.table"
    if table in state:
        R = len(state["backbone.prefix_tokens"])
        state["backbone.prefix_tokens"] = state["backbone.prefix_tokens"] + state[table][0, :R]
        state[table] = state[table][0, R:]  # [N,D]
    for token in ("predictor.mask_token", "predictor.encoder_mask_token"):
        if token in state:
            state[token] = state[token].flatten()
    if (decoder_table := state.get("predictor.positions.table")) is not None:
        if decoder_table[0, 0].any():
            raise ValueError(
                "decoder_pos_embed moves the class token, which mpm's decoder cannot; it must be 0 there"
            )
        state["predictor.positions.table"] = decoder_table[0, 1:]
    head = "predictor.head.weight"
    if head in state and state[head].dim() == 4:  # a convolution before a pixel shuffle
        axes = dict(zip("hw", backbone["patch_size"], strict=True))
        state[head] = rearrange(state[head].flatten(1), _PIXELS, **axes)
        state["predictor.head.bias"] = rearrange(state["predictor.head.bias"], _PIXELS, **axes)
    for name in [name for name in state if name.endswith(".attn.q.weight")]:
        kind = backbone["qkv_bias"] if name.startswith("backbone") else "all"
        _fuse(state, name.removesuffix("q.weight"), kind)


def _fuse(state: dict[str, Tensor], attention: str, kind: str) -> None:
    """Queries, keys and values to one map, in place."""
    weights = [state.pop(f"{attention}{part}.weight") for part in "qkv"]
    biases = [state.pop(f"{attention}{part}.bias", None) for part in "qkv"]
    state[f"{attention}qkv.weight"] = torch.cat(weights)  # [3D,D]
    filled = [
        weight.new_zeros(len(weight)) if b is None else b for weight, b in zip(weights, biases, strict=True)
    ]
    match kind:
        case "all":
            state[f"{attention}qkv.bias"] = torch.cat(filled)
        case "query_value":
            state[f"{attention}q_bias"], _, state[f"{attention}v_bias"] = filled


# Out


def to_transformers(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    classes: Sequence[str] = (),
    settings: Mapping[str, Any] = MappingProxyType({}),
    target: str | None = None,
) -> TransformersFiles:
    """The files of a folder that transformers' `from_pretrained` reads.

    A trunk with a relative position bias, or whose patches are averaged, becomes a BEiT, a MAE with its
    decoder a ViTMAE, one with a distillation token a DeiT, others a ViT. LayerScale is folded into the maps
    before it but in BEiT, which has it. A predictor that is no head of these is left out.

    Args:
        state: mpm's weights: backbone, readout, heads, predictor.
        config: facts as `load_official` gives them.
        classes: names of the classes.
        settings: further values of config.json, such as norm_pix_loss.
        target: what the predictor predicts, "pixels", "codes" or another; None: what its width says.

    Raises:
        ValueError: if transformers has no such network.
    """
    head = head_of(state, config, target=target)
    notes = []
    if head is None and "predictor.head.weight" in state:
        norm = "predictor.norm."
        state = {n: t for n, t in state.items() if n.startswith(norm) or not n.startswith("predictor.")}
        config = {**config, "predictor": None}
        notes.append("What predicted hidden patches is left out: transformers has no such head.")
    kind = kind_for(state, config, head=head)
    state = dict(state)
    if "predictor.norm.weight" in state and kind.norm[1] == "readout.norm":  # a trunk alone
        for part in ("weight", "bias"):
            state[f"readout.norm.{part}"] = state.pop(f"predictor.norm.{part}")
    if kind.model_type != "beit" and config["backbone"]["layer_scale"] is not None:
        fold_layer_scale(state)
        notes.append("LayerScale is folded into the maps before it (exact).")
    outputs = next((len(state[n]) for n in ("heads.0.weight", "predictor.head.weight") if n in state), None)
    settings = settings_of(kind, config, outputs=outputs, classes=classes) | dict(settings)
    _give_their_shapes(state, kind, config, key_bias=bool(settings.get("qkv_bias")))
    names = {ours: theirs for theirs, ours in _names(kind, dict(config)).items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name if name.startswith(kind.trunk + "embeddings.") else rename(name, names)
        assert new is not None, name
        renamed[new] = tensor.contiguous()
    return TransformersFiles(renamed, settings, preprocessor_of(config), tuple(notes))


def _give_their_shapes(
    state: dict[str, Tensor], kind: Kind, config: Mapping[str, Any], *, key_bias: bool
) -> None:
    """Our names with our shapes -> our names with their shapes, tokens with their names, in place."""
    backbone = config["backbone"]
    axes = dict(zip("hw", backbone["patch_size"], strict=True))
    stem = "backbone.stem.proj.weight"
    state[stem] = rearrange(state[stem], "d (h w c) -> d c h w", **axes)
    tokens = state.pop("backbone.prefix_tokens")  # [R,D]
    for name, token in zip(_TOKENS, tokens, strict=False):
        state[kind.trunk + name] = token[None, None].clone()
    table = "backbone.positions.table"
    if table in state:
        state[table] = torch.cat([torch.zeros_like(tokens), state[table]])[None]  # [1,R+N,D]
    elif kind.model_type != "beit":
        N = (config["image_size"][0] // axes["h"]) * (config["image_size"][1] // axes["w"])
        state[table] = tokens.new_zeros(1, len(tokens) + N, backbone["dim"])
    for token in ("predictor.mask_token", "predictor.encoder_mask_token"):
        if token in state:
            state[token] = state[token][None, None]
    if (decoder_table := state.get("predictor.positions.table")) is not None:
        slot = torch.zeros_like(decoder_table[:1])
        state["predictor.positions.table"] = torch.cat([slot, decoder_table])[None]
    head = "predictor.head.weight"
    if "decoder.0" in kind.reader:
        back = "(h w c) ... -> (c h w) ..."
        state[head] = rearrange(state[head], back, **axes)[:, :, None, None]
        state["predictor.head.bias"] = rearrange(state["predictor.head.bias"], back, **axes)
    for name in [name for name in state if name.endswith(".attn.qkv.weight")]:
        _split(state, name.removesuffix("qkv.weight"), is_beit=kind.model_type == "beit", biased=key_bias)


def _split(state: dict[str, Tensor], attention: str, *, is_beit: bool, biased: bool) -> None:
    """One map to queries, keys and values, in place. BEiT has no bias of keys, which softmax cancels."""
    weight = state.pop(f"{attention}qkv.weight")
    zeros = weight.new_zeros(len(weight) // 3)
    fused = state.pop(f"{attention}qkv.bias", None)
    q_bias, v_bias = (state.pop(f"{attention}{part}_bias", zeros) for part in "qv")
    biases = (q_bias, zeros, v_bias) if fused is None else fused.chunk(3)
    for part, part_weight, bias in zip("qkv", weight.chunk(3), biases, strict=True):
        state[f"{attention}{part}.weight"] = part_weight
        if part != "k" if is_beit else biased:
            state[f"{attention}{part}.bias"] = bias.clone()
