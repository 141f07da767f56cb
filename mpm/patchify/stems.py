"""Stems: patches to tokens, computed for the visible patches only.

A stem gets the mask and owns how to be blind. Patch-local stems gather pixels before they compute; the
convolutional stem, whose fields overlap, blanks hidden pixels, computes, and gathers after.
"""

from itertools import pairwise
from typing import Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.patchify.masks import PatchMask
from mpm.patchify.norms import TokenBatchNorm
from mpm.patchify.patches import patchify

__all__ = [
    "ConvStem",
    "HierarchicalMLPStem",
    "LinearStem",
    "NormKind",
    "Statistics",
    "Stem",
    "merge_factors",
]

NormKind = Literal["layer", "batch"]
Statistics = Literal["visible", "all"]


class Stem(Protocol):
    """Patches to tokens.

    Attributes:
        patch_size: height and width of a patch in pixels.
        dim: width of a token.
        patch_local: whether a token depends on its own patch only.
    """

    patch_size: tuple[int, int]
    dim: int
    patch_local: bool

    @property
    def computes_hidden(self) -> bool:
        """Whether, in its present mode, it computes hidden patches too before it leaves them out."""
        ...

    def __call__(self, images: Tensor, mask: PatchMask | None = None) -> Tensor:
        """Images [B,C,H,W] -> [B,N,D], or [B,K,D] of the visible patches with a mask."""
        ...


class LinearStem(nn.Module):
    """One linear map per patch (ViT, arXiv:2010.11929); equal to a convolution with kernel = stride = patch.

    A norm and GELU may follow, as in "Three things" (arXiv:2203.09795, table 7).

    Args:
        patch_size: height and width of a patch in pixels.
        dim: width of a token.
        channels: of the images.
        norm: over the channels of a token, or over the batch.
        activation: after the norm.
        statistics: of batch norm in train mode under a mask, see `HierarchicalMLPStem`.
    """

    patch_local = True

    def __init__(
        self,
        patch_size: tuple[int, int],
        dim: int,
        *,
        channels: int = 3,
        norm: NormKind | Literal["none"] = "none",
        activation: Literal["none", "gelu"] = "none",
        statistics: Statistics = "all",
    ):
        super().__init__()
        self.patch_size = patch_size
        self.dim = dim
        self._needs_all = norm == "batch" and statistics == "all"
        self.proj = nn.Linear(patch_size[0] * patch_size[1] * channels, dim)
        self.norm = _norm(norm, dim)
        self.activation = nn.GELU() if activation == "gelu" else nn.Identity()

    @property
    def computes_hidden(self) -> bool:
        """In train mode, for batch statistics of all patches."""
        return self._needs_all and self.training

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Tensor:
        """Images [B,C,H,W] -> [B,N,D], or [B,K,D] with a mask."""
        x = patchify(images, self.patch_size)  # [B,N,P*P*C]
        if mask is not None and not self.computes_hidden:
            x = mask.take_visible(x)  # [B,K,P*P*C]
        x = self.norm(self.proj(x))
        if mask is not None and self.computes_hidden:
            x = mask.take_visible(x)  # [B,K,D]
        return self.activation(x)


def merge_factors(patch_size: int) -> tuple[int, ...]:
    """Kernel (= stride) of each stage of the hMLP stem, finest first; their product is the patch size.

    16 = 4·2·2 is published ("Three things", arXiv:2203.09795, App. C); the others keep its rule, a first
    step of 4, or of 7 for multiples of 7 (2 for a patch of 4), then steps of 2: 8 = 4·2, 4 = 2·2, 14 = 7·2,
    32 = 4·2·2·2. What does not factor so (7, 6, 10) is one step.
    """
    first = 7 if patch_size % 7 == 0 else 2 if patch_size == 4 else 4
    rest, factors = patch_size // first, [first]
    while rest > 1 and rest % 2 == 0:
        factors.append(2)
        rest //= 2
    return tuple(factors) if patch_size % first == 0 and rest == 1 else (patch_size,)


class HierarchicalMLPStem(nn.Module):
    """Hierarchical MLP stem ("Three things", arXiv:2203.09795, section 5 and App. C).

    Published as convolutions whose kernel equals their stride, so it is an MLP per patch: one rearrangement
    makes every merge contiguous, then come Linear layers, each followed by a norm and, except the last, GELU.
    Widths are D/4 except the last, D. A convolution's weight [out,in,kh,kw] is the Linear's after
    `permute(0,2,3,1).flatten(1)`.

    With batch norm, `statistics` says what the batch statistics of a masked image are taken from: `all`
    patches, as in the paper, which masks after the stem (hidden pixels are then seen through two moments per
    channel), or the `visible` ones alone, which is faster and blind.

    Args:
        patch_size: height and width of a patch in pixels, equal.
        dim: width of a token, a multiple of 4.
        channels: of the images.
        norm: over the channels of a location, or over the batch.
        statistics: of batch norm in train mode under a mask.

    Raises:
        ValueError: if the patch is not square or `dim` not a multiple of 4.
    """

    patch_local = True

    def __init__(
        self,
        patch_size: tuple[int, int],
        dim: int,
        *,
        channels: int = 3,
        norm: NormKind = "batch",
        statistics: Statistics = "all",
    ):
        super().__init__()
        if patch_size[0] != patch_size[1]:
            raise ValueError(f"patch_size {patch_size} is not square, which the hmlp stem needs")
        if dim % 4:
            raise ValueError(f"dim {dim} is not a multiple of 4, which the hmlp stem needs")
        self.patch_size = patch_size
        self.dim = dim
        self._needs_all = norm == "batch" and statistics == "all"
        factors = merge_factors(patch_size[0])
        widths = [channels] + [dim // 4] * (len(factors) - 1) + [dim]
        self._areas = [factor**2 for factor in factors]
        self.projs = nn.ModuleList(
            nn.Linear(area * narrow, wide)
            for area, (narrow, wide) in zip(self._areas, pairwise(widths), strict=True)
        )
        self.norms = nn.ModuleList(_norm(norm, wide) for wide in widths[1:])
        # coarse to fine: "b c (gh h0 h1 h2) (gw w0 w1 w2) -> b (gh gw) (h0 w0 h1 w1) (h2 w2 c)"
        steps = range(len(factors))
        self._pattern = "b c (gh {}) (gw {}) -> b (gh gw) ({}) (h{} w{} c)".format(
            " ".join(f"h{i}" for i in steps),
            " ".join(f"w{i}" for i in steps),
            " ".join(f"h{i} w{i}" for i in steps[:-1]),
            steps[-1],
            steps[-1],
        )
        self._axes = {f"{side}{i}": factor for side in "hw" for i, factor in enumerate(reversed(factors))}

    @property
    def computes_hidden(self) -> bool:
        """In train mode, for batch statistics of all patches."""
        return self._needs_all and self.training

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Tensor:
        """Images [B,C,H,W] -> [B,N,D], or [B,K,D] with a mask."""
        x = rearrange(images, self._pattern, **self._axes)  # [B,N,locations,pixels of the first step]
        if mask is not None and not self.computes_hidden:
            x = mask.take_visible(x)  # [B,K,...]
        for step, (area, proj, norm) in enumerate(zip(self._areas, self.projs, self.norms, strict=True)):
            if step:
                x = rearrange(F.gelu(x), "b n (l area) c -> b n l (area c)", area=area)
            x = norm(proj(x))
        x = x.squeeze(2)
        return mask.take_visible(x) if mask is not None and self.computes_hidden else x


class ConvStem(nn.Module):
    """Convolutional stem: 3x3 convolutions of stride 2 (LeViT, arXiv:2104.01136).

    One convolution per factor 2 of the patch, each followed by a norm and, except the last, GELU; widths
    double up to D (16 px: D/8, D/4, D/2, D). The field of a token (31 px for a patch of 16) overlaps its
    neighbours', so hidden pixels are set to zero, the channel mean, before the first convolution.

    Args:
        patch_size: height and width of a patch in pixels, an equal power of two.
        dim: width of a token, a multiple of half the patch.
        channels: of the images.
        norm: over the channels of a location, or over the batch.

    Raises:
        ValueError: if the patch is not a power of two, or `dim` not a multiple of half of it.
    """

    patch_local = False
    computes_hidden = True  # as blank pixels

    def __init__(self, patch_size: tuple[int, int], dim: int, *, channels: int = 3, norm: NormKind = "batch"):
        super().__init__()
        side = patch_size[0]
        if patch_size[1] != side or side < 2 or side & (side - 1):
            raise ValueError(
                f"patch_size {patch_size} is not a square power of two; the conv stem takes 2, 4, 8, 16, 32"
            )
        if dim % (side // 2):
            raise ValueError(
                f"dim {dim} is not a multiple of {side // 2}, which a conv stem of patch {side} needs"
            )
        self.patch_size = patch_size
        self.dim = dim
        steps = side.bit_length() - 1
        widths = [channels] + [dim >> (steps - 1 - i) for i in range(steps)]
        self.convs = nn.ModuleList(
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1) for narrow, wide in pairwise(widths)
        )
        self.norms = nn.ModuleList(_norm(norm, wide) for wide in widths[1:])

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Tensor:
        """Images [B,C,H,W] -> [B,N,D], or [B,K,D] with a mask."""
        x = images if mask is None else self._blank(images, mask)
        for step, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if step:
                x = F.gelu(x)
            x = norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # both norms are over the last axis
        x = x.flatten(2).transpose(1, 2)  # [B,N,D]
        return x if mask is None else mask.take_visible(x)

    def _blank(self, images: Tensor, mask: PatchMask) -> Tensor:
        """The images with hidden patches set to zero."""
        side = self.patch_size[0]
        grid = images.shape[2] // side, images.shape[3] // side
        seen = images.new_zeros(len(images), grid[0] * grid[1]).scatter(1, mask.visible, 1.0)
        seen = seen.reshape(-1, 1, *grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
        # where, not a product: a hidden NaN or infinity must stay hidden
        return torch.where(seen.bool(), images, 0.0)


def _norm(kind: NormKind | Literal["none"], dim: int) -> nn.Module:
    match kind:
        case "none":
            return nn.Identity()
        case "layer":
            return nn.LayerNorm(dim, eps=1e-6)
        case "batch":
            return TokenBatchNorm(dim)
