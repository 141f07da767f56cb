"""Published weights to mpm's, and back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpm.backbones.adapt import adapt_state
from mpm.interop.facts import check_facts, class_names
from mpm.interop.files import Weights, read_weights, some, unwrap
from mpm.interop.folding import unit_layer_scale
from mpm.interop.geometry import is_sincos
from mpm.interop.keys import outputs_of
from mpm.interop.layouts import LAYOUTS, layout_for
from mpm.interop.names import PREFIX, names
from mpm.interop.networks import network_of
from mpm.interop.recognition import Stated, recognize
from mpm.interop.timm_twins import check_timm_architecture
from mpm.interop.tokens import TOKENS, form_of, tokens_in, tokens_out
from mpm.patchify.patches import grid_of
from mpm.patchify.positions import resample_table, sincos_table

__all__ = ["Official", "Report", "load_official", "official_of", "to_official"]

_TOKENS = ("backbone.prefix_tokens", "backbone.positions.table", "predictor.positions.table")


class Report(NamedTuple):
    """What became of each key of a file.

    Attributes:
        family: that it was recognised as.
        loaded: keys that were taken.
        resized: those of them that were resampled to another image size.
        dropped: keys that mpm has no use for.
        missing: mpm's names of weights that the file lacks; they start afresh.
        notes: what a reader should know.
    """

    family: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


class Official(NamedTuple):
    """A published network in mpm's form.

    Attributes:
        config: plain data: family, image_size, channels, mean, std, crop, interpolation, backbone (attributes
            of `mpm.variants.Architecture`), readout, num_classes, predictor, each
            None where there is none; classes: their names, where the file has them.
        state: mpm's names: backbone.*, readout.*, heads.*, predictor.*.
        report: what became of each key.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    report: Report


# In


def load_official(
    path_or_state_dict: str | Path | Mapping[str, Any],
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Official:
    """Weights of DeiT, DeiT III, "Three things", CaiT, BEiT, BEiT v2, MAE, SimMIM, timm or transformers.

    The family is told by the keys; one that nothing explains is an error. Weights of 16 bits become float32.

    Args:
        path_or_state_dict: a file, a folder as of the Hugging Face hub, or what a file holds.
        heads: of attention; needed where neither the keys nor the width tell.
        decoder_heads: of MAE's decoder; needed where its width is not the published 512.
        image_size: side, or height and width, in pixels. Positions of another square grid are resampled;
            those whose number fits it are taken to be of this one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is broken, of no known family, or has keys that nothing explains.
    """
    if isinstance(path_or_state_dict, Mapping):
        weights, source = unwrap(path_or_state_dict), ""
    else:
        weights, source = read_weights(path_or_state_dict), Path(path_or_state_dict).name
    return official_of(
        weights, source=source, heads=heads, decoder_heads=decoder_heads, image_size=image_size
    )


def official_of(
    weights: Weights,
    *,
    source: str = "",
    heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Official:
    """The network of weights and of the facts beside them; `source` is the name of their file.

    Others and errors: see `load_official`.
    """
    check_facts(weights.facts)
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    state = {key: _widened(tensor) for key, tensor in weights.state.items()}
    if broken := [key for key, tensor in state.items() if not (tensor.is_meta or tensor.isfinite().all())]:
        raise ValueError(f"weights that are not finite: {some(broken)}; use another checkpoint")
    if _is_transformers(weights):
        from mpm.interop.huggingface import from_transformers

        official = from_transformers(state, weights.facts)
    else:
        stated = Stated(weights.facts, source, heads=heads, decoder_heads=decoder_heads, image_size=sides)
        official = _read(state, stated)
    official.config["classes"] = class_names(weights.facts, official.config["num_classes"])
    return official if sides in (None, official.config["image_size"]) else _resized(official, sides)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _is_transformers(weights: Weights) -> bool:
    has_names = any(
        part in key for key in weights.state for part in ("encoder.layer.", "embeddings.cls_token")
    )
    if has_names and "model_type" not in weights.facts:
        raise ValueError(
            "these are weights of transformers, which need their config.json; give the folder of both"
        )
    return "model_type" in weights.facts


def _read(file: dict[str, Tensor], stated: Stated) -> Official:
    """A file of an official family or of timm."""
    prefix = PREFIX["simmim"]
    if all(key.startswith((prefix, "decoder.")) for key in file):
        stated = stated._replace(is_simmim=True)
        file = {key.removeprefix(prefix): tensor for key, tensor in file.items()}
    check_timm_architecture(stated.facts)
    layout, config, dropped, notes = recognize(file, stated)
    family, patch_size = config["family"], config["backbone"]["patch_size"]
    state, token_notes = tokens_in(file, config)
    table = {ours: theirs for ours, theirs in names(layout, config).items() if theirs in file}
    taken = {*table.values(), *TOKENS.values(), "pos_embed"}
    if "predictor.positions.table" in state:
        taken.add("decoder_pos_embed")
    if unknown := [key for key in file if key not in taken and key not in dropped]:
        raise ValueError(
            f"{len(unknown)} of {len(file)} keys mean nothing in {family} networks as mpm knows them; take "
            "them out of the file if the network computes nothing with them: "
            f"{some(unknown)}"
        )
    with torch.device("meta"):
        expected = network_of(config, out_dim=_out_dim(file, layout, config)).state_dict()
        vector = torch.empty(config["backbone"]["dim"])  # a norm, a mask token: a predictor without its head
    forms = {ours: form_of(ours, layout, patch_size) for ours in table}
    for ours, theirs in table.items():
        fitting = forms[ours].outward(expected.get(ours, vector)).shape
        if file[theirs].shape != fitting:
            raise ValueError(f"{theirs} is {list(file[theirs].shape)}, where {list(fitting)} is expected")
        state[ours] = forms[ours].inward(file[theirs])
    assert all(state[name].shape == tensor.shape for name, tensor in expected.items() if name in state)
    missing = tuple(name for name in expected if name not in state)
    if lost := [name for name in missing if name.startswith(("backbone.", "readout."))]:
        raise ValueError(
            f"the file lacks weights of its {family} network, {len(lost)} in mpm's names: {some(lost)}; "
            "it may be a part, or another architecture"
        )
    loaded = tuple(_outer(family, key) for key in file if key in taken)
    dropped = tuple(_outer(family, key) for key in dropped)
    return Official(config, state, Report(family, loaded, (), dropped, missing, (*token_notes, *notes)))


def _outer(layout: str, key: str) -> str:
    """A key of a layout with the prefix that its files have."""
    return key if key.startswith("decoder.") else PREFIX.get(layout, "") + key


def _out_dim(file: Mapping[str, Tensor], layout: str, config: Mapping[str, Any]) -> int:
    """Width of a prediction; 0: there is no predictor."""
    if layout == "simmim":
        return math.prod(config["backbone"]["patch_size"]) * config["channels"]
    key = next((key for key in ("lm_head.weight", "decoder_pred.weight") if key in file), None)
    return 0 if key is None else outputs_of(file, key)


def _resized(official: Official, image_size: tuple[int, int]) -> Official:
    """The network for images of another size, its positions resampled."""
    config, state = official.config, dict(official.state)
    trunk, channels = config["backbone"], config["channels"]
    grids = grid_of(config["image_size"], trunk["patch_size"]), grid_of(image_size, trunk["patch_size"])
    notes = []
    prefix = "backbone."
    backbone = {
        name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
    }
    adapted = adapt_state(backbone, grids=grids, channels=(channels, channels), depth=0)
    state |= {prefix + name: tensor for name, tensor in adapted.items()}
    if trunk["positions"]["table"] == "sincos":
        trunk = trunk | {"positions": trunk["positions"] | {"table": "learned"}}
        notes.append(
            "resampled, the sine-cosine positions are no longer those of a formula: they are learned now"
        )
    decoder_table = "predictor.positions.table"
    if (table := state.get(decoder_table)) is not None and is_sincos(table, grids[0]):
        state[decoder_table] = sincos_table(grids[1], table.shape[1]).to(table)
        notes.append("the sine-cosine positions of the decoder are computed for the new image size")
    elif table is not None:
        state[decoder_table] = resample_table(table, *grids)
    keys = {"backbone.positions.table": "pos_embed", decoder_table: "decoder_pos_embed"}
    if config["family"] in LAYOUTS:
        keys |= names(config["family"], config)
    changed = [name for name, tensor in state.items() if tensor is not official.state[name]]
    resized = tuple(_outer(config["family"], keys.get(name, name)) for name in changed)
    report = official.report._replace(resized=resized, notes=(*official.report.notes, *notes))
    return Official({**config, "image_size": image_size, "backbone": trunk}, state, report)


# Out


def to_official(
    state: Mapping[str, Tensor], config: Mapping[str, Any], *, layout: str | None = None
) -> dict[str, Tensor]:
    """A network's weights as a family's own code, or timm, has them; `load_official` reads them back.

    `pos_embed` has rows of zeros for prefix tokens where that family's has them. Indices that the families
    recompute (`relative_position_index`) are left out.

    Args:
        state: of mpm, on any device, `meta` too.
        config: facts as `load_official` gives them.
        layout: deit, deit3, three_things, cait, beit, mae, simmim or timm; None: the network's own family.
            Of timm's classes, it is the one that can hold the network: VisionTransformer (`no_embed_class`
            for DeiT III and registers), VisionTransformerDistilled, Beit, or Cait.

    Raises:
        ValueError: if the layout cannot hold the network, or the state is not of it.
    """
    chosen = layout_for(layout or config["family"], config)
    if chosen in ("cait", "timm Cait"):
        state, config = unit_layer_scale(state, config)
    table = names(chosen, config)
    if lost := [name for name in table if name.startswith(("backbone.", "readout.")) and name not in state]:
        raise ValueError(f"the state lacks {some(lost)} of the network that config describes")
    official = tokens_out(state, config, slots=LAYOUTS[chosen].slots)
    for name, tensor in state.items():
        if name in table:
            official[table[name]] = form_of(name, chosen, config["backbone"]["patch_size"]).outward(tensor)
        elif name not in _TOKENS:
            raise ValueError(
                f"{name} has no place in the {chosen} layout of the network that config describes"
            )
    return {_outer(chosen, key): tensor for key, tensor in official.items()}
