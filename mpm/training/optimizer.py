"""Parameter groups with layer-wise rates, and the optimizer."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn


def parameter_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_of: Callable[[str], int] | None = None,
    num_layers: int = 0,
    layer_decay: float = 1.0,
    decayed: Collection[str] = frozenset(),
    undecayed: Collection[str] = frozenset(),
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, by layer and by whether its weights decay.

    Layer i learns at `layer_decay ** (num_layers - i)` times the rate (BEiT, arXiv:2106.08254).
    One-dimensional parameters and biases do not decay; a tied parameter belongs to the first of its names.

    Args:
        module: frozen parameters are left out.
        lr: peak rate of the last layer.
        weight_decay: of the parameters that decay.
        layer_of: layer of a parameter by its name, 0 (stem) to `num_layers` (readout and head); None is one
            layer. The KeyError that it raises for an unknown name passes through.
        num_layers: the last layer's number, depth + 1 of a backbone with a head.
        layer_decay: factor from one layer to the one before.
        decayed: last parts of names that always decay.
        undecayed: last parts of names that never decay.

    Returns:
        Groups for a torch optimizer. Besides `params`, `lr` and `weight_decay`: `names`, `lr_scale` and
        `group`, a readable name such as "layer 3, no decay".

    Raises:
        ValueError: if nothing is trainable, or a layer is outside 0..num_layers.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name) if layer_of else num_layers
        if not 0 <= layer <= num_layers:
            raise ValueError(f"parameter {name} is in layer {layer}, but layers are 0 to {num_layers}")
        leaf = name.rpartition(".")[2]
        by_shape = parameter.ndim > 1 and leaf != "bias"
        decays = leaf in decayed or (by_shape and leaf not in undecayed)
        if (layer, decays) not in groups:
            lr_scale = layer_decay ** (num_layers - layer)
            groups[layer, decays] = {
                "group": f"layer {layer}, {'decay' if decays else 'no decay'}",
                "params": [],
                "names": [],
                "lr": lr * lr_scale,
                "lr_scale": lr_scale,
                "weight_decay": weight_decay if decays else 0.0,
            }
        groups[layer, decays]["params"].append(parameter)
        groups[layer, decays]["names"].append(name)
    if not groups:
        raise ValueError("no parameter is trainable; check what the configuration freezes")
    return [groups[key] for key in sorted(groups)]


def create_adamw(
    groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float = 1e-8
) -> torch.optim.AdamW:
    """Fused AdamW: one kernel for all parameters, also on a CPU."""
    return torch.optim.AdamW(list(groups), lr=lr, betas=betas, eps=eps, fused=True)


def create_lamb(
    groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float = 1e-6
) -> torch.optim.Optimizer:
    """LAMB of timm, as apex's FusedLAMB: groups that do not decay are not adapted.

    It does not clip by itself, as those do by default (at a norm of 1): the loop does.
    """
    from timm.optim import Lamb

    return Lamb(list(groups), lr=lr, betas=betas, eps=eps, max_grad_norm=None)


def create_lars(
    groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """LARS of timm, as MAE's: gradients of matrices are scaled, whether they decay or not; vectors' are not.

    Args:
        groups: of `parameter_groups`; one that holds both is split.
        lr: peak rate.
        momentum: share of the last step.
    """
    from timm.optim import Lars

    parts = []
    for group in groups:
        for is_adapted in (True, False):
            chosen = [
                (parameter, name)
                for parameter, name in zip(group["params"], group["names"], strict=True)
                if (parameter.ndim > 1) == is_adapted
            ]
            if chosen:
                parameters, names = map(list, zip(*chosen, strict=True))
                parts.append({**group, "params": parameters, "names": names, "always_adapt": is_adapted})
    return Lars(parts, lr=lr, momentum=momentum)


def create_sgd(
    groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9, nesterov: bool = False
) -> torch.optim.SGD:
    """SGD with momentum; fused, as `create_adamw`."""
    return torch.optim.SGD(list(groups), lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
