"""A discrete variational autoencoder: convolutions to codes, and codes to pixels."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from mpm.patchify.pixels import Normalize

__all__ = ["DiscreteVAE"]


class DiscreteVAE(nn.Module):
    """The convolutional autoencoder of BEiT's own tokenizers (arXiv:2106.08254; "customized" in its code).

    | encoder | decoder |
    |---|---|
    | per layer: convolution 4x4 of stride 2, ReLU, residual blocks | the codes' vectors |
    | 1x1 convolution to a logit for each code | per layer: transposed convolution, ReLU, residual blocks |
    | | 1x1 convolution to normalised pixels |

    A residual block adds convolution 3x3, ReLU, convolution 3x3, ReLU, convolution 1x1. The defaults are the
    published sizes, 20,081,411 parameters. Names and shapes of the state are the published ones, besides
    `normalize.*`. Nothing in it looks at a batch: an image has the same codes in every batch, but for ties.

    Args:
        num_codes: V.
        code_dim: width of a code's vector.
        hidden: channels of the convolutions.
        layers: convolutions of stride 2.
        blocks: residual blocks after each of them.
        channels: of the images.
        normalize: of the pixels that it reads and tells.
        interpolation: of crops to its size.

    Attributes:
        vocab_size: V.
        stride: height and width in pixels of what a code stands for, 2^layers.
        channels: of the images.
        grid: None, any number of codes per side.
        interpolation: of crops to its size.
    """

    def __init__(
        self,
        num_codes: int = 8192,
        *,
        code_dim: int = 512,
        hidden: int = 256,
        layers: int = 3,
        blocks: int = 1,
        channels: int = 3,
        normalize: Normalize,
        interpolation: str = "bicubic",
    ):
        super().__init__()
        assert len(normalize.mean) in (1, channels)
        self.vocab_size = num_codes
        self.stride = (2**layers, 2**layers)
        self.channels = channels
        self.grid: tuple[int, int] | None = None
        self.interpolation = interpolation
        self.normalize = normalize
        self.codebook = nn.Embedding(num_codes, code_dim)
        down, up = [channels] + layers * [hidden], [code_dim] + layers * [hidden]
        self.encoder = nn.Sequential(
            *_stages(nn.Conv2d, down, blocks=blocks), nn.Conv2d(hidden, num_codes, 1)
        )
        self.decoder = nn.Sequential(
            *_stages(nn.ConvTranspose2d, up, blocks=blocks), nn.Conv2d(hidden, channels, 1)
        )

    def reset_parameters(self) -> None:
        """The published start values, which are torch's own.

        Convolutions uniform within 1 / sqrt(fan in), weights and biases; codes' vectors normal 1.
        """
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
                part.reset_parameters()

    def logits(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> [B,V,h,w], in the precision of autocast."""
        logits: Tensor = self.encoder(self.normalize(images))
        return logits

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Codes' vectors, or mixtures of them, [B,D,h,w] -> normalised images [B,C,H,W]."""
        images: Tensor = self.decoder(vectors)
        return images

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> the likeliest codes int64 [B,N], row-major."""
        return self.logits(images).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes int64 [B,N] of a grid -> images float32 [B,C,H,W] in [0,1]."""
        rows, columns = grid
        vectors = rearrange(self.codebook(codes), "b (h w) d -> b d h w", h=rows, w=columns)
        return self.normalize.undo(self.reconstruct(vectors).float()).clamp(0, 1)


def _stages(
    convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: list[int], *, blocks: int
) -> Iterator[nn.Module]:
    for before, after in pairwise(widths):
        yield nn.Sequential(convolution(before, after, 4, stride=2, padding=1), nn.ReLU())
        for _ in range(blocks):
            yield _ResidualBlock(after)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B,K,h,w] -> [B,K,h,w]."""
        residual: Tensor = self.net(images)
        return images + residual
