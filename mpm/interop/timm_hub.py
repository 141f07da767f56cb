"""Weights out of timm, by the name of a model."""

from typing import Any

from mpm.interop.official import Official, class_names, load_official
from mpm.interop.timm_twins import check_timm_model

__all__ = ["load_timm"]


def load_timm(name: str, *, image_size: tuple[int, int] | None = None) -> Official:
    """A pretrained model of timm, in mpm's form.

    Args:
        name: as `timm.create_model` takes it: `deit3_small_patch16_224.fb_in1k`, `hf-hub:owner/name` or
            `local-dir:FOLDER`. It may download.
        image_size: height and width in pixels, where positions are to be resampled.

    Raises:
        ValueError: if timm has no such weights, or they cannot be had, or mpm does not know the architecture.
    """
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError) as error:  # unknown names, missing files, no connection
        reason = " ".join(str(error).split())
        raise ValueError(f"timm gives no weights for {name}: {reason}") from error
    check_timm_model(model, name)
    first = model.blocks[0]
    attention = first.attn if hasattr(first, "attn") else first.attns[0].attn  # of the first parallel branch
    facts = model.pretrained_cfg
    official = load_official(model.state_dict(), heads=attention.num_heads, image_size=image_size)
    classes = class_names({"pretrained_cfg": facts}, official.config["num_classes"])
    return official._replace(config=official.config | _preprocessing(facts) | {"classes": classes})


def _preprocessing(facts: dict[str, Any]) -> dict[str, Any]:
    """What timm says of the images a model was trained on."""
    return {
        "mean": tuple(facts["mean"]),
        "std": tuple(facts["std"]),
        "crop": float(facts["crop_pct"]),
        "interpolation": facts["interpolation"],
    }
