"""config.json and preprocessor_config.json of transformers' ViT, DeiT, BEiT and ViTMAE, and mpm's facts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpm.interop.facts import known_interpolation
from mpm.interop.huggingface_classes import Kind
from mpm.interop.keys import ratio_of
from mpm.variants import Architecture

__all__ = ["facts_of", "preprocessor_of", "settings_of", "stated_preprocessing", "with_defaults"]

_EPSILON = 1e-6  # of every LayerNorm of mpm
_DEFAULTS: dict[str, Any] = {  # what a config.json may leave out
    "image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "qkv_bias": True,
    "use_absolute_position_embeddings": False, "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False, "layer_scale_init_value": 0.1, "drop_path_rate": 0.1,
    "use_mean_pooling": True, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16, "decoder_intermediate_size": 2048, "mask_ratio": 0.75,
    "norm_pix_loss": False,
}  # fmt: skip
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers


def with_defaults(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the values that it leaves out."""
    return {**_DEFAULTS, **facts}


def facts_of(
    kind: Kind, settings: Mapping[str, Any], *, num_classes: int | None, tokens: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A network's facts as `load_official` gives them, without preprocessing, and what is to know about them.

    Args:
        kind: of network.
        settings: config.json with defaults.
        num_classes: of its heads; None: it has none.
        tokens: before the patches.

    Raises:
        ValueError: if mpm does not express them.
    """
    if settings["hidden_act"] != "gelu":
        raise ValueError(f"hidden_act {settings['hidden_act']} is none that mpm has; it can read gelu")
    dim, heads = settings["hidden_size"], settings["num_attention_heads"]
    if (settings.get("head_dim") or dim // heads) * heads != dim:
        raise ValueError(
            f"head_dim {settings['head_dim']} is not hidden_size / num_attention_heads, as mpm has it"
        )
    is_beit, is_mae = kind.model_type == "beit", kind.model_type == "vit_mae"
    shared, per_block = settings["use_shared_relative_position_bias"], settings["use_relative_position_bias"]
    if is_beit and shared and per_block:
        raise ValueError(
            "a shared relative position bias and one per block cannot both be had; mpm reads either"
        )
    if kind.name == "BeitForMaskedImageModeling" and not settings["use_mean_pooling"]:
        raise ValueError("use_mean_pooling false puts two norms before lm_head; mpm has one")
    distilled = tokens == 2 and kind.name != "DeiTForImageClassification"
    learned = not is_beit or settings["use_absolute_position_embeddings"]
    architecture = Architecture(
        patch_size=_pair(settings["patch_size"]),
        dim=dim,
        depth=settings["num_hidden_layers"],
        heads=heads,
        mlp_ratio=ratio_of(settings["intermediate_size"], dim),
        qkv_bias="query_value" if is_beit else "all" if settings["qkv_bias"] else "none",
        layer_scale=settings["layer_scale_init_value"] or None if is_beit else None,
        drop_path=float(settings["drop_path_rate"]) if is_beit else 0.0,
        distillation_token=distilled,
        registers=tokens - 1 - distilled,  # a distillation token that no head reads
        positions={
            "table": "sincos" if is_mae else "learned" if learned else "none",
            "bias": "none" if not is_beit else "shared" if shared else "per_block" if per_block else "none",
        },
    )
    predicts = kind.norm[1] == "predictor.norm"
    mean = is_beit and settings["use_mean_pooling"]
    facts = {
        "family": f"transformers-{kind.model_type}",
        "image_size": _pair(settings["image_size"]),
        "channels": settings["num_channels"],
        "backbone": architecture._asdict() | {"stem": dict(architecture.stem)},
        "readout": None if predicts else {"kind": "mean" if mean else "token"},
        "num_classes": num_classes,
        "predictor": _predictor(kind, settings),
    }
    return facts, tuple(_notes(kind, settings))


def _predictor(kind: Kind, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    if kind.name == "ViTMAEForPreTraining":
        width = settings["decoder_hidden_size"]
        if settings["decoder_intermediate_size"] != 4 * width:
            raise ValueError(
                f"decoder_intermediate_size {settings['decoder_intermediate_size']} is not 4 * {width}, "
                "as mpm's decoders have it"
            )
        depth, heads = settings["decoder_num_hidden_layers"], settings["decoder_num_attention_heads"]
        return {"kind": "decoder", "dim": width, "depth": depth, "heads": heads}
    return {"kind": "linear"} if "predictor.head" in kind.reader.values() else None


def _notes(kind: Kind, settings: Mapping[str, Any]) -> list[str]:
    notes = []
    epsilon = settings["layer_norm_eps"]
    if epsilon != _EPSILON:
        notes.append(
            f"layer_norm_eps {epsilon:g} becomes {_EPSILON:g}: "
            f"a normalised token of variance v changes by a factor of 1 - {(_EPSILON - epsilon) / 2:.1g} / v"
        )
    notes += [
        f"{key} {settings[key]} is left out: mpm trains with drop path instead of dropout"
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob")
        if settings[key]
    ]
    if kind.name == "ViTMAEForPreTraining":
        pixels = "normalised per patch" if settings["norm_pix_loss"] else "as they are"
        notes.append(f"it was trained with mask_ratio {settings['mask_ratio']} to predict pixels {pixels}")
    return notes


def settings_of(
    kind: Kind, config: Mapping[str, Any], *, outputs: int | None, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json of a network.

    Args:
        kind: of network.
        config: facts as `load_official` gives them.
        outputs: classes of a classifier, values that a predictor predicts; None: neither.
        classes: their names, where they have some.
    """
    backbone, predictor = config["backbone"], config.get("predictor") or {}
    sides, patch = config["image_size"], backbone["patch_size"]
    settings: dict[str, Any] = {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        "image_size": sides[0] if sides[0] == sides[1] else list(sides),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": config["channels"],
        "hidden_size": backbone["dim"],
        "num_hidden_layers": backbone["depth"],
        "num_attention_heads": backbone["heads"],
        "intermediate_size": int(backbone["dim"] * backbone["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": _EPSILON,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind.name.endswith("ForImageClassification") or kind.name.endswith("WithTeacher"):
        names = list(classes) or [f"LABEL_{index}" for index in range(outputs or 0)]
        settings["id2label"] = {str(index): name for index, name in enumerate(names)}
        settings["label2id"] = {name: index for index, name in enumerate(names)}
    match kind.model_type:
        case "beit":
            bias = backbone["positions"]["bias"]
            settings |= {
                "use_mask_token": "predictor.head" in kind.reader.values(),
                "use_absolute_position_embeddings": backbone["positions"]["table"] != "none",
                "use_relative_position_bias": bias == "per_block",
                "use_shared_relative_position_bias": bias == "shared",
                "layer_scale_init_value": backbone["layer_scale"] or 0.0,
                "drop_path_rate": backbone["drop_path"],
                "use_mean_pooling": "predictor.head" in kind.reader.values()
                or config["readout"] == {"kind": "mean"},
            }
            if kind.name == "BeitForMaskedImageModeling":
                settings["vocab_size"] = outputs
        case "vit_mae":
            settings["qkv_bias"] = True
            if predictor:
                settings |= {
                    "decoder_hidden_size": predictor["dim"],
                    "decoder_num_hidden_layers": predictor["depth"],
                    "decoder_num_attention_heads": predictor["heads"],
                    "decoder_intermediate_size": 4 * predictor["dim"],
                }
        case _:
            settings |= {"qkv_bias": backbone["qkv_bias"] != "none", "encoder_stride": patch[0]}
    return settings


def stated_preprocessing(
    facts: Mapping[str, Any], *, channels: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Mean, std, crop and interpolation of a preprocessor_config.json, and what is to know about them.

    Args:
        facts: the file's; empty: there is none.
        channels: of the images.
    """
    half = [0.5] * channels
    crop = 1.0
    if facts.get("do_center_crop") and facts.get("size"):
        crop = min(1.0, _side(facts.get("crop_size") or facts["size"]) / _side(facts["size"]))
    number = 2 if facts.get("resample") is None else facts["resample"]
    named = _INTERPOLATIONS[number] if number in range(len(_INTERPOLATIONS)) else f"number {number}"
    interpolation, told = known_interpolation(named)
    notes = [*told]
    preprocessing = {
        "mean": tuple(facts.get("image_mean") or half),
        "std": tuple(facts.get("image_std") or half),
        "crop": crop,
        "interpolation": interpolation,
    }
    if not facts:
        notes.append("there is no preprocessor_config.json: mean and std 0.5 are transformers' defaults")
    elif isinstance(facts.get("size"), Mapping) and "shortest_edge" not in facts["size"]:
        notes.append(
            "transformers squeezes images to a square; mpm keeps their proportions and crops the centre"
        )
    return preprocessing, tuple(notes)


def preprocessor_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of a network; images that are not square are squeezed.

    Args:
        config: facts as `load_official` gives them.
    """
    height, width = config["image_size"]
    is_square = height == width
    covered = math.floor(height / config["crop"])
    return {
        "image_processor_type": "BitImageProcessor" if is_square else "ViTImageProcessor",
        "do_convert_rgb": config["channels"] == 3,
        "do_resize": True,
        "size": {"shortest_edge": covered} if is_square else {"height": height, "width": width},
        "resample": _INTERPOLATIONS.index(config["interpolation"]),
        "do_center_crop": is_square,
        **({"crop_size": {"height": height, "width": width}} if is_square else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
    }


def _pair(sides: int | Sequence[int]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def _side(size: int | Mapping[str, int]) -> int:
    return size if isinstance(size, int) else next(side for side in size.values() if side is not None)
