"""Histograms of oriented gradients as a target (MaskFeat, arXiv:2112.09133)."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.patchify.masks import PatchMask
from mpm.patchify.patches import patchify, unpatchify

__all__ = ["HOGTarget", "hog"]

_SMALLEST_CELL_PX = 2


def hog(images: Tensor, *, cell: tuple[int, int], bins: int = 9) -> Tensor:
    """Histograms of oriented gradients: for each cell and channel, how strong edges are by direction.

    As MaskFeat's released code has it: Sobel filters on each channel (where HOG is often described with
    [-1, 0, 1]), reflected borders, orientation without sign, each pixel's magnitude in one bin, no Gaussian
    window, and the l2 norm of each histogram is 1, so brightness, contrast and the scale of a channel do not
    matter. Bin k holds gradients at k to k + 1 times pi / bins from the vertical; a flat cell is all zeros.

    Args:
        images: float32 [B,C,H,W], sides multiples of the cell.
        cell: height and width in pixels.
        bins: directions.

    Returns: [B,C*bins,H/h,W/w] for a cell h x w, bins of a channel together.
    """
    # differences before sums, not convolutions: an edge along an axis, at the border of two bins, is exact
    # on every device
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")  # [B,C,H+2,W+2]
    across = padded[..., :-2] - padded[..., 2:]  # [B,C,H+2,W]
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]  # [B,C,H,W]
    down = padded[..., :-2, :] - padded[..., 2:, :]  # [B,C,H,W+2]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]  # [B,C,H,W]
    magnitude = torch.hypot(across, down)
    found = (torch.atan2(across, down) / math.pi * bins).floor().remainder(bins)
    # means where histograms are sums: the norm makes them the same
    histograms = [F.avg_pool2d(magnitude.where(found == k, 0.0), cell) for k in range(bins)]
    return F.normalize(torch.stack(histograms, 2), dim=2).flatten(1, 2)


class HOGTarget(nn.Module):
    """Histograms of oriented gradients of the cells of a patch (MaskFeat, with an l2 loss).

    Features of a patch are in the order (channel, bin, row, column), as in the released code.

    Args:
        patch_size: height and width of a patch in pixels.
        channels: of the images.
        bins: directions of a histogram.
        cells: histograms per side of a patch.

    Raises:
        ValueError: if the cells do not fit the patch.
    """

    def __init__(self, patch_size: tuple[int, int], *, channels: int, bins: int = 9, cells: int = 2):
        super().__init__()
        legal = [
            n
            for n in range(1, min(patch_size) // _SMALLEST_CELL_PX + 1)
            if patch_size[0] % n == 0 and patch_size[1] % n == 0
        ]
        if cells not in legal:
            fix = f"use one of {legal}" if legal else f"use patches of {_SMALLEST_CELL_PX} pixels or more"
            raise ValueError(
                f"cells {cells} a side do not cut a patch of {patch_size[0]}x{patch_size[1]} pixels into "
                f"whole cells of at least {_SMALLEST_CELL_PX} pixels; {fix}"
            )
        self.patch_size = patch_size
        self.cells = cells
        self.cell = patch_size[0] // cells, patch_size[1] // cells
        self.bins = bins
        self.out_dim = channels * bins * cells**2

    def features(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> those of every patch, float32 [B,N,F]."""
        histograms = hog(images, cell=self.cell, bins=self.bins)
        n = self.cells
        return rearrange(histograms, "b f (h p) (w q) -> b (h w) (f p q)", p=n, q=n)

    def forward(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> float32 [B,M,F]."""
        return mask.take_masked(self.features(images))

    def render(self, predictions: Tensor, images: Tensor, mask: PatchMask) -> Tensor:
        """Edges at masked patches: in each cell a line for each bin, as bright as the bin is full."""
        grid = images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]
        n = self.cells
        full = rearrange(predictions.float(), "b m (c k p q) -> b m c k p q 1 1", k=self.bins, p=n, q=n)
        lines = rearrange(self._lines(images.device), "k y x -> k 1 1 y x")
        drawn = (full.clamp(0, 1) * lines).amax(3)  # [B,M,C,cells,cells,height,width]
        drawn = rearrange(drawn, "b m c p q y x -> b m (p y q x c)")
        patches = patchify(images, self.patch_size)  # [B,N,P*P*C]
        index = mask.masked[..., None].expand_as(drawn)
        return unpatchify(
            patches.scatter(1, index, drawn.to(patches.dtype)), self.patch_size, grid=grid
        ).clamp(0, 1)

    def _lines(self, device: torch.device) -> Tensor:
        """Lines through the middle of a cell at right angles to each bin's gradients: [bins,height,width]."""
        y, x = (torch.arange(side, device=device) - (side - 1) / 2 for side in self.cell)
        angle = (torch.arange(self.bins, device=device) + 0.5) * (math.pi / self.bins)
        angle = angle[:, None, None]
        distance = (x * angle.sin() + y[:, None] * angle.cos()).abs()
        return (1 - distance).clamp(min=0)
