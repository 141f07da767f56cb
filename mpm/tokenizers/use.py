"""How a tokenizer's codes are used: whether its codebook is healthy, and what its codes look like."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
        """Codes int64 [B,N] as the mean patches that they stand for: [B,C,H,W] in [0,1].

        A code that does not occur is drawn as the mean of all patches.
        """
        overall = (self.counts / self.counts.sum()).to(self.patches.dtype) @ self.patches  # [F]
        is_known = (self.counts > 0)[codes]  # [B,N]
        return unpatchify(
            torch.where(is_known[..., None], self.patches[codes], overall), self.stride, grid=grid
        )

    def __str__(self) -> str:
        used, V = int((self.counts > 0).sum()), len(self.counts)
        return (
            f"{used} of {V} codes occur in {int(self.counts.sum()):,} patches, "
            f"perplexity {self.perplexity:.0f}, the most frequent in {self.frequent_share:.1%}"
        )


@torch.no_grad()
def code_use(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> CodeUse:
    """Looks at images; every process gives its own, which may be none, and all get the sum.

    Args:
        tokenizer: in eval mode.
        batches: images float32 [B,C,H,W] in [0,1], on the tokenizer's device.

    Raises:
        ValueError: if no process has images.
    """
    V, (height, width) = tokenizer.vocab_size, tokenizer.stride
    F = height * width * tokenizer.channels
    sums = torch.zeros(V, F + 1, dtype=torch.float64, device=_device(tokenizer))
    for images in batches:
        codes = tokenizer.encode(images).flatten()
        patches = patchify(images, tokenizer.stride).flatten(0, 1)  # [B*N,F]
        counted = torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1).double()
        sums.index_add_(0, codes, counted)
    sums = distributed.sum_over_ranks(sums)
    counts = sums[:, -1]
    if not counts.any():
        raise ValueError("no images were given to look at codes")
    return CodeUse(counts, (sums[:, :-1] / counts.clamp(min=1)[:, None]).float(), tokenizer.stride)


def _device(tokenizer: Tokenizer) -> torch.device:
    """Where it is; the CPU where it has no tensors."""
    if isinstance(tokenizer, nn.Module):
        for tensor in itertools.chain(tokenizer.buffers(), tokenizer.parameters()):
            return tensor.device
    return torch.device("cpu")
