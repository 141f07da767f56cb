"""The tokenizer of BEiT v2: a vision transformer whose patch tokens are quantised."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.backbone import Backbone
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.codebook import Codebook

__all__ = ["VQKD", "task_layer"]


class VQKD(nn.Module):
    """Vector-quantised knowledge distillation (BEiT v2, arXiv:2208.06366, section 3.1).

    Backbone, a norm of its patch tokens, Linear-Tanh-Linear to a unit vector, and the code whose vector is
    nearest. The norm is the released code's `fc_norm`. Prefix tokens take part and have no code. The
    published encoder is a ViT-B with a class token and biases of queries and values only, at 224.

    Args:
        backbone: the encoder.
        num_codes: V.
        code_dim: width d of a code's vector.
        normalize: of the pixels; published: mean and deviation 0.5.
        channels: of the images.
        interpolation: of crops to its size.

    Attributes:
        vocab_size: V.
        stride: height and width in pixels of what a code stands for, the backbone's patch.
        channels: of the images.
        grid: codes per side (rows, columns).
        interpolation: of crops to its size.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_codes: int,
        code_dim: int,
        normalize: Normalize,
        channels: int,
        interpolation: str = "bicubic",
    ):
        super().__init__()
        assert len(normalize.mean) in (1, channels)
        self.vocab_size = num_codes
        self.stride = backbone.stem.patch_size
        self.channels = channels
        self.grid = backbone.grid
        self.interpolation = interpolation
        self.normalize = normalize
        self.backbone = backbone
        self.norm = nn.LayerNorm(backbone.dim, eps=1e-6)
        self.task_layer = task_layer(backbone.dim, code_dim)
        self.codebook = Codebook(num_codes, code_dim, metric="cosine")

    def project(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> what is quantised, vectors of length 1 [B,N,d].

        The task layer is float32 in autocast too.

        Raises:
            ValueError: if the images are not of its size, which its positions are for.
        """
        height, width = (count * side for count, side in zip(self.grid, self.stride, strict=True))
        if images.shape[2:] != (height, width):
            raise ValueError(
                f"images are {images.shape[2]}x{images.shape[3]}, but the tokenizer's positions are for "
                f"{height}x{width}; give it images of that size"
            )
        tokens = self.norm(self.backbone(self.normalize(images)).patches)  # [B,N,D]
        with torch.autocast(images.device.type, enabled=False):
            vectors = self.task_layer(tokens.to(self.norm.weight.dtype))  # [B,N,d]
        return F.normalize(vectors, dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> int64 [B,N], row-major."""
        return self.codebook.nearest(self.project(images))

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int]) -> None:
        """Nothing: its decoder tells a teacher's features, and is left in training."""
        return None


def task_layer(dim: int, out_dim: int) -> nn.Sequential:
    """Linear, Tanh, Linear: between a trunk's tokens and what they are learned for."""
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out_dim))
