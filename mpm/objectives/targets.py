"""What a masked objective predicts."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.patchify.masks import PatchMask
from mpm.patchify.patches import patchify, unpatchify
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.base import Tokenizer

__all__ = ["CodeTarget", "PixelTarget", "Target"]


class Target(Protocol):
    """The thing predicted at masked patches.

    Attributes:
        out_dim: width F of a prediction.
    """

    out_dim: int

    def __call__(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Images [B,C,H,W] in [0,1], the target's view of them -> float32 [B,M,F], or codes int64 [B,M]."""
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


class CodeTarget(nn.Module):
    """The code that a frozen tokenizer gives a patch (BEiT).

    Args:
        tokenizer: in eval mode; codes are those of its whole view of the crop.
        patch_size: height and width of the network's patches in pixels.
        dtype: of the tokenizer's matrix products, float32 or bfloat16.
        draw: (codes int64 [B,N], grid) -> images [B,C,h,w] in [0,1], where the tokenizer has no decoder.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        patch_size: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        draw: Callable[[Tensor, tuple[int, int]], Tensor],
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.patch_size = patch_size
        self.dtype = dtype
        self.out_dim = tokenizer.vocab_size
        self._draw = draw

    def codes(self, images: Tensor) -> Tensor:
        """Images [B,C,h,w] in [0,1], a stride for each patch -> int64 [B,N]."""
        enabled = self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=enabled):
            return self.tokenizer.encode(images)

    def forward(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Images [B,C,h,w] in [0,1], a stride for each patch -> int64 [B,M]."""
        return mask.take_masked(self.codes(images))

    def render(self, predictions: Tensor, images: Tensor, mask: PatchMask) -> Tensor:
        """The likeliest codes, decoded among the true ones of visible patches, drawn at masked patches."""
        size = images.shape[-2:]
        grid = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        view = [side * stride for side, stride in zip(grid, self.tokenizer.stride, strict=True)]
        codes = self.codes(F.interpolate(images, view, mode="bilinear", antialias=True).clamp(0, 1))
        codes = codes.scatter(1, mask.masked, predictions.argmax(-1))
        drawn = self.tokenizer.decode(codes, grid)
        if drawn is None:
            drawn = self._draw(codes, grid)
        drawn = F.interpolate(drawn, size, mode="bilinear", antialias=True).clamp(0, 1)
        hidden = mask.take_masked(patchify(drawn, self.patch_size))  # [B,M,F]
        index = mask.masked[..., None].expand_as(hidden)
        patches = patchify(images, self.patch_size).scatter(1, index, hidden)
        return unpatchify(patches, self.patch_size, grid=grid)
