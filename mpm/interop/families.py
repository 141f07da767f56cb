"""What the files of a family leave unsaid: preprocessing, heads, how LayerScale started."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["FAMILIES", "Family", "decoder_heads_of", "heads_of", "layer_scale_of", "preprocessing_of"]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class Family(NamedTuple):
    """Of the released networks.

    Attributes:
        statistics: mean and standard deviation of pixels in [0,1].
        crop: part of an image's side that is evaluated, below `whole_from`.
        whole_from: image side from which all of it is, in pixels.
        drop_path_rule: "constant" over the blocks, or "linear".
    """

    statistics: Mapping[str, Any] = IMAGENET
    crop: float = 0.875
    whole_from: float = float("inf")
    drop_path_rule: str = "linear"


# from the evaluation of each official repository; timm's as its models without other entries
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deit": Family(),
        "deit3": Family(whole_from=0, drop_path_rule="constant"),
        "three_things": Family(drop_path_rule="constant"),
        "cait": Family(whole_from=0, drop_path_rule="constant"),
        "beit": Family(INCEPTION, whole_from=384),
        "mae": Family(whole_from=225),
        "simmim": Family(),
        "timm": Family(INCEPTION, crop=0.9),
    }
)
_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {512: 16}


def heads_of(dim: int) -> int:
    """Attention heads of the published trunks of a width.

    Raises:
        ValueError: if none is of this width.
    """
    return _told(_HEADS, dim, "heads")


def decoder_heads_of(dim: int) -> int:
    """Attention heads of MAE's decoder of a width.

    Raises:
        ValueError: if none was published.
    """
    return _told(_DECODER_HEADS, dim, "decoder_heads")


def _told(known: Mapping[int, int], dim: int, argument: str) -> int:
    if dim not in known:
        raise ValueError(
            f"into how many attention heads the width {dim} is cut, no key tells; give {argument}="
        )
    return known[dim]


def layer_scale_of(family: str, *, dim: int, depth: int) -> float:
    """Where a family's LayerScale started; the trained factors no longer tell."""
    match family:
        case "cait":
            return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        case "beit" | "simmim":
            return 0.1 if dim < 1024 else 1e-5
        case "timm":
            return 1e-5
    return 1e-4


def preprocessing_of(
    family: str, *, image_size: tuple[int, int], channels: int, facts: Mapping[str, Any], is_beit2: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Mean, std, crop and interpolation, with notes where they are assumed.

    Args:
        family: of the file.
        image_size: height and width in pixels.
        channels: of the images.
        facts: what stands beside the weights: of timm's config.json, `pretrained_cfg` counts.
        is_beit2: whether it is known to be BEiT v2.
    """
    own = FAMILIES[family]
    notes: tuple[str, ...] = ()
    statistics = own.statistics
    args = facts.get("args", {})
    if family == "beit" and (is_beit2 or args.get("imagenet_default_mean_and_std")):
        statistics = IMAGENET
    elif family == "beit" and "imagenet_default_mean_and_std" not in args:
        notes = (
            "mean and std are BEiT's; fine-tuned files of BEiT v2 and SimMIM look the same, with ImageNet's",
        )
    elif family == "timm":
        notes = ("mean, std and crop are those that most of timm's vision transformers have",)
    found = {
        **statistics,
        "crop": 1.0 if min(image_size) >= own.whole_from else own.crop,
        "interpolation": "bicubic",
    }
    if stated := facts.get("pretrained_cfg"):
        notes = ()
        found |= {
            "mean": tuple(stated.get("mean", found["mean"])),
            "std": tuple(stated.get("std", found["std"])),
            "crop": float(stated.get("crop_pct", found["crop"])),
            "interpolation": stated.get("interpolation", found["interpolation"]),
        }
    if channels != len(found["mean"]):
        average = {key: (sum(found[key]) / len(found[key]),) * channels for key in ("mean", "std")}
        found, notes = (
            found | average,
            (*notes, f"mean and std of {channels} channels are averages of the 3 published"),
        )
    return found, notes
