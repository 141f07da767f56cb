"""What `prepare` gives to an objective that trains a tokenizer."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["TokenizerInputs"]


class TokenizerInputs(NamedTuple):
    """Images, and what a teacher says of them.

    Attributes:
        images: float32 [B,C,H,W] in [0,1].
        features: of the teacher's patches, float32 [B,N,F]; None where there is no teacher.
    """

    images: Tensor
    features: Tensor | None
