"""Predictors: encoder output to a prediction at each masked patch."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from mpm.backbones.attention import Attention
from mpm.backbones.backbone import Encoded, Positions, take_rows
from mpm.backbones.blocks import Block, Mlp
from mpm.backbones.create import create_blocks
from mpm.patchify.masks import PatchMask
from mpm.variants import Architecture

__all__ = [
    "ClassPretrainingPredictor",
    "DecoderPredictor",
    "LinearPredictor",
    "Predictor",
    "create_predictor",
]


class Predictor(Protocol):
    """Encoder output to predictions.

    Attributes:
        encoder_mask_token: [D], fills masked patches before the trunk; None: it sees visible patches only.
        reads: which patches of the trunk's last block are used.
        layers: indices of blocks whose outputs are used too.
        norm: the norm of the trunk's output.
    """

    norm: nn.LayerNorm
    reads: Literal["all", "masked"]
    layers: tuple[int, ...]

    @property
    def encoder_mask_token(self) -> nn.Parameter | None:
        """[D], or None."""
        ...

    def __call__(self, encoded: Encoded, mask: PatchMask) -> Tensor:
        """-> [S,B,M,out]; S = 1 but for `ClassPretrainingPredictor`."""
        ...


def create_predictor(
    architecture: Architecture,
    *,
    out_dim: int,
    grid: tuple[int, int],
    kind: str,
    dim: int = 0,
    depth: int = 0,
    heads: int = 0,
    early_layer: int = 0,
) -> Predictor:
    """What reads a trunk in pretraining; parameters are not initialised.

    Args:
        architecture: of the trunk.
        out_dim: width of a prediction.
        grid: patches per side (rows, columns).
        kind: "linear", "decoder" or "class_pretraining".
        dim: width of a decoder.
        depth: blocks of a decoder, or extra ones of class pretraining.
        heads: of each block of a decoder.
        early_layer: block whose patches the extra ones see, counted from 1.

    Raises:
        ValueError: if the kind is unknown.
    """
    width = architecture.dim
    match kind:
        case "linear":
            return LinearPredictor(width, out_dim)
        case "decoder":
            return DecoderPredictor(width, out_dim, grid=grid, width=dim, depth=depth, num_heads=heads)
        case "class_pretraining":
            rates = [*architecture.drop_path_rates][early_layer:][:depth]  # they continue the early layer
            rates += [architecture.drop_path_rates[-1]] * (depth - len(rates))
            blocks = create_blocks(architecture, drop_path_rates=rates)
            return ClassPretrainingPredictor(width, out_dim, blocks=blocks, early_layer=early_layer)
    raise ValueError(f"predictor.kind {kind} is unknown; use linear, decoder or class_pretraining")


class LinearPredictor(nn.Module):
    """A norm and a Linear layer on masked tokens (BEiT, SimMIM); the trunk sees mask tokens.

    Args:
        dim: width of the backbone.
        out_dim: width of a prediction.
    """

    reads: Literal["all", "masked"] = "masked"
    layers: tuple[int, ...] = ()

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.encoder_mask_token = nn.Parameter(torch.empty(dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, encoded: Encoded, mask: PatchMask) -> Tensor:
        """Encoded patches [B,M,D], the masked ones -> [1,B,M,out]."""
        return self.head(self.norm(encoded.patches))[None]


class ClassPretrainingPredictor(nn.Module):
    """One Linear layer read twice, the second time after extra blocks on class token and early patches.

    The extra blocks see the class token of the trunk's last block and the patches of an earlier one, so what
    is missing there has to come through the class token (BEiT v2, arXiv:2208.06366, section 2.3). Norm and
    Linear layer are shared by both; the relative position bias is the trunk's. The last block computes masked
    tokens only, which is exact.

    Args:
        dim: width of the backbone.
        out_dim: width of a prediction.
        blocks: the extra ones, at least one, like the trunk's.
        early_layer: block whose patches they see, counted from 1.
    """

    reads: Literal["all", "masked"] = "masked"

    def __init__(self, dim: int, out_dim: int, *, blocks: Sequence[nn.Module], early_layer: int):
        super().__init__()
        self.layers: tuple[int, ...] = (early_layer - 1,)
        self.encoder_mask_token = nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, encoded: Encoded, mask: PatchMask) -> Tensor:
        """Encoded patches [B,M,D], the masked ones, and an early layer [B,R+N,D] -> [2,B,M,out]."""
        R = encoded.prefix.shape[1]
        x = torch.cat([encoded.prefix, encoded.layers[0][:, R:]], dim=1)  # [B,R+N,D]
        for block in self.blocks[:-1]:
            x = block(x, encoded.bias)
        rows = mask.masked + R
        bias = None if encoded.bias is None else take_rows(encoded.bias, rows)
        x = self.blocks[-1](x, bias, rows)  # [B,M,D]
        return self.head(self.norm(torch.stack([encoded.patches, x])))


class DecoderPredictor(nn.Module):
    """A small transformer over visible tokens and mask tokens (MAE); the trunk sees visible patches only.

    Tokens stay in the order visible, masked: positions are gathered rather than tokens unshuffled, masked
    tokens are the tail, and the last block computes the tail alone. All of this is exact.

    Args:
        dim: width of the backbone.
        out_dim: width of a prediction.
        grid: patches per side (rows, columns).
        width: of the decoder, a multiple of 4.
        depth: blocks.
        num_heads: of each block.
    """

    encoder_mask_token = None
    reads: Literal["all", "masked"] = "all"
    layers: tuple[int, ...] = ()

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        grid: tuple[int, int],
        width: int = 512,
        depth: int = 8,
        num_heads: int = 16,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.positions = Positions(grid, width, learned=False)
        self.blocks = nn.ModuleList(
            Block(Attention(width, num_heads), Mlp(width, 4 * width)) for _ in range(depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, out_dim)

    def forward(self, encoded: Encoded, mask: PatchMask) -> Tensor:
        """Encoded patches [B,K,D], the visible ones -> [1,B,M,out]."""
        R = encoded.prefix.shape[1]
        x = self.embed(self.norm(torch.cat([encoded.prefix, encoded.patches], dim=1)))  # [B,R+K,width]
        x = x.to(self.mask_token.dtype)
        visible = x[:, R:] + self.positions(mask.visible)
        masked = self.mask_token + self.positions(mask.masked)  # [B,M,width]
        x = torch.cat([x[:, :R], visible, masked], dim=1)  # [B,R+N,width]
        tail = torch.arange(x.shape[1] - masked.shape[1], x.shape[1], device=x.device).expand(len(x), -1)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, rows=tail)  # [B,M,width]
        return self.head(self.decoder_norm(x))[None]
