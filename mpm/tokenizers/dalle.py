"""The encoder of DALL-E's tokenizer, which BEiT's published networks predict the codes of."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DalleEncoder"]

_MARGIN = 0.1  # its pixels lie in [0.1, 0.9]


class DalleEncoder(nn.Module):
    """Images to the codes of DALL-E's discrete autoencoder (arXiv:2102.12092, App. A.1).

    A convolution 7x7, four groups of residual blocks with max-pools between them, and a 1x1 convolution to a
    logit for each code. The defaults are the published sizes, 53,786,240 parameters; names and shapes of the
    state are those of the published `encoder.pkl`. There is no decoder.

    Differs from the reference: computed in the precision of autocast, where the published one takes float16
    on a GPU for all but the logits.

    Args:
        num_codes: V.
        hidden: channels of the first group; each next one has twice as many.
        blocks: of each group.
        channels: of the images.

    Attributes:
        vocab_size: V.
        stride: 8 pixels a side.
        channels: of the images.
        grid: None, any number of codes per side.
        interpolation: of crops to its size, as in BEiT.
    """

    def __init__(self, num_codes: int = 8192, *, hidden: int = 256, blocks: int = 2, channels: int = 3):
        super().__init__()
        self.vocab_size = num_codes
        self.stride = (8, 8)
        self.channels = channels
        self.grid: tuple[int, int] | None = None
        self.interpolation = "lanczos"
        groups = 4
        widths = [hidden * 2**group for group in range(groups)]
        parts: dict[str, nn.Module] = {"input": _Convolution(channels, hidden, 7)}
        before = hidden
        for number, width in enumerate(widths, start=1):
            group: dict[str, nn.Module] = {}
            for block in range(1, blocks + 1):
                group[f"block_{block}"] = _Block(before, width, gain=1 / (groups * blocks) ** 2)
                before = width
            if number < groups:
                group["pool"] = nn.MaxPool2d(2)
            parts[f"group_{number}"] = nn.Sequential(OrderedDict(group))
        output = {"relu": nn.ReLU(), "conv": _Convolution(before, num_codes, 1)}
        parts["output"] = nn.Sequential(OrderedDict(output))
        self.blocks = nn.Sequential(OrderedDict(parts))

    def logits(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> [B,V,h,w], in the precision of autocast."""
        logits: Tensor = self.blocks((1 - 2 * _MARGIN) * images + _MARGIN)
        return logits

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> the likeliest codes int64 [B,N], row-major."""
        return self.logits(images).argmax(1).flatten(1)

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> None:
        """There is no decoder."""


class _Block(nn.Module):
    def __init__(self, before: int, after: int, *, gain: float):
        super().__init__()
        self._gain = gain
        inner = after // 4
        self.id_path = nn.Identity() if before == after else _Convolution(before, after, 1)
        path = {
            "relu_1": nn.ReLU(),
            "conv_1": _Convolution(before, inner, 3),
            "relu_2": nn.ReLU(),
            "conv_2": _Convolution(inner, inner, 3),
            "relu_3": nn.ReLU(),
            "conv_3": _Convolution(inner, inner, 3),
            "relu_4": nn.ReLU(),
            "conv_4": _Convolution(inner, after, 1),
        }
        self.res_path = nn.Sequential(OrderedDict(path))

    def forward(self, images: Tensor) -> Tensor:
        """[B,K,h,w] -> [B,K',h,w]."""
        kept: Tensor = self.id_path(images)
        return kept + self._gain * self.res_path(images)


class _Convolution(nn.Module):
    """A convolution with an odd kernel that keeps the size."""

    def __init__(self, before: int, after: int, kernel: int):
        super().__init__()
        self.w = nn.Parameter(torch.empty(after, before, kernel, kernel))
        self.b = nn.Parameter(torch.empty(after))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published start values: normal 1 / sqrt(fan in), and 0."""
        nn.init.normal_(self.w, std=1 / math.sqrt(self.w[0].numel()))
        nn.init.zeros_(self.b)

    def forward(self, images: Tensor) -> Tensor:
        """[B,K,h,w] -> [B,K',h,w]."""
        return F.conv2d(images, self.w, self.b, padding="same")
