"""Teachers: frozen networks and plain features, called with images float32 [B,C,H,W] in [0,1].

That of a tokenizer has `dim`, the width F of its features, and gives float32 [B,N,F], one vector for each
patch of the wanted grid, row-major. That of a classifier gives logits float32 [B,L].
"""

import contextlib
import math
from typing import Any, Protocol, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.backbone import Backbone
from mpm.backbones.classifier import Classifier
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.objectives.hog import HOGTarget
from mpm.patchify.patches import patchify
from mpm.patchify.pixels import Normalize, moments_of

__all__ = [
    "ClassTeacher",
    "HOGTeacher",
    "NetworkTeacher",
    "PixelTeacher",
    "Teacher",
    "own_size",
    "published_normalize",
    "takes_any_grid",
]


class Teacher(Protocol):
    """What a tokenizer learns to tell of each patch.

    Attributes:
        dim: width F of a patch's features.
    """

    dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Images float32 [B,C,H,W] in [0,1] -> float32 [B,N,F]."""
        ...


class PixelTeacher(nn.Module):
    """The pixels of each patch, by the patch's own mean and deviation.

    Args:
        patch_size: height and width of a patch in pixels.
        channels: of the images.
    """

    epsilon = 1e-6  # of the variance, as MAE's

    def __init__(self, patch_size: tuple[int, int], *, channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.dim = patch_size[0] * patch_size[1] * channels

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> float32 [B,N,P*P*C]."""
        patches = patchify(images.float(), self.patch_size)
        centred = patches - patches.mean(-1, keepdim=True)
        return centred / (patches.var(-1, keepdim=True) + self.epsilon).sqrt()


class HOGTeacher(nn.Module):
    """Histograms of oriented gradients of each patch, see `HOGTarget`.

    Args:
        patch_size: height and width of a patch in pixels.
        channels: of the images.
        cells: histograms per side of a patch.

    Raises:
        ValueError: if the cells do not fit the patch.
    """

    def __init__(self, patch_size: tuple[int, int], *, channels: int, cells: int = 2):
        super().__init__()
        self._target = HOGTarget(patch_size, channels=channels, cells=cells)
        self.dim = self._target.out_dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> float32 [B,N,C*bins*cells*cells]."""
        return self._target.features(images.float())


class NetworkTeacher(nn.Module):
    """Patch tokens, or the feature map, of a frozen network, on the wanted grid.

    A vision transformer gets images of grid x patch pixels, so that its patches are the wanted ones, and its
    prefix tokens are left out. Of a network whose grid cannot be chosen (a convolutional one, or one with
    positions for one size only) the features are resized, bilinearly.

    Args:
        network: a `Backbone`, or a model of timm. It is frozen; positions of timm's are resampled in place.
        grid: patches per side (rows, columns).
        normalize: of the network.
        norm: of a `Backbone`'s last tokens; None: they stay as the last block leaves them.
            A model of timm that norms only what it has pooled (`fc_norm`) gets that norm on its patches.
        dtype: of the network's matrix products, float32, or bfloat16 by autocast.

    Attributes:
        channels: of the images that the network gets; grey ones are repeated.
        image_size: height and width in pixels that the network gets; None: those of the images.

    Raises:
        ValueError: if a backbone has another grid.
    """

    def __init__(
        self,
        network: Any,
        *,
        grid: tuple[int, int],
        normalize: Normalize,
        norm: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.dim: int = network.dim if isinstance(network, Backbone) else network.num_features
        self.channels = len(normalize.mean)
        self.grid = grid
        self.dtype = dtype
        self._is_fitted = takes_any_grid(network)
        self.image_size = _fit(network, grid) if self._is_fitted else own_size(network)
        self.network: Any = network
        self.normalize = normalize  # grey images become as many channels as it has
        self.norm = _norm_of(network, norm)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """A teacher stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> float32 [B,N,F]."""
        if self.image_size not in (None, images.shape[2:]):
            images = F.interpolate(
                images, self.image_size, mode="bicubic", align_corners=False, antialias=True
            ).clamp(0, 1)
        with _precision(self.dtype, images.device):
            features = self._features(self.normalize(images)).float()
        if features.ndim == 3:  # [B,n,F], of the wanted patches or of the network's own
            if self._is_fitted:
                return features
            rows = _rows(features.shape[1], images.shape[2:])
            features = rearrange(features, "b (h w) f -> b f h w", h=rows)
        if features.shape[2:] != self.grid:
            features = F.interpolate(features, self.grid, mode="bilinear", align_corners=False)
        return rearrange(features, "b f h w -> b (h w) f")

    def _features(self, images: Tensor) -> Tensor:
        """Tokens [B,n,F] or a map [B,F,h,w]."""
        network = self.network
        if isinstance(network, Backbone):
            return self.norm(network(images).patches)
        features = network.forward_features(images)
        if features.ndim == 3:
            return self.norm(features[:, getattr(network, "num_prefix_tokens", 0) :])
        channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        return rearrange(features, "b h w f -> b f h w") if channels_last else features


class ClassTeacher:
    """Logits of a frozen classifier, with its own normalisation and at its own resolution.

    It is no module, so that it is never in the objective: not saved, averaged or trained.

    Args:
        network: with `predict`, normalised images to logits [B,L]. It is frozen.
        normalize: of the network; grey images become as many channels as it has.
        image_size: height and width in pixels that the network gets; None: those of the images.
        interpolation: to that size, "bilinear" or "bicubic". Nothing is clamped: erased pixels are outside
            [0,1] already.
        dtype: of the network's matrix products, float32, or bfloat16 by autocast.
    """

    def __init__(
        self,
        network: Classifier | TimmClassifier,
        *,
        normalize: Normalize,
        image_size: tuple[int, int] | None = None,
        interpolation: str = "bicubic",
        dtype: torch.dtype = torch.float32,
    ):
        self.network = network.requires_grad_(False).eval()
        self.normalize = normalize
        self.image_size = image_size
        self.interpolation = interpolation
        self.dtype = dtype

    def to(self, device: torch.device) -> Self:
        """The same, moved."""
        self.network.to(device)
        self.normalize.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [0,1] -> logits float32 [B,L]."""
        if self.image_size not in (None, images.shape[2:]):
            images = F.interpolate(
                images, self.image_size, mode=self.interpolation, align_corners=False, antialias=True
            )
        with _precision(self.dtype, images.device):
            return self.network.predict(self.normalize(images)).float()


def _precision(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _rows(tokens: int, image_size: torch.Size) -> int:
    """Rows of the grid of all tokens of an image, whose patches are square."""
    rows = round(math.sqrt(tokens * image_size[0] / image_size[1]))
    assert tokens % rows == 0, f"{tokens} tokens are no grid of an image of {list(image_size)}"
    return rows


def published_normalize(network: Any) -> Normalize:
    """Of a model of timm, as it was trained, for the channels that it was made for."""
    published: dict[str, Any] = network.pretrained_cfg
    return Normalize(*moments_of(published["mean"], published["std"], channels=published["input_size"][0]))


def takes_any_grid(network: Any) -> bool:
    """Whether it is a vision transformer whose grid can be chosen."""
    needed = ("set_input_size", "num_prefix_tokens", "patch_embed")  # of timm's; Swin has no prefix tokens
    return isinstance(network, Backbone) or all(hasattr(network, name) for name in needed)


def _fit(network: Any, grid: tuple[int, int]) -> tuple[int, int]:
    """Sets a transformer to a grid; gives height and width in pixels of its images.

    Raises:
        ValueError: if a backbone has another grid.
    """
    patch_size = (network.stem if isinstance(network, Backbone) else network.patch_embed).patch_size
    size = grid[0] * patch_size[0], grid[1] * patch_size[1]
    if not isinstance(network, Backbone):
        network.set_input_size(img_size=size)
    elif network.grid != grid:
        raise ValueError(
            f"the teacher's grid is {_times(network.grid)}, where {_times(grid)} is wanted; build it for "
            f"images of {_times(size)} and adapt its weights"
        )
    return size


def own_size(network: Any) -> tuple[int, int] | None:
    """Height and width in pixels of the only images that a model of timm takes; None: it takes any."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    published: dict[str, Any] = getattr(network, "pretrained_cfg", {})
    if size is None and published.get("fixed_input_size"):
        size = published["input_size"][1:]
    return None if size is None else (size[0], size[1])


def _norm_of(network: Any, norm: nn.Module | None) -> nn.Module:
    """What norms the last tokens, where the network does not do it itself."""
    if not isinstance(network, Backbone) and isinstance(getattr(network, "norm", None), nn.Identity):
        norm = getattr(network, "fc_norm", None)
    return norm or nn.Identity()


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
