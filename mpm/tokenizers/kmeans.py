"""k-means tokenizers: a code is the nearest of V centroids, of pixels or of a frozen network's features."""

from typing import Self

import torch
from torch import Tensor, nn

from mpm.backbones.backbone import Backbone
from mpm.patchify.patches import patchify
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.codebook import Codebook

__all__ = ["FeatureCodes", "PatchCodes"]


class PatchCodes(nn.Module):
    """The nearest centroid of each patch's pixels.

    With `normalize_patches`, a patch is (x - mean) / sqrt(variance + 0.003), of the channel-normalised image,
    the variance unbiased. The 0.003 is from Coates and Ng (2012, "Learning feature representations with
    k-means"): 10 on a scale of 255, at ImageNet's deviations. The 1e-6 of pixel targets would give the noise
    of a flat patch as much contrast as any edge has, and codes would be spent on it: a deviation of half a
    grey level becomes 0.99. Here it becomes 0.16, and a patch of a third of the images' deviation loses 1%.

    Args:
        num_codes: V.
        patch_size: height and width of a patch in pixels.
        normalize: per-channel normalisation of the images.
        channels: of the images.
        normalize_patches: each patch by its own mean and deviation, so that codes tell shapes rather than
            brightness.
        interpolation: of crops to its size.

    Attributes:
        codebook: its vectors are float32 [V,P*P*C].
        vocab_size: V.
        stride: the patch size.
        grid: None: it takes images of any size.
    """

    epsilon = 0.003

    def __init__(
        self,
        num_codes: int,
        *,
        patch_size: tuple[int, int],
        normalize: Normalize,
        channels: int,
        normalize_patches: bool = True,
        interpolation: str = "bicubic",
    ):
        super().__init__()
        self.vocab_size = num_codes
        self.stride = patch_size
        self.channels = channels
        self.grid: tuple[int, int] | None = None
        self.interpolation = interpolation
        self.normalize = normalize
        self.normalize_patches = normalize_patches
        self.codebook = Codebook(num_codes, patch_size[0] * patch_size[1] * channels, metric="euclidean")

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """What is clustered: images [B,C,H,W] in [0,1] -> float32 [B,N,P*P*C]."""
        patches = patchify(self.normalize(images.float()), self.stride)
        if not self.normalize_patches:
            return patches
        deviation = (patches.var(-1, keepdim=True) + self.epsilon).sqrt()
        return (patches - patches.mean(-1, keepdim=True)) / deviation

    def encode(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> int64 [B,N]."""
        return _codes(self, images)

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> None:
        """It has no decoder: a normalised patch has lost its brightness."""


class FeatureCodes(nn.Module):
    """The nearest centroid of each patch token of a frozen network.

    Tokens are those after the norm that the network was trained with, or of an inner layer after a LayerNorm
    without weights: the residual stream's scale grows from block to block. The network runs in float32 under
    autocast too, as codes must not depend on who asks. It is frozen here, always in eval mode, and loses the
    blocks above the layer.

    Args:
        num_codes: V.
        backbone: the network; part of this module from now on.
        norm: of its last tokens; None: a LayerNorm without weights.
        normalize: of its images.
        layer: block whose output is taken, counted from 1; None: the last.
        interpolation: of crops to its size.

    Attributes:
        codebook: its vectors are float32 [V,D].
        vocab_size: V.
        stride: the network's patch size.
        channels: of the images.
        grid: the network's.

    Raises:
        ValueError: if there is no such layer.
    """

    def __init__(
        self,
        num_codes: int,
        *,
        backbone: Backbone,
        norm: nn.Module | None,
        normalize: Normalize,
        layer: int | None,
        interpolation: str = "bicubic",
    ):
        super().__init__()
        if layer is not None and not 1 <= layer <= backbone.depth:
            raise ValueError(f"layer {layer} of the network is not there; use 1 to {backbone.depth}")
        is_last = layer in (None, backbone.depth)
        self.vocab_size = num_codes
        self.stride = backbone.stem.patch_size
        self.channels = len(normalize.mean)
        self.grid = backbone.grid
        self.interpolation = interpolation
        self.normalize = normalize
        self.backbone = backbone
        backbone.blocks = backbone.blocks[:layer]
        backbone.relative_biases = backbone.relative_biases[:layer]
        if norm is None or not is_last:
            norm = nn.LayerNorm(backbone.dim, eps=1e-6, elementwise_affine=False)
        self.norm = norm
        self.codebook = Codebook(num_codes, backbone.dim, metric="euclidean")
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """The network stays in eval mode, and nothing else in here has another."""
        return super().train(False)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """What is clustered: images [B,C,H,W] in [0,1] -> float32 [B,N,D].

        Raises:
            ValueError: if the images are not of the network's size.
        """
        height, width = self.grid[0] * self.stride[0], self.grid[1] * self.stride[1]
        if images.shape[2:] != (height, width):
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels, where the tokenizer's network takes "
                f"{height}x{width}; crop to that size"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.norm(self.backbone(self.normalize(images.float())).patches)

    def encode(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> int64 [B,N]."""
        return _codes(self, images)

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> None:
        """It has no decoder."""


@torch.no_grad()
def _codes(tokenizer: PatchCodes | FeatureCodes, images: Tensor) -> Tensor:
    assert tokenizer.codebook.is_started, "a tokenizer encodes once it was trained or loaded"
    return tokenizer.codebook.nearest(tokenizer.vectors(images))
