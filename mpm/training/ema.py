"""Exponential moving average of a module's parameters."""

from typing import Any

from torch import nn


def create_ema(module: nn.Module, *, decay: float) -> Any:
    """A `timm.utils.ModelEmaV3` that averages parameters and copies buffers.

    Its `module` is the average, in eval mode; `update(module)` after each step. The decay is constant: a
    counter outside the state dict would restart on resume. Frozen parameters are the module's own: their
    average is what they are.
    """
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(module, decay=decay, exclude_buffers=True)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            ema.module.get_submodule(owner).register_parameter(leaf, parameter)
    return ema
