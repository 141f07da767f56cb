"""What the network sees of an image: random crops with masks, augmented crops, the centre crop for testing.

Every draw comes from a generator of one sample's own, so views do not depend on workers, order or history.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpm.data.augmentations import ColorJitter, RandAugment, ThreeAugment
from mpm.patchify.masks import MaskSampler

CROP_STREAM, MASK_STREAM = 0, 1


def sample_generator(
    seed: int, view: int, index: int, repeat: int, *, stream: int = CROP_STREAM
) -> np.random.Generator:
    """The private generator of one sample; different arguments never share a number of the Philox sequence.

    Args:
        seed: of the run.
        view: the epoch, or the number of a crop that is seen again.
        index: of the image in its source.
        repeat: which of the image's samples within the epoch.
        stream: crops and masks draw from different streams.
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, view, index, repeat]))


def resize(image: Tensor, size: tuple[int, int], *, interpolation: str) -> Tensor:
    """Antialiased resize, in 8 bits for 8-bit images; an image that has the size is returned as it is.

    Args:
        image: [C,H,W] uint8, or float32 in [0, 1].
        size: height, width in pixels.
        interpolation: "bilinear", "bicubic" or "lanczos" (by Pillow).

    Returns:
        [C,h,w], same type; cubic overshoot is clamped.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    if interpolation == "lanczos":
        return _resize_with_pillow(image, size)
    resized = torch.nn.functional.interpolate(
        image[None], size=size, mode=interpolation, antialias=True, align_corners=False
    )[0]
    return resized.clamp_(0, 1) if resized.is_floating_point() else resized


def _resize_with_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    from PIL import Image

    h, w = size
    planes = [Image.fromarray(plane).resize((w, h), Image.Resampling.LANCZOS) for plane in image.numpy()]
    resized = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))
    return resized.clamp_(0, 1) if resized.is_floating_point() else resized


class RandomCrop(NamedTuple):
    """Crops of random area and aspect, as torchvision's RandomResizedCrop draws them.

    Attributes:
        scale: share of the image's area, from and to.
        ratio: width by height, from and to.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """A view into the image: [C,H,W] -> [C,h,w]."""
        H, W = image.shape[-2:]
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = H * W * (self.scale[0] + (self.scale[1] - self.scale[0]) * rng.random())
            ratio = math.exp(log_low + (log_high - log_low) * rng.random())
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= W and 0 < h <= H:
                top, left = int((H - h + 1) * rng.random()), int((W - w + 1) * rng.random())
                return image[:, top : top + h, left : left + w]
        ratio = min(max(W / H, self.ratio[0]), self.ratio[1])  # the largest centre crop of a legal aspect
        w, h = min(W, round(H * ratio)), min(H, round(W / ratio))
        return centre_crop(image, (h, w))


def cover(image: Tensor, size: tuple[int, int], *, interpolation: str) -> Tensor:
    """The smallest resized image of the same proportions that covers a size: [C,H,W] -> [C,>=h,>=w]."""
    (H, W), (h, w) = image.shape[-2:], size
    height_decides = h * W >= w * H
    resized = (h, max(w, int(h * W / H))) if height_decides else (max(h, int(w * H / W)), w)
    return resize(image, resized, interpolation=interpolation)


def centre_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of an image, a view into it: [C,H,W] -> [C,h,w]."""
    top, left = (round((have - want) / 2) for have, want in zip(image.shape[-2:], size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


class PretrainSample(NamedTuple):
    """One image as an objective wants it.

    Attributes:
        image: [C,h,w] uint8 or float32.
        target_image: [C,h2,w2], the same crop at the tokenizer's size; None where the target is the image.
        masked: bool [N], True = masked; None where nothing is masked.
    """

    image: Tensor
    target_image: Tensor | None
    masked: np.ndarray | None


class PretrainView:
    """A random crop, flipped and jittered, with a mask; for a tokenizer the same crop again at its size.

    Args:
        image_size: height, width of the result in pixels.
        mask_sampler: draws the mask; None: whole crops, to train a tokenizer on.
        crop_scale: share of the image's area.
        crop_ratio: width by height of the crop.
        flip: mirror every other image.
        color_jitter: brightness, contrast and saturation change by up to this factor; 1 or 3 channels.
        interpolation: "bilinear", "bicubic" or "lanczos".
        target_size: height, width of the second image; None for none.
        target_interpolation: of the second image.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        mask_sampler: MaskSampler | None,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        color_jitter: float = 0.0,
        interpolation: str = "bicubic",
        target_size: tuple[int, int] | None = None,
        target_interpolation: str = "bicubic",
    ):
        self.image_size = image_size
        self.mask_sampler = mask_sampler
        self._crop = RandomCrop(crop_scale, crop_ratio)
        self._flip = flip
        self._jitter = ColorJitter(color_jitter) if color_jitter else None
        self._interpolation = interpolation
        self._target_size = target_size
        self._target_interpolation = target_interpolation

    def target_only(self) -> "PretrainView":
        """The same crops as the tokenizer gets them, in place of the network's image, without a mask."""
        view = copy.copy(self)
        view.mask_sampler = None
        if self._target_size is not None:
            view.image_size, view._interpolation = self._target_size, self._target_interpolation
            view._target_size = None
        return view

    def __call__(
        self,
        image: Tensor,
        rng: np.random.Generator,
        mask_rng: np.random.Generator,
        *,
        with_target: bool = True,
    ) -> PretrainSample:
        """Views of [C,H,W]; the mask has a generator of its own, so crops can be repeated under new masks.

        `with_target` False leaves out the second view, and changes nothing else.
        """
        crop = self._crop(image, rng)
        views = [resize(crop, self.image_size, interpolation=self._interpolation)]
        if with_target and self._target_size is not None:
            views.append(resize(crop, self._target_size, interpolation=self._target_interpolation))
        if self._flip and rng.random() < 0.5:
            views = [view.flip(-1) for view in views]
        if self._jitter is not None:
            change = self._jitter.draw(len(image), rng)
            views = [change(view) for view in views]
        masked = None if self.mask_sampler is None else self.mask_sampler(mask_rng)
        return PretrainSample(views[0], views[1] if len(views) > 1 else None, masked)


class TrainView:
    """A random crop, flipped and augmented, for training with labels.

    Args:
        image_size: height, width of the result in pixels.
        crop: gives images of that size, as `SimpleCrop`; None: a random crop, resized.
        crop_scale: share of the image's area.
        crop_ratio: width by height of the crop.
        flip: mirror every other image.
        color_jitter: as in `PretrainView`; not together with `rand_augment`.
        rand_augment: timm's policy string, like "rand-m9-mstd0.5-inc1"; for 8 bits and 1 or 3 channels.
        three_augment: grey, solarised or blurred, before the jitter; for the same images.
        interpolation: "bilinear", "bicubic" or "lanczos".
        mean: per channel, in [0,1]: the colour of what `rand_augment` uncovers.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        crop: Callable[[Tensor, np.random.Generator], Tensor] | None = None,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        color_jitter: float = 0.0,
        rand_augment: str | None = None,
        three_augment: bool = False,
        interpolation: str = "bicubic",
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    ):
        if color_jitter and rand_augment:
            raise ValueError("rand_augment changes colours already; set color_jitter to 0")
        self.image_size = image_size
        self._crop = RandomCrop(crop_scale, crop_ratio) if crop is None else crop
        self._flip = flip
        self._three_augment = ThreeAugment() if three_augment else None
        self._jitter = ColorJitter(color_jitter) if color_jitter else None
        self._rand_augment = None
        if rand_augment:
            self._rand_augment = RandAugment(rand_augment, image_size, interpolation=interpolation, mean=mean)
        self._interpolation = interpolation

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """[C,H,W] -> [C,h,w], same type."""
        view = resize(self._crop(image, rng), self.image_size, interpolation=self._interpolation)
        if self._flip and rng.random() < 0.5:
            view = view.flip(-1)
        if self._three_augment is not None:
            view = self._three_augment(view, rng)
        if self._jitter is not None:
            view = self._jitter.draw(len(view), rng)(view)
        return view if self._rand_augment is None else self._rand_augment(view, rng)


class EvalView:
    """The centre of an image, resized so that its short side is `image_size / crop` first.

    Args:
        image_size: height, width of the result in pixels.
        crop: share of the resized side that is kept, in (0, 1].
        interpolation: "bilinear", "bicubic" or "lanczos".
    """

    def __init__(self, image_size: tuple[int, int], *, crop: float = 0.875, interpolation: str = "bicubic"):
        self.image_size = image_size
        self._covered = (math.floor(image_size[0] / crop), math.floor(image_size[1] / crop))
        self.interpolation = interpolation

    def __call__(self, image: Tensor) -> Tensor:
        """[C,H,W] -> [C,h,w], same type."""
        covering = cover(image, self._covered, interpolation=self.interpolation)
        return centre_crop(covering, self.image_size)
