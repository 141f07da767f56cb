"""How a tokenizer's codes are used: whether its codebook is healthy, and what its codes look like."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mpm import distributed
from mpm.patchify.patches import patchify, unpatchify
from mpm.tokenizers.base import Tokenizer

__all__ = ["CodeUse", "code_use"]


class CodeUse(NamedTuple):
    """What the codes of some images are.

    Attributes:
        counts: patches of each code, float64 [V].
        patches: mean pixels of the patches of each code, float32 [V,h*w*C]; 0 where there are none.
        stride: height and width of a patch in pixels.
    """

    counts: Tensor
    patches: Tensor
    stride: tuple[int, int]

    @property
    def live_share(self) -> float:
        """Codes that occur, as a share of those that could: of V, or of the patches where these are fewer."""
        possible = min(len(self.counts), int(self.counts.sum()))
        return int((self.counts > 0).sum()) / max(possible, 1)

    @property
    def perplexity(self) -> float:
        """Exp of the entropy: how many codes, used equally often, would be as varied; V at most."""
        shares = self.counts / self.counts.sum()
        return math.exp(float(torch.special.entr(shares).sum()))

    @property
    def frequent_share(self) -> float:
        """Share of the patches with the most frequent code: what guessing it always gets right."""
        return float(self.counts.max() / self.counts.sum())

    def draw(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes int64 [B,N] as the mean patches that they stand for: [B,C,H,W] in [0,1]."""
        return unpatchify(self.patches[codes], self.stride, grid=grid)

    def __str__(self) -> str:
        used, V = int((self.counts > 0).sum()), len(self.counts)
        return (
            f"{used} of {V} codes occur in {int(self.counts.sum()):,} patches, "
            f"perplexity {self.perplexity:.0f}, the most frequent in {self.frequent_share:.1%}"
        )


@torch.no_grad()
def code_use(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> CodeUse:
    """Looks at images; every process gives its own, and all get the sum.

    Args:
        tokenizer: in eval mode.
        batches: images float32 [B,C,H,W] in [0,1], on the tokenizer's device.

    Raises:
        ValueError: if there are no images.
    """
    V, (height, width) = tokenizer.vocab_size, tokenizer.stride
    sums: Tensor | None = None
    for images in batches:
        codes = tokenizer.encode(images).flatten()
        patches = patchify(images, tokenizer.stride).flatten(0, 1)  # [B*N,F]
        counted = torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1).double()
        if sums is None:
            sums = counted.new_zeros(V, height * width * tokenizer.channels + 1)
        sums.index_add_(0, codes, counted)
    if sums is None:
        raise ValueError("no images were given to look at codes")
    sums = distributed.sum_over_ranks(sums)
    counts = sums[:, -1]
    return CodeUse(counts, (sums[:, :-1] / counts.clamp(min=1)[:, None]).float(), tokenizer.stride)
