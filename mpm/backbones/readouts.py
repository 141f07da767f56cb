"""Readouts: what the trunk gave, to pooled vectors."""

from typing import Protocol

import torch
from torch import Tensor, nn

from mpm.backbones.backbone import Encoded
from mpm.backbones.blocks import ClassAttentionBlock

__all__ = ["ClassAttentionReadout", "MeanReadout", "Readout", "TokenReadout"]


class Readout(Protocol):
    """Encoder output to `num_vectors` pooled, normalised vectors: [B,Q,D]."""

    num_vectors: int
    norm: nn.LayerNorm

    def __call__(self, encoded: Encoded) -> Tensor:
        """Read."""
        ...


class TokenReadout(nn.Module):
    """The class token, and the distillation token where there is one (DeiT), after the final norm.

    Args:
        dim: width.
        num_vectors: 1, or 2 with the distillation token.
    """

    def __init__(self, dim: int, *, num_vectors: int = 1):
        super().__init__()
        self.num_vectors = num_vectors
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, encoded: Encoded) -> Tensor:
        """[B,Q,D]."""
        return self.norm(encoded.prefix[:, : self.num_vectors])


class MeanReadout(nn.Module):
    """The mean of the patch tokens, then a norm (BEiT's and MAE's fine-tuning, `fc_norm`).

    Args:
        dim: width.
    """

    num_vectors = 1

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, encoded: Encoded) -> Tensor:
        """[B,1,D]."""
        return self.norm(encoded.patches.mean(1, keepdim=True))


class ClassAttentionReadout(nn.Module):
    """Tokens that read the patches through class-attention blocks, then a norm (CaiT, arXiv:2103.17239).

    The trunk needs no prefix tokens, and none are read. The paper has one query, the class token; a second
    one gives CaiT a distillation token. The queries see each other and the patches.

    Args:
        dim: width.
        num_heads: of each block.
        depth: blocks.
        num_vectors: queries.
        mlp_ratio: hidden width of the MLPs over `dim`.
        layer_scale: start value of LayerScale; None: no LayerScale.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        depth: int = 2,
        num_vectors: int = 1,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.num_vectors = num_vectors
        self.tokens = nn.Parameter(torch.empty(num_vectors, dim))
        self.blocks = nn.ModuleList(
            ClassAttentionBlock(dim, num_heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, encoded: Encoded) -> Tensor:
        """[B,Q,D]."""
        return self.norm(self.layers(encoded)[-1])

    def layers(self, encoded: Encoded) -> list[Tensor]:
        """The queries [B,Q,D] after each block."""
        queries = self.tokens.to(encoded.patches.dtype).expand(len(encoded.patches), -1, -1)
        after = []
        for block in self.blocks:
            queries = block(queries, encoded.patches)
            after.append(queries)
        return after
