"""What a masked objective predicts."""

from typing import Protocol

from torch import Tensor, nn

from mpm.patchify.masks import PatchMask
from mpm.patchify.patches import patchify, unpatchify
from mpm.patchify.pixels import Normalize

__all__ = ["PixelTarget", "Target"]


class Target(Protocol):
    """The thing predicted at masked patches.

    Attributes:
        out_dim: width F of a prediction.
    """

    out_dim: int

    def __call__(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> float32 [B,M,F]."""
        ...

    def render(self, predictions: Tensor, images: Tensor, mask: PatchMask) -> Tensor:
        """Predictions [B,M,F] drawn into the images [B,C,H,W] in [0,1] at masked patches: [B,C,H,W]."""
        ...


class PixelTarget(nn.Module):
    """The pixels of a patch (SimMIM, MAE), by default of the channel-normalised image.

    Args:
        patch_size: height and width of a patch in pixels.
        normalize: per-channel normalisation of the images.
        normalize_patches: each patch to zero mean and unit (unbiased) deviation (MAE's norm-pix).
    """

    epsilon = 1e-6

    def __init__(
        self, patch_size: tuple[int, int], *, normalize: Normalize, channels: int, normalize_patches: bool
    ):
        super().__init__()
        self.patch_size = patch_size
        self.normalize = normalize
        self.normalize_patches = normalize_patches
        self.out_dim = patch_size[0] * patch_size[1] * channels

    def forward(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> float32 [B,M,P*P*C]."""
        patches = mask.take_masked(patchify(self.normalize(images), self.patch_size))
        if not self.normalize_patches:
            return patches
        mean, std = self._moments(patches)
        return (patches - mean) / std

    def render(self, predictions: Tensor, images: Tensor, mask: PatchMask) -> Tensor:
        """Predictions drawn at masked patches; norm-pix is undone with the true patches' moments."""
        grid = images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]
        patches = patchify(self.normalize(images), self.patch_size)  # [B,N,F]
        if self.normalize_patches:
            mean, std = self._moments(mask.take_masked(patches))
            predictions = predictions * std + mean
        index = mask.masked[..., None].expand_as(predictions)
        drawn = patches.scatter(1, index, predictions.to(patches.dtype))
        return self.normalize.undo(unpatchify(drawn, self.patch_size, grid=grid)).clamp(0, 1)

    def _moments(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + self.epsilon).sqrt()
