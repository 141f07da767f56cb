"""Where a network looks: how much of what is read comes from each patch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mpm.backbones.attention import Softmax, TalkingHeads
from mpm.backbones.backbone import Backbone
from mpm.backbones.blocks import ParallelBlock
from mpm.backbones.readouts import ClassAttentionReadout, Readout, TokenReadout

__all__ = ["AttentionMaps", "Query", "attention_maps", "recorded_attention"]

Query = Literal["class_token", "patches"]


class AttentionMaps(NamedTuple):
    """Attention weights over the grid of patches.

    Attributes:
        weights: float32 [B,G,h,rows,columns]; with the weights of prefix tokens or queries, which are left
            out, each map sums to 1, but after talking heads, which mix the heads' weights, to anything.
        groups: G names: "" of the last block, or those of its branches, or of the class-attention blocks.
        query: what asks, in words.
    """

    weights: Tensor
    groups: tuple[str, ...]
    query: str


@contextmanager
def recorded_attention(module: nn.Module) -> Iterator[list[Tensor]]:
    """The weights [B,h,S,T] of every attention inside a module, in the order of the calls."""
    recorded: list[Tensor] = []

    def record(attend: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(attend, Softmax | TalkingHeads)
        q, k, _, *bias = arguments
        recorded.append(attend.weights(q, k, *bias))

    parts = [part for part in module.modules() if isinstance(part, Softmax | TalkingHeads)]
    hooks = [part.register_forward_pre_hook(record) for part in parts]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_maps(
    backbone: Backbone, images: Tensor, *, readout: Readout | None = None, query: Query | None = None
) -> AttentionMaps:
    """Attention of the last step before what is read.

    Class attention is shown block by block, as in CaiT's paper (arXiv:2103.17239). Otherwise it is that of
    the trunk's last block: of the class token, as in DINO's (arXiv:2104.14294), or the mean over the patches
    that ask, which is what the mean of the patches' outputs weighs the values with.

    Args:
        backbone: in eval mode.
        images: normalised [B,C,H,W].
        readout: what reads it; None: the mean of its patches, as for features of pretrained networks.
        query: what asks in the last block, where something else is wanted.

    Raises:
        ValueError: if there is no class token in the last block.
    """
    R = backbone.num_prefix
    if query == "class_token" and isinstance(readout, ClassAttentionReadout):
        raise ValueError("this network's class token reads by class attention; leave --query out to see it")
    if query == "class_token" and not R:
        raise ValueError("the network has no class token; leave --query out, or use patches")
    if isinstance(readout, ClassAttentionReadout) and query is None:
        Q = readout.num_vectors
        with recorded_attention(readout.blocks) as recorded:
            readout(backbone(images))
        names = [f"class-attention block {number}" for number in range(1, len(recorded) + 1)]
        weights = torch.stack(recorded, 1)[..., 0, Q:]  # [B,G,h,N]
        asks = "class token, class attention"
    else:
        last = backbone.blocks[-1]
        with recorded_attention(last) as recorded:
            backbone(images)
        is_parallel = isinstance(last, ParallelBlock)
        names = [f"branch {n}" for n in range(1, len(recorded) + 1)] if is_parallel else [""]
        by_token = query == "class_token" or (query is None and isinstance(readout, TokenReadout))
        everything = torch.stack(recorded, 1)  # [B,G,h,R+N,R+N]
        weights = everything[..., 0, R:] if by_token else everything[..., R:, R:].mean(-2)
        asks = "class token, last block" if by_token else "mean over the patches, last block"
    return AttentionMaps(weights.float().unflatten(-1, backbone.grid), tuple(names), asks)
