"""Readouts: what the trunk gave, to pooled vectors."""

from typing import Protocol

from torch import Tensor, nn

from mpm.backbones.backbone import Encoded

__all__ = ["MeanReadout", "Readout", "TokenReadout"]


class Readout(Protocol):
    """Encoder output to `num_vectors` pooled, normalised vectors: [B,Q,D]."""

    num_vectors: int
    norm: nn.LayerNorm

    def __call__(self, encoded: Encoded) -> Tensor:
        """Read."""
        ...


class TokenReadout(nn.Module):
    """The class token after the final norm.

    Args:
        dim: width.
    """

    num_vectors = 1

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, encoded: Encoded) -> Tensor:
        """[B,1,D]."""
        return self.norm(encoded.prefix[:, :1])


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
