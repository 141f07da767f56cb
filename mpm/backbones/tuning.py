"""Which parameters of a classifier are trained, by the kind of module that holds them."""

from typing import Literal

from torch import nn

from mpm.backbones.attention import Attention, ClassAttention, RelativePositionBias
from mpm.backbones.backbone import Positions
from mpm.backbones.blocks import LayerScale, Mlp
from mpm.backbones.classifier import Classifier
from mpm.patchify.norms import TokenBatchNorm

__all__ = ["Tune", "tune"]

Tune = Literal["all", "attention", "mlp", "norm", "head"]

_TRAINED: dict[Tune, tuple[type[nn.Module], ...]] = {
    "attention": (Attention, ClassAttention, RelativePositionBias, Positions),
    "mlp": (Mlp, Positions),
    "norm": (nn.LayerNorm, TokenBatchNorm, LayerScale),
    "head": (),
}


def tune(network: Classifier, part: Tune, *, readout_too: bool = False, eval_mode: bool = False) -> None:
    """Leave one kind of module to train; every parameter of the others is frozen.

    | part | trained, besides all heads |
    |---|---|
    | attention | every attention with its talking heads and relative bias, class attention, position table |
    | mlp | every MLP, position table |
    | norm | every norm, of stem and readout too, and LayerScale |
    | head | - |

    "Three things" (arXiv:2203.09795, section 4): `attention` is what its released code trains, which finds it
    by name and so misses the second branch of parallel blocks and the distillation head; `mlp` is the
    same with the other half of the blocks. Tokens and stem (but for its norms) are always frozen.

    A backbone or readout that is frozen whole stays in eval mode, whatever the network is set to: without
    drop path, what the heads read is one vector an image. So does a batch norm with frozen weights, which
    would else learn statistics. The norm before the heads (MAE's linear probe) has no weights, and learns.

    Args:
        network: in place.
        part: "all" freezes nothing.
        readout_too: whether the readout is trained whole, as where it starts afresh.
        eval_mode: whether all of the network stays in eval mode while it is trained.
    """
    network.trains_in_eval_mode = eval_mode
    if part != "all":
        _freeze(network, part, readout_too=readout_too)
    network.train(network.training)


def _freeze(network: Classifier, part: Tune, *, readout_too: bool) -> None:
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, _TRAINED[part]):
            module.requires_grad_(True)
    network.heads.requires_grad_(True)
    if readout_too:
        network.get_submodule("readout").requires_grad_(True)
    parts = (network.get_submodule("backbone"), network.get_submodule("readout"))
    network.stays_in_eval_mode = [still for part in parts for still in _still(part)]


def _still(part: nn.Module) -> list[nn.Module]:
    if not _is_trained(part):
        return [part]
    return [norm for norm in part.modules() if isinstance(norm, TokenBatchNorm) and not _is_trained(norm)]


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
