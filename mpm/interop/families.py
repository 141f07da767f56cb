"""What the files of a family leave unsaid: preprocessing, heads, how LayerScale started."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mpm.interop.facts import known_interpolation
from mpm.patchify.pixels import IMAGENET, INCEPTION, Moments, moments_of

__all__ = ["FAMILIES", "Family", "decoder_heads_of", "heads_of", "layer_scale_of", "preprocessing_of"]


class Family(NamedTuple):
    """Of the released networks.

    Attributes:
        moments: mean and standard deviation of pixels in [0,1].
        crop: part of an image's side that is evaluated, below `whole_from`.
        whole_from: image side from which all of it is, in pixels.
        drop_path_rule: "constant" over the blocks, or "linear".
    """

    moments: Moments = IMAGENET
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
_TIMM = "; timm's own ViTs have the same keys, and mean and std 0.5"
_OTHERS = {  # whom the keys do not tell from a family
    "deit": _TIMM,
    "deit3": _TIMM,
    "three_things": _TIMM,
    "mae": _TIMM,
    "beit": "; fine-tuned files of BEiT v2 and SimMIM have the same keys, and ImageNet's mean and std",
}
_PREPROCESSING = {"mean": "mean", "std": "std", "crop_pct": "crop", "interpolation": "interpolation"}
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
            f"into how many attention heads the width {dim} is cut, no key tells; give {argument}, "
            f"as mpm import --{argument.replace('_', '-')} N does"
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
    own, args = FAMILIES[family], facts.get("args", {})
    stated = facts.get("pretrained_cfg") or {}
    (mean, std), known = own.moments, set(stated)
    if family == "beit" and is_beit2:
        mean, std = IMAGENET
    elif family == "beit" and "imagenet_default_mean_and_std" in args:
        mean, std = IMAGENET if args["imagenet_default_mean_and_std"] else INCEPTION
        known |= {"mean", "std"}
    crop = 1.0 if min(image_size) >= own.whole_from else own.crop
    interpolation, notes = known_interpolation(stated.get("interpolation", "bicubic"))
    mean, std = stated.get("mean", mean), stated.get("std", std)
    fitting = moments_of(mean, std, channels=channels)
    found: dict[str, Any] = {
        "mean": fitting[0],
        "std": fitting[1],
        "crop": float(stated.get("crop_pct", crop)),
        "interpolation": interpolation,
    }
    if assumed := [word for key, word in _PREPROCESSING.items() if key not in known]:
        others = _OTHERS.get(family, "") if "mean" in assumed and not is_beit2 else ""
        whose = "BEiT v2's" if is_beit2 else f"those of the published {family} networks"
        notes += (f"{', '.join(assumed)} are not told: they are {whose}{others}",)
    if channels != len(mean):
        notes += (f"mean and std of {channels} channels are averages of the {len(mean)} published",)
    return found, notes
