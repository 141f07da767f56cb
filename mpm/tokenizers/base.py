"""What every tokenizer is."""

from typing import Protocol

from torch import Tensor

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """Images to one code for each patch; frozen once it is trained.

    Attributes:
        vocab_size: V, number of codes.
        stride: height and width in pixels of what a code stands for.
        channels: of the images.
        grid: codes per side (rows, columns) of the images it takes; None: any.
        interpolation: of crops to its size, "bicubic", "bilinear" or "lanczos".
    """

    vocab_size: int
    stride: tuple[int, int]
    channels: int
    grid: tuple[int, int] | None
    interpolation: str

    def encode(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1], sides multiples of the stride -> int64 [B,N], row-major."""
        ...

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Codes int64 [B,N] of a grid -> images float32 [B,C,H,W] in [0,1]; None where it has no decoder."""
        ...
