"""Parallel branches as one wide attention and one wide MLP, for inference."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mpm.backbones.attention import Attention, RelativePositionBias, TalkingHeads
from mpm.backbones.backbone import Backbone
from mpm.backbones.blocks import AttentionBranch, Block, LayerScale, Mlp, MlpBranch, ParallelBlock

__all__ = ["fold"]

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def fold(module: Module) -> Module:
    """A copy in which each `ParallelBlock` is one `Block` of P times the heads and hidden units.

    Exact: the branches read the same input, so their norms' weights move into the maps that follow,
    LayerScale moves into the maps before it, and the maps stand beside each other. For inference only: the
    branches' drop paths are gone.

    Args:
        module: anything that holds backbones.
    """
    folded = copy.deepcopy(module).eval()
    for backbone in folded.modules():
        if not isinstance(backbone, Backbone):
            continue
        branches = {len(block.attns) for block in backbone.blocks if isinstance(block, ParallelBlock)}
        for index, block in enumerate(backbone.blocks):
            if isinstance(block, ParallelBlock):
                backbone.blocks[index] = _fold_block(block)
        for bias in backbone.relative_biases if branches else ():
            assert isinstance(bias, RelativePositionBias)
            (count,) = branches  # of every block; they share the bias
            bias.bias_table = nn.Parameter(bias.bias_table.repeat(1, count))
    return folded


def _fold_block(block: ParallelBlock) -> Block:
    attention = _fold_attentions(list(block.attns))  # type: ignore[arg-type]
    folded = Block(attention, _fold_mlps(list(block.ffns)))  # type: ignore[arg-type]
    like = attention.proj.weight
    for norm in (folded.norm1, folded.norm2):  # the branches' own are in the maps
        norm.weight.fill_(1)
        norm.bias.zero_()
    return folded.to(like.device, like.dtype).eval()


def _fold_attentions(branches: Sequence[AttentionBranch]) -> Attention:
    first = branches[0].attn
    talking = [branch.attn.attend for branch in branches if isinstance(branch.attn.attend, TalkingHeads)]
    folded = Attention(
        first.proj.out_features,
        first.num_heads * len(branches),
        attend=TalkingHeads(first.num_heads * len(branches)) if talking else None,
        inner_dim=first.inner_dim * len(branches),
    )
    # [3,width,D] of each branch, so that queries, keys and values of all branches stand together
    maps = [
        _absorb_norm(branch.norm, branch.attn.qkv.weight, branch.attn.fused_bias()) for branch in branches
    ]
    weight = torch.cat([weight.unflatten(0, (3, -1)) for weight, _ in maps], dim=1).flatten(0, 1)
    bias = torch.cat([bias.unflatten(0, (3, -1)) for _, bias in maps], dim=1).flatten()
    _set(folded.qkv, weight, bias)
    _set(folded.proj, *_join([(branch.attn.proj, branch.ls) for branch in branches]))
    if talking:
        assert isinstance(folded.attend, TalkingHeads)
        _set(folded.attend.proj_l, *_side_by_side([heads.proj_l for heads in talking]))
        _set(folded.attend.proj_w, *_side_by_side([heads.proj_w for heads in talking]))
    return folded.to(weight.dtype)


def _fold_mlps(branches: Sequence[MlpBranch]) -> Mlp:
    hidden = sum(branch.mlp.fc1.out_features for branch in branches)
    folded = Mlp(branches[0].mlp.fc2.out_features, hidden)
    maps = [_absorb_norm(branch.norm, branch.mlp.fc1.weight, branch.mlp.fc1.bias) for branch in branches]
    _set(folded.fc1, torch.cat([weight for weight, _ in maps]), torch.cat([bias for _, bias in maps]))
    _set(folded.fc2, *_join([(branch.mlp.fc2, branch.ls) for branch in branches]))
    return folded


def _absorb_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A linear map [out,D] after a norm's weight and bias: W (g x + b) + c = (W g) x + (W b + c)."""
    shift = weight @ norm.bias
    return weight * norm.weight, shift if bias is None else shift + bias


def _join(branches: Sequence[tuple[nn.Linear, nn.Module]]) -> tuple[Tensor, Tensor]:
    """The sum of scaled maps of different inputs, as one map of all of them."""
    scales = [
        scale.gamma if isinstance(scale, LayerScale) else torch.ones_like(layer.bias)
        for layer, scale in branches
    ]
    weights = [scale[:, None] * layer.weight for scale, (layer, _) in zip(scales, branches, strict=True)]
    biases = [scale * layer.bias for scale, (layer, _) in zip(scales, branches, strict=True)]
    return torch.cat(weights, dim=1), torch.stack(biases).sum(0)


def _side_by_side(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Maps of different inputs to different outputs, as one map."""
    return torch.block_diag(*(layer.weight for layer in layers)), torch.cat([layer.bias for layer in layers])


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(bias)
