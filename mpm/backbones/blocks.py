"""Transformer blocks (parameter names and results as timm's)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.attention import Attention, QKVBias
from mpm.patchify.masks import take

__all__ = ["Block", "DropPath", "LayerScale", "Mlp"]


class Mlp(nn.Module):
    """Two Linear layers with GELU between: [...,D] -> [...,D]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel, started small (CaiT, arXiv:2103.17239)."""

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        """Set every factor to its start value."""
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel."""
        return x * self.gamma


class DropPath(nn.Module):
    """Drops a residual branch for whole samples while training (stochastic depth, arXiv:1603.09382).

    Args:
        rate: probability that a sample's branch is dropped; the others are divided by 1 - rate.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,D]."""
        if not self.training or self.rate == 0.0:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to the residual stream.

    Args:
        dim: width.
        num_heads: of the attention.
        mlp_ratio: hidden width of the MLP over `dim`.
        qkv_bias: see `Attention`.
        layer_scale: start value of LayerScale; None: no LayerScale.
        drop_path: rate of both branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: QKVBias = "all",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """All tokens, or some of them: keys and values always come from all.

        Args:
            x: residual stream [B,T,D].
            bias: of the attention's logits, see `Attention`.
            rows: int64 [B,S], the tokens that are computed.

        Returns: [B,T,D], or [B,S,D] with `rows`.
        """
        residual = x if rows is None else take(x, rows)
        residual = residual + self.drop_path(self.ls1(self.attn(self.norm1(x), bias, rows)))
        return residual + self.drop_path(self.ls2(self.mlp(self.norm2(residual))))
