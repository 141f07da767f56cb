"""What the files of each family can hold.

The families are the official ones, as their authors released them, and timm's. Two of timm's classes have
names and shapes of an official family: its `Beit` those of BEiT, its `Cait` those of CaiT.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["LAYOUTS", "Layout", "layout_for"]

_ANY: tuple[Any, ...] = ()


class Layout(NamedTuple):
    """What a family's networks can be.

    Attributes:
        slots: whether `pos_embed` has a row for each prefix token.
        takes: legal traits of a network, see `_traits`; no values: any.
    """

    slots: bool
    takes: Mapping[str, tuple[Any, ...]]


_DEIT: dict[str, tuple[Any, ...]] = {
    "branches": (1,),
    "attention": ("softmax",),
    "qkv_bias": ("all", "none"),
    "layer_scale": (False,),
    "class_token": (True,),
    "distillation_token": (True, False),
    "registers": (0,),
    "stem": ("linear", "linear with layer norm", "linear with batch norm", "hmlp", "conv"),
    "positions.table": ("learned", "sincos"),
    "positions.bias": ("none",),
    "readout": ("token", "none"),
    "predictor": ("none",),
}
_THREE_THINGS = _DEIT | {
    "branches": _ANY,
    "layer_scale": _ANY,
    "distillation_token": (False,),
}
_CAIT = _DEIT | {
    "attention": ("talking_heads",),
    "qkv_bias": ("all",),
    "layer_scale": _ANY,  # without, factors of 1 are written
    "class_token": (False,),
    "distillation_token": (False,),
    "readout": ("class_attention of 1 query",),
}
_BEIT = _DEIT | {
    "qkv_bias": ("query_value", "none"),
    "layer_scale": _ANY,
    "distillation_token": (False,),
    "positions.table": _ANY,
    "positions.bias": _ANY,
    "readout": ("mean", "token", "none"),
    "predictor": ("linear", "class_pretraining", "none"),
}
_TIMM = _DEIT | {
    "branches": _ANY,
    "layer_scale": _ANY,
    "class_token": _ANY,
    "distillation_token": (False,),
    "registers": _ANY,
    "stem": ("linear", "linear with layer norm"),
    "positions.table": _ANY,
    "readout": ("token", "mean", "none"),
}
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "deit": Layout(True, _DEIT),
        "deit3": Layout(False, _THREE_THINGS | {"branches": (1,)}),
        "three_things": Layout(False, _THREE_THINGS),
        "cait": Layout(False, _CAIT),
        "beit": Layout(True, _BEIT),
        "mae": Layout(
            True,
            _DEIT | {"distillation_token": (False,), "readout": ("mean", "token", "none"), "predictor": _ANY},
        ),
        "simmim": Layout(True, _BEIT | {"readout": ("none",), "predictor": ("linear", "none")}),
        "timm": Layout(True, _TIMM),
        "timm without slots": Layout(False, _TIMM),
        "timm distilled": Layout(
            True, _DEIT | {"layer_scale": _ANY, "branches": _ANY, "stem": _TIMM["stem"]}
        ),
        "timm Beit": Layout(True, _BEIT | {"stem": ("linear",), "predictor": ("none",)}),
        "timm Cait": Layout(False, _CAIT | {"stem": ("linear",)}),
    }
)


def layout_for(name: str, config: Mapping[str, Any]) -> str:
    """The layout, of those that share a public name, that can hold a network.

    Args:
        name: of a family.
        config: facts as `load_official` gives them.

    Raises:
        ValueError: if the layout is unknown, or cannot hold it.
    """
    if name not in LAYOUTS or " " in name:
        known = ", ".join(layout for layout in LAYOUTS if " " not in layout)
        raise ValueError(f"layout {name} is unknown; use one of {known}")
    chosen = _timm_layout(config) if name == "timm" else name
    for trait, value in _traits(config).items():
        legal = LAYOUTS[chosen].takes[trait]
        if legal and value not in legal:
            taken = " or ".join(str(item).lower() for item in legal)
            raise ValueError(
                f"{trait} {str(value).lower()} has no place in the {chosen} layout, which takes {taken}; "
                "use another layout, or mpm's own names in safetensors"
            )
    return chosen


def _timm_layout(config: Mapping[str, Any]) -> str:
    """Which of timm's classes a network is."""
    trunk = config["backbone"]
    if trunk["attention"] == "talking_heads" or _kind(config["readout"]) == "class_attention":
        return "timm Cait"
    if trunk["qkv_bias"] == "query_value" or trunk["positions"]["bias"] != "none":
        return "timm Beit"
    if trunk["distillation_token"]:
        return "timm distilled"
    return "timm without slots" if config["family"] == "deit3" or trunk["registers"] else "timm"


def _traits(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a layout may not be able to hold."""
    trunk, readout, predictor = config["backbone"], config["readout"], config["predictor"]
    plain = ("branches", "attention", "qkv_bias", "class_token", "distillation_token", "registers")
    read = _kind(readout)
    if readout is not None and read == "class_attention":
        queries = readout.get("queries", 1)
        read += f" of {queries} {'query' if queries == 1 else 'queries'}"
    return {
        **{key: trunk[key] for key in plain},
        "layer_scale": trunk["layer_scale"] is not None,
        "stem": _stem(trunk["stem"]),
        "positions.table": trunk["positions"]["table"],
        "positions.bias": trunk["positions"]["bias"],
        "readout": read,
        "predictor": _kind(predictor),
    }


def _kind(section: Mapping[str, Any] | None) -> str:
    return "none" if section is None else str(section["kind"])


def _stem(stem: Mapping[str, Any]) -> str:
    if stem["kind"] != "linear":
        return str(stem["kind"])
    if stem.get("activation", "none") != "none":
        return "linear with an activation"
    norm = stem.get("norm", "none")
    return "linear" if norm == "none" else f"linear with {norm} norm"
