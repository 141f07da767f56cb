"""Pictures of what a masked objective does."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.targets import Target
from mpm.patchify.masks import PatchMask
from mpm.patchify.patches import patchify, unpatchify
from mpm.patchify.pixels import Normalize

__all__ = ["displayable", "reconstructions", "sheet"]

_SMALLEST_TILE_PX = 96
_GAP_PX = 4


def displayable(images: Tensor) -> Tensor:
    """Images [B,C,H,W] in [0,1] as uint8 [B,3,H,W]: grey is repeated, of many channels three are shown."""
    B, C, H, W = images.shape
    if C == 1:
        images = images.expand(B, 3, H, W)
    elif C == 2:
        images = torch.cat([images, images.new_zeros(B, 1, H, W)], dim=1)
    return images[:, :3].clamp(0, 1).mul(255).round().to(torch.uint8)


@torch.no_grad()
def reconstructions(
    objective: MaskedPrediction, target: Target, images: Tensor, mask: PatchMask, *, normalize: Normalize
) -> Tensor:
    """A column per image: original, masked, and with the predictions at masked patches.

    Args:
        objective: in the mode that it is in; call it in eval mode.
        target: what it predicts; norm-pix predictions are drawn with the true patches' mean and deviation.
        images: [B,C,H,W] in [0,1].
        mask: which patches are hidden.
        normalize: for the network.

    Returns: uint8 [3,H',W'], small images enlarged.
    """
    predictions = objective.predict(normalize(images), mask)[0].float()  # [B,M,F]
    patch_size = objective.backbone.stem.patch_size
    patches = patchify(images, patch_size)
    index = mask.masked[..., None].expand(-1, -1, patches.shape[-1])
    hidden = unpatchify(patches.scatter(1, index, 0.5), patch_size, grid=objective.backbone.grid)
    rows = [displayable(row) for row in (images, hidden, target.render(predictions, images, mask))]
    return sheet(torch.stack(rows))


def sheet(tiles: Tensor) -> Tensor:
    """Tiles uint8 [rows,columns,3,H,W] on a white sheet, uint8 [3,H',W']."""
    scale = max(1, -(-_SMALLEST_TILE_PX // min(tiles.shape[-2:])))
    tiles = tiles.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    tiles = F.pad(tiles, (0, _GAP_PX, 0, _GAP_PX), value=255)
    return tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
