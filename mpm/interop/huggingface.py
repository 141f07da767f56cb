"""Weights of transformers' ViT, DeiT, BEiT and ViTMAE to mpm's, and back."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
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
from mpm.interop.huggingface_shapes import TOKENS, give_their_shapes, take_their_shapes
from mpm.interop.networks import network_of
from mpm.interop.official import Official, Report
from mpm.patchify.patches import grid_of

__all__ = ["TransformersFiles", "from_transformers", "to_transformers"]

_TYPES = {"vit": "vit.", "deit": "deit.", "beit": "beit.", "vit_mae": "vit."}  # and their trunks' prefix
_UNUSED = re.compile(r"pooler\.dense\.|relative_position_index|embeddings\.mask_token$")


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
    tokens = [name for token in TOKENS if (name := kind.trunk + token) in files_names]
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
        first = lost[0] if lost else f"{kind.trunk}{TOKENS[0]}"
        raise ValueError(f"the weights lack {first} of the {kind.name} that config.json describes")
    ours["backbone.prefix_tokens"] = torch.cat([state[files_names[token]][0] for token in tokens])  # [R,D]
    take_their_shapes(ours, config)
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
    give_their_shapes(state, kind, config, key_bias=bool(settings.get("qkv_bias")))
    names = {ours: theirs for theirs, ours in _names(kind, dict(config)).items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name if name.startswith(kind.trunk + "embeddings.") else rename(name, names)
        assert new is not None, name
        renamed[new] = tensor.contiguous()
    return TransformersFiles(renamed, settings, preprocessor_of(config), tuple(notes))
