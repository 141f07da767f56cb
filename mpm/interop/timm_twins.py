"""Networks of timm whose weights have the names of mpm's, but which compute something else with them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mpm.interop.files import some

__all__ = ["check_timm_architecture", "check_timm_arguments", "check_timm_model"]

_BLOCKS = ("Block", "ParallelThingsBlock", "LayerScaleBlock")
_CLASSES = ("VisionTransformer", "VisionTransformerDistilled", "Beit", "Cait")
# an unknown model, or arguments that it does not take
_UNMADE = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
)
# of timm's classes; others of `create_model` load files, download, or are no part of a network
_ARGUMENTS = {
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "qkv_bias", "qk_norm", "init_values", "class_token", "reg_tokens", "no_embed_class", "pos_embed",
    "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "use_rot_pos_emb", "depth_token_only",
    "mlp_ratio_token_only", "global_pool", "pool_include_prefix", "fc_norm", "pre_norm", "final_norm",
    "norm_layer", "embed_norm_layer", "act_layer", "dynamic_img_size", "dynamic_img_pad", "strict_img_size",
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "weight_init", "fix_init",
}  # fmt: skip


def check_timm_architecture(facts: Mapping[str, Any]) -> None:
    """Build what a config.json of timm names, without weights, and check it; others pass.

    Its names and numbers are all that is taken from it: it may come from anyone.

    Raises:
        ValueError: if mpm computes something else, the installed timm does not know it, or it asks for more
            than an architecture.
    """
    name, arguments = facts.get("architecture"), facts.get("model_args") or {}
    if name is None or "pretrained_cfg" not in facts:
        return
    import timm

    check_timm_arguments(facts)
    classes = {"num_classes": facts["num_classes"]} if "num_classes" in facts else {}
    try:
        # others are read from a disk or the hub
        if not re.fullmatch(r"[\w.]+", name) or not timm.is_model(name):
            raise RuntimeError(f"unknown model {name}")
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **classes | arguments)
    except _UNMADE as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"timm {timm.__version__} does not make the {name} of config.json ({reason}); update timm, or "
            "give the file of weights without config.json beside it"
        ) from error
    check_timm_model(model, name)


def check_timm_arguments(facts: Mapping[str, Any]) -> None:
    """Whether the model_args of a config.json of timm are an architecture and nothing else.

    Raises:
        ValueError: if they are more.
    """
    arguments = facts.get("model_args") or {}
    if unknown := sorted(map(str, arguments.keys() - _ARGUMENTS)):
        raise ValueError(
            f"model_args of config.json has {some(unknown)}, which is no part of an architecture; take it out"
        )
    for key, value in arguments.items():
        values = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, str | int | float | None) for item in values):
            raise ValueError(
                f"model_args of config.json has {key} {value}, where a number or a name is expected"
            )


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
