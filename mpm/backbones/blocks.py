"""Transformer blocks (parameter names and results as timm's)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.attention import Attention, ClassAttention
from mpm.patchify.masks import take

__all__ = [
    "AttentionBranch",
    "Block",
    "ClassAttentionBlock",
    "DropPath",
    "LayerScale",
    "Mlp",
    "MlpBranch",
    "ParallelBlock",
]


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
        attn: see `Attention`.
        mlp: token-wise.
        layer_scale: start value of LayerScale; None: no LayerScale.
        drop_path: rate of both branches.
    """

    def __init__(
        self, attn: Attention, mlp: Mlp, *, layer_scale: float | None = None, drop_path: float = 0.0
    ):
        super().__init__()
        dim = attn.proj.out_features
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.ls1 = _scale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.ls2 = _scale(dim, layer_scale)
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


class AttentionBranch(nn.Module):
    """Norm, attention and LayerScale of one of several parallel branches."""

    def __init__(self, attn: Attention, *, layer_scale: float | None = None):
        super().__init__()
        dim = attn.proj.out_features
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.ls = _scale(dim, layer_scale)

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """[B,T,D] -> [B,T,D], or [B,S,D] with `rows`."""
        return self.ls(self.attn(self.norm(x), bias, rows))


class MlpBranch(nn.Module):
    """Norm, MLP and LayerScale of one of several parallel branches."""

    def __init__(self, mlp: Mlp, *, layer_scale: float | None = None):
        super().__init__()
        dim = mlp.fc2.out_features
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.ls = _scale(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,D]."""
        return self.ls(self.mlp(self.norm(x)))


class ParallelBlock(nn.Module):
    """P attentions on the same input, then P MLPs on the same input.

    "Three things", arXiv:2203.09795, section 3. Each branch has its own norm, LayerScale and drop path.

    Args:
        attns: the P attentions.
        mlps: the P MLPs.
        layer_scale: start value of LayerScale; None: no LayerScale.
        drop_path: rate of every branch.
    """

    def __init__(
        self,
        attns: Sequence[Attention],
        mlps: Sequence[Mlp],
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.attns = nn.ModuleList(AttentionBranch(attn, layer_scale=layer_scale) for attn in attns)
        self.ffns = nn.ModuleList(MlpBranch(mlp, layer_scale=layer_scale) for mlp in mlps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """As `Block`; the branches share the bias."""
        residual = x if rows is None else take(x, rows)
        attended = [self.drop_path(branch(x, bias, rows)) for branch in self.attns]
        residual = residual + sum(attended[1:], attended[0])
        mapped = [self.drop_path(branch(residual)) for branch in self.ffns]
        return residual + sum(mapped[1:], mapped[0])


class ClassAttentionBlock(nn.Module):
    """Queries that read the patches, which stay as they are (CaiT, arXiv:2103.17239, section 3).

    Args:
        dim: width.
        num_heads: of the attention.
        mlp_ratio: hidden width of the MLP over `dim`.
        layer_scale: start value of LayerScale; None: no LayerScale.
    """

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, layer_scale: float | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads)
        self.ls1 = _scale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = _scale(dim, layer_scale)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """Queries [B,Q,D], patches [B,N,D] -> queries [B,Q,D]."""
        everything = self.norm1(torch.cat([queries, patches], dim=1))  # [B,Q+N,D]
        queries = queries + self.ls1(self.attn(everything, queries.shape[1]))
        return queries + self.ls2(self.mlp(self.norm2(queries)))


def _scale(dim: int, value: float | None) -> nn.Module:
    return nn.Identity() if value is None else LayerScale(dim, value)
