"""Changes of colour and shape beyond crop and flip: torchvision's and timm's operations on private draws."""

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor


class ColorJitter:
    """Brightness, contrast and saturation in random order, each by a factor in [max(0, 1 - s), 1 + s].

    Args:
        strength: s. Grey images have no saturation.
    """

    def __init__(self, strength: float):
        from torchvision.transforms.v2 import functional  # here, before workers fork: it takes a second

        self._range = (max(0.0, 1 - strength), 1 + strength)
        self._changes: dict[int, list[Callable[[Tensor, float], Tensor]]] = {
            1: [functional.adjust_brightness, functional.adjust_contrast],
            3: [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation],
        }

    def draw(self, channels: int, rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
        """One change of [C,h,w], to be applied to every view of a sample.

        Raises:
            ValueError: if there are neither 1 nor 3 channels.
        """
        if channels not in self._changes:
            raise ValueError(
                f"color_jitter works on 1 or 3 channels, the images have {channels}; set color_jitter: 0"
            )
        changes = self._changes[channels]
        steps = [(changes[number], rng.uniform(*self._range)) for number in rng.permutation(len(changes))]

        def apply(image: Tensor) -> Tensor:
            for change, factor in steps:
                image = change(image, factor)
            return image

        return apply


class RandAugment:
    """timm's RandAugment (arXiv:1909.13719) on tensors, drawn from a private generator.

    Args:
        policy: timm's words for it, like "rand-m9-mstd0.5-inc1".
        image_size: height, width in pixels; shifts are limited to 0.45 of the shorter side, as in timm.
        interpolation: of rotations, shears and shifts: "bilinear", "bicubic" or "lanczos".
        mean: per channel, in [0,1]: the colour of uncovered pixels.
    """

    def __init__(
        self, policy: str, image_size: tuple[int, int], *, interpolation: str, mean: tuple[float, ...]
    ):
        from timm.data.auto_augment import rand_augment_transform
        from timm.data.transforms import str_to_pil_interp

        self._channels = len(mean)
        self._transform = rand_augment_transform(
            policy,
            {
                "translate_const": int(0.45 * min(image_size)),
                "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
                "interpolation": str_to_pil_interp(interpolation),
            },
        )
        for operation in self._transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """[C,h,w] -> [C,h,w], uint8.

        Raises:
            ValueError: if the image is deeper than 8 bits, has neither 1 nor 3 channels, or not the mean's.
        """
        channels = len(image)
        if channels not in (1, 3) or channels != self._channels or image.dtype != torch.uint8:
            raise ValueError(
                f"rand_augment works on 8-bit images of 1 or 3 channels, got {image.dtype} with {channels}; "
                "set rand_augment: null"
            )
        seed = int(rng.integers(2**32))
        # timm draws from the global generators of Python and numpy.
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            augmented = self._transform(_as_pillow(image))
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
        return _as_tensor(augmented)


class ThreeAugment:
    """One of three changes for each image: grey, solarised, or blurred (3-Augment, arXiv:2204.07118).

    As released: luma of ITU-R 601, inversion from 128 on, Pillow's Gaussian blur with a radius in [0.1, 2].
    """

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """[C,h,w] -> [C,h,w], uint8.

        Raises:
            ValueError: if the image is deeper than 8 bits, or has neither 1 nor 3 channels.
        """
        if len(image) not in (1, 3) or image.dtype != torch.uint8:
            raise ValueError(
                f"three_augment works on 8-bit images of 1 or 3 channels, got {image.dtype} with "
                f"{len(image)}; set three_augment: false"
            )
        match int(rng.integers(3)):
            case 0:
                pixels = np.asarray(_as_pillow(image).convert("L"))
                return torch.from_numpy(pixels.copy()).expand(len(image), -1, -1)
            case 1:
                return torch.where(image < 128, image, 255 - image)
            case _:
                blurred = _as_pillow(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
                return _as_tensor(blurred)


def _as_pillow(image: Tensor) -> Image.Image:
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def _as_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keeps at least one bit: timm may ask for none, which was black and is an error since Pillow 13."""
    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))
