"""Networks of timm whose weights have the names of mpm's, but which compute something else with them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["check_timm_architecture", "check_timm_model"]

_BLOCKS = ("Block", "ParallelThingsBlock", "LayerScaleBlock")
_CLASSES = ("VisionTransformer", "VisionTransformerDistilled", "Beit", "Cait")


def check_timm_architecture(facts: Mapping[str, Any]) -> None:
    """Build what a config.json of timm names, without weights, and check it; others pass.

    Raises:
        ValueError: if mpm computes something else, or the installed timm does not know it.
    """
    name = facts.get("architecture")
    if name is None or "pretrained_cfg" not in facts:
        return
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name, **(facts.get("model_args") or {}))
    except (RuntimeError, TypeError) as error:  # an unknown model, or arguments that it does not take
        reason = " ".join(str(error).split())
        raise ValueError(
            f"timm {timm.__version__} does not make the {name} of config.json ({reason}); update timm, or "
            "give the file of weights without config.json beside it"
        ) from error
    check_timm_model(model, name)


def check_timm_model(model: nn.Module, name: str) -> None:
    """What the weights do not show: rotary positions, the activation, eps of norms, what is pooled.

    Args:
        model: of timm, on any device.
        name: for errors.

    Raises:
        ValueError: if mpm computes something else.
    """
    kind = type(model).__name__
    if kind not in _CLASSES:
        raise ValueError(f"{name} is timm's {kind}; of timm's networks mpm has {', '.join(_CLASSES)}")
    block: str = type(model.get_submodule("blocks.0")).__name__
    places = torch.linspace(-4, 4, 33)
    pool: Any = getattr(model, "global_pool", "token")
    has_head = not isinstance(model.get_submodule("head"), nn.Identity)
    after_norm = has_head and isinstance(getattr(model, "fc_norm", None), nn.Identity)
    is_read = pool in ("token", "") or (pool == "avg" and kind != "Cait" and not after_norm)
    activations = [part for place, part in model.named_modules() if place.endswith("mlp.act")]
    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm)]
    unlike = {
        f"blocks of another kind, {block}": block not in _BLOCKS,
        "an activation other than GELU": any(
            not torch.allclose(activation(places), F.gelu(places), atol=1e-6) for activation in activations
        ),
        "norms of another eps than 1e-6": any(norm.eps != 1e-6 for norm in norms),
        f"the pooling {pool}": not is_read,
        "prefix tokens in the pooling": bool(getattr(model, "pool_include_prefix", False)),
    }
    if found := [reason for reason, is_there in unlike.items() if is_there]:
        raise ValueError(f"{name} has {' and '.join(found)}, which mpm has not")
