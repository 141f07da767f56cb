"""The backbone: stem, positions, prefix tokens and trunk. It knows masks and no objectives."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpm.backbones.attention import RelativePositionBias
from mpm.patchify.masks import PatchMask, take
from mpm.patchify.positions import sincos_table
from mpm.patchify.stems import Stem

__all__ = ["Backbone", "Encoded", "Positions", "take_rows"]


class Encoded(NamedTuple):
    """The residual stream after the last block; whoever reads it normalises it.

    Attributes:
        prefix: [B,R,D].
        patches: [B,T,D], or [B,S,D] where `read` chose S of them.
        layers: outputs [B,R+T,D] of the blocks asked for.
        bias: of all blocks' attention, [1 or B,h,R+T,R+T], where they share one; else None.
    """

    prefix: Tensor
    patches: Tensor
    layers: tuple[Tensor, ...] = ()
    bias: Tensor | None = None


class Positions(nn.Module):
    """A vector per place of the grid, added to the tokens.

    Args:
        grid: patches per side (rows, columns).
        dim: width of a token.
        learned: a parameter, or a fixed sine-cosine table.
    """

    table: Tensor

    def __init__(self, grid: tuple[int, int], dim: int, *, learned: bool):
        super().__init__()
        self.grid = grid
        empty = torch.empty(grid[0] * grid[1], dim)
        if learned:
            self.table = nn.Parameter(empty)
        else:
            self.register_buffer("table", empty)

    def reset_parameters(self) -> None:
        """Fill a fixed table; a learned one is drawn as the tokens are."""
        if isinstance(self.table, nn.Parameter):
            nn.init.trunc_normal_(self.table, std=0.02)
        else:
            self.table.copy_(sincos_table(self.grid, self.table.shape[1]))

    def forward(self, at: Tensor | None = None) -> Tensor:
        """All of them [N,D], or those at grid index `at` int64 [B,T]: [B,T,D]."""
        return self.table if at is None else self.table[at]


class Backbone(nn.Module):
    """Stem + positions + prefix tokens + trunk.

    Args:
        stem: patches to tokens.
        blocks: the trunk, called as `block(x, bias, rows)`.
        grid: patches per side (rows, columns).
        positions: added to the tokens; None: none.
        relative_bias: "shared" by all blocks, "per_block", or None.
        num_heads: of the relative bias.
        num_prefix: class, distillation and register tokens before the patches, in this order. They carry
            their own position in the parameter, so patch indices are never shifted.
    """

    def __init__(
        self,
        stem: Stem,
        blocks: Sequence[nn.Module],
        *,
        grid: tuple[int, int],
        positions: Positions | None = None,
        relative_bias: str | None = None,
        num_heads: int = 1,
        num_prefix: int = 1,
    ):
        super().__init__()
        self.dim = stem.dim
        self.grid = grid
        self.num_prefix = num_prefix
        self.stem = stem
        self.positions = positions
        self.prefix_tokens = nn.Parameter(torch.empty(num_prefix, stem.dim)) if num_prefix else None
        self.blocks = nn.ModuleList(blocks)
        biases = {"shared": 1, "per_block": len(self.blocks), None: 0}[relative_bias]
        self.relative_biases = nn.ModuleList(
            RelativePositionBias(grid, num_heads, num_prefix=num_prefix) for _ in range(biases)
        )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def embed(
        self, images: Tensor, mask: PatchMask | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Images to tokens with positions.

        Args:
            images: [B,C,H,W].
            mask: alone, masked patches are dropped.
            mask_token: [D]; with a mask, it stands at masked patches.

        Returns: [B,N,D], or [B,K,D] where masked patches are dropped.
        """
        tokens = self.stem(images, mask)
        if mask is not None and mask_token is not None:
            tokens = mask.fill(tokens, mask_token)  # [B,N,D]
        tokens = tokens.to(next(self.parameters()).dtype)  # the residual stream is never autocast
        if self.positions is None:
            return tokens
        at = mask.visible if mask is not None and mask_token is None else None
        return tokens + self.positions(at)

    def encode(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        read: Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> Encoded:
        """Tokens through the trunk.

        Args:
            tokens: [B,T,D].
            at: grid index int64 [B,T] of each token; None: all N in order. A relative bias is gathered by it.
            read: int64 [B,S] among T, the patches whose last block is computed; None: all.
            layers: indices of blocks whose outputs are wanted too.
        """
        R = self.num_prefix
        x = tokens
        if self.prefix_tokens is not None:
            prefix = self.prefix_tokens.to(tokens.dtype).expand(len(tokens), -1, -1)
            x = torch.cat([prefix, tokens], dim=1)  # [B,R+T,D]
        biases = [bias(at) for bias in self.relative_biases]
        rows = None if read is None else self._with_prefix(read)  # [B,R+S]
        kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            bias = biases[index % len(biases)] if biases else None
            last = index == self.depth - 1
            if last and rows is not None and index not in layers:
                x = block(x, None if bias is None else take_rows(bias, rows), rows)  # [B,R+S,D]
                break
            x = block(x, bias)
            if index in layers:
                kept[index] = x
        else:
            x = x if rows is None else take(x, rows)
        shared = biases[0] if len(biases) == 1 else None
        return Encoded(x[:, :R], x[:, R:], tuple(kept[layer] for layer in layers), shared)

    def forward(self, images: Tensor) -> Encoded:
        """Images [B,C,H,W] through everything, never masked."""
        return self.encode(self.embed(images))

    def layer_of(self, name: str) -> int:
        """Depth of a parameter for layer-wise rates: 0 = stem, positions, prefix; i + 1 = block i.

        A relative bias that all blocks share goes with the readout, depth + 1, as in BEiT's code.

        Raises:
            KeyError: on an unknown name.
        """
        part, _, rest = name.partition(".")
        match part:
            case "stem" | "positions" | "prefix_tokens":
                return 0
            case "blocks":
                return int(rest.partition(".")[0]) + 1
            case "relative_biases":
                return self.depth + 1 if len(self.relative_biases) == 1 else int(rest.partition(".")[0]) + 1
        raise KeyError(f"{name} is no parameter of a backbone")

    def _with_prefix(self, read: Tensor) -> Tensor:
        prefix = torch.arange(self.num_prefix, device=read.device).expand(len(read), -1)
        return torch.cat([prefix, read + self.num_prefix], dim=1)


def take_rows(bias: Tensor, rows: Tensor) -> Tensor:
    """Rows of a bias [1 or B,h,T,T] at int64 [B,S]: [B,h,S,T]."""
    B, S = rows.shape
    bias = bias.expand(B, -1, -1, -1)
    return bias.gather(2, rows[:, None, :, None].expand(B, bias.shape[1], S, bias.shape[3]))
