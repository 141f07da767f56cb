"""What stands beside weights: config.json of timm and transformers, their preprocessing, names of classes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["check_facts", "class_names", "known_interpolation"]

_ABSENT = object()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are(is_one: Callable[[Any], bool], *, length: int | None = None) -> Callable[[Any], bool]:
    """A list, not empty, of what `is_one` accepts."""
    return lambda value: (
        isinstance(value, list | tuple)
        and (len(value) > 0 if length is None else len(value) == length)
        and all(map(is_one, value))
    )


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_side(value: Any) -> bool:
    return _is_count(value) or _are(_is_count, length=2)(value)


def _is_size(value: Any) -> bool:
    sides = [side for side in value.values() if side is not None] if isinstance(value, dict) else [value]
    return _are(_is_count)(sides)


def _are_names(value: Any) -> bool:
    return value in ([], ()) or _are(_is_string)(value)


def _are_labels(value: Any) -> bool:
    return isinstance(value, dict) and _are_names(list(value.values()))


# what mpm reads; a section stands before what is in it, and a key with ? may be null
_RULES: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda value: isinstance(value, dict),
        "an object",
        "args model_args? pretrained_cfg? preprocessor_config",
    ),
    (
        _is_string,
        "a string",
        "architecture? global_pool? model_type hidden_act model_args.pos_embed pretrained_cfg.interpolation",
    ),
    (
        _is_count,
        "a positive integer",
        "num_channels hidden_size head_dim? num_hidden_layers num_attention_heads intermediate_size "
        "decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads "
        "decoder_intermediate_size model_args.num_heads",
    ),
    (
        lambda value: isinstance(value, bool),
        "true or false",
        "qkv_bias use_absolute_position_embeddings use_relative_position_bias "
        "use_shared_relative_position_bias use_mean_pooling norm_pix_loss",
    ),
    (
        _is_number,
        "a number",
        "layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob layer_scale_init_value? "
        "drop_path_rate mask_ratio num_classes? preprocessor_config.resample?",
    ),
    (_is_positive, "a positive number", "pretrained_cfg.crop_pct"),
    (
        _are(_is_number),
        "a list of numbers",
        "pretrained_cfg.mean preprocessor_config.image_mean?",
    ),
    (
        _are(_is_positive),
        "a list of positive numbers",
        "pretrained_cfg.std preprocessor_config.image_std?",
    ),
    (_is_side, "a positive integer or two", "image_size patch_size"),
    (_are(_is_count, length=3), "three positive integers", "pretrained_cfg.input_size"),
    (_is_size, "a size in pixels", "preprocessor_config.size? preprocessor_config.crop_size?"),
    (_are_names, "a list of strings", "label_names? pretrained_cfg.label_names?"),
    (_are_labels, "an object of strings", "id2label?"),
)


def check_facts(facts: Mapping[str, Any]) -> None:
    """Whether what mpm reads of a config.json is of the right type.

    Raises:
        ValueError: if it is not.
    """
    for is_right, expected, keys in _RULES:
        for key in keys.split():
            value: Any = facts
            for part in key.removesuffix("?").split("."):
                value = (value or {}).get(part, _ABSENT) if value is not _ABSENT else value
            if value is _ABSENT or (value is None and key.endswith("?")) or is_right(value):
                continue
            given = " ".join(repr(value).split())[:60]
            raise ValueError(f"config.json has {key.removesuffix('?')} {given}, where {expected} is expected")


def class_names(facts: Mapping[str, Any], count: int | None) -> tuple[str, ...]:
    """As a config.json names them; none where they are placeholders, or not all there."""
    labels = facts.get("id2label") or {}
    placeholders = [f"LABEL_{index}" for index in range(count or 0)]
    names = [labels.get(str(index), labels.get(index, label)) for index, label in enumerate(placeholders)]
    if not labels or names == placeholders:
        names = facts.get("label_names") or (facts.get("pretrained_cfg") or {}).get("label_names") or []
    return tuple(names) if len(names) == count else ()


def known_interpolation(name: str) -> tuple[str, tuple[str, ...]]:
    """One that mpm has, and a note where it is another."""
    if name in ("bilinear", "bicubic"):
        return name, ()
    return "bicubic", (f"images were resized by {name}, which mpm has not; it takes bicubic",)
