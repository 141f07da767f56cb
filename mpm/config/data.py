"""Configuration of the data: where images come from and how they are cropped, changed and normalised."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator

from mpm.config.section import (
    Count,
    Fraction,
    Location,
    NotNegative,
    Pair,
    Positive,
    Probability,
    Range,
    Section,
    Seed,
)

__all__ = [
    "FinetuneData",
    "FolderData",
    "FolderSource",
    "HeldOut",
    "INaturalistSource",
    "PretrainData",
    "PretrainView",
    "Source",
    "Statistics",
    "SyntheticData",
    "SyntheticSource",
    "TorchvisionData",
    "TorchvisionSource",
]

Byte = Annotated[int, Field(ge=0, le=255)]
Interpolation = Literal["bicubic", "bilinear"]
Statistics = Literal["imagenet", "inception", "measured"] | Annotated[tuple[float, ...], Strict(False)]


class FolderSource(Section):
    """Any tree of images; where labels are wanted, one folder a class."""

    kind: Literal["folder"] = "folder"
    root: Location
    """Folder of the images."""
    index: Location | None = None
    """File that lists them, built once; null: next to the images, or in the cache where that is read-only."""
    background: Annotated[tuple[Byte, Byte, Byte], Strict(False)] = (255, 255, 255)
    """Red, green and blue under transparent pixels, 0 to 255."""
    max_value: Positive | None = None
    """White level of images deeper than 8 bits; null: the largest value of their type."""


class TorchvisionSource(Section):
    """A dataset of torchvision by name."""

    kind: Literal["torchvision"] = "torchvision"
    name: Literal[
        "FashionMNIST",
        "MNIST",
        "CIFAR10",
        "CIFAR100",
        "Flowers102",
        "StanfordCars",
        "INaturalist",
        "ImageNet",
        "Places365",
        "EuroSAT",
    ]
    """Its class in torchvision.datasets."""
    root: Location = Field(default="data", validate_default=True)
    """Folder that holds the downloaded files."""
    split: Literal["train", "val", "trainval", "test"] = "train"
    """Part of the set; trainval: both (Flowers102)."""
    download: bool = False
    """Fetch the files where they are missing."""


class INaturalistSource(Section):
    """iNaturalist 2018 or 2019, as the competitions give it: images, and files of annotations."""

    kind: Literal["inaturalist"] = "inaturalist"
    root: Location
    """Folder that the annotations' file names start from."""
    annotations: Location
    """JSON file, such as train2018.json; in root, unless absolute."""


class SyntheticSource(Section):
    """Generated textures whose class can be learned, for debugging."""

    kind: Literal["synthetic"] = "synthetic"
    count: Count = 256
    """Images."""
    classes: Count = 4
    """Classes."""
    seed: Seed = 0
    """Of the generator; another seed gives other images of the same classes."""


class HeldOut(Section):
    """A share of the training images, held out: no image is in both parts."""

    kind: Literal["fraction"] = "fraction"
    fraction: Fraction
    """Share of the training images, drawn with the seed of the run."""


Source = Annotated[
    FolderSource | TorchvisionSource | INaturalistSource | SyntheticSource, Field(discriminator="kind")
]


def _held_out(value: Any) -> Any:
    return {"kind": "fraction", **value} if isinstance(value, dict) and "fraction" in value else value


Validation = Annotated[
    Annotated[
        FolderSource | TorchvisionSource | INaturalistSource | SyntheticSource | HeldOut,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_held_out),
]


class PretrainView(Section):
    """How an unlabelled image becomes a training view."""

    image_size: Pair
    """Side, or height and width, of a view in pixels."""
    channels: Count = 3
    """Of the images given to the network; grey and colour are converted into each other, nothing else is."""
    mean: Statistics | None = None
    """Channel means in [0, 1]: by name, as a list, or measured; null: init's, from scratch ImageNet's."""
    std: Statistics | None = None
    """Channel standard deviations, likewise."""
    crop_scale: Range = (0.2, 1.0)
    """Area of the random crop as a share of the image, smallest and largest (MAE; BEiT: [0.08, 1])."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the crop, smallest and largest."""
    flip: bool = True
    """Mirror half of the views."""
    color_jitter: NotNegative = 0.0
    """Strength of random brightness, contrast and saturation (BEiT: 0.4)."""
    interpolation: Interpolation = "bicubic"
    """Of the crop to the view's size."""

    @model_validator(mode="after")
    def _check(self) -> "PretrainView":
        _check_crop_scale(self.crop_scale)
        _check_statistics(self.channels, self.mean, self.std)
        return self


class FolderData(PretrainView, FolderSource):
    """Unlabelled images of a folder, and their view."""


class TorchvisionData(PretrainView, TorchvisionSource):
    """Images of a torchvision dataset without their labels, and their view."""


class SyntheticData(PretrainView, SyntheticSource):
    """Generated images and their view."""


PretrainData = Annotated[FolderData | TorchvisionData | SyntheticData, Field(discriminator="kind")]


_CROP_SCALE, _CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


class FinetuneData(Section):
    """Labelled images, and how they become training and evaluation views."""

    image_size: Pair | None = None
    """Side, or height and width, of a view in pixels; null: the checkpoint's."""
    channels: Count | None = None
    """Of the images given to the network; null: the checkpoint's, 3 from scratch."""
    mean: Statistics | None = None
    """Channel means in [0, 1]; null: the checkpoint's, from scratch ImageNet's."""
    std: Statistics | None = None
    """Channel standard deviations, likewise."""
    train: Source
    """Labelled images to learn from."""
    val: Validation | None = None
    """What chooses the best checkpoint: a source, or {fraction: 0.1} of the training images."""
    test: Source | None = None
    """Looked at once, with the chosen checkpoint."""
    crop: Literal["resized", "simple"] = "resized"
    """Of random area and aspect; or of the resized image, padded by 4 pixels (DeiT III on ImageNet-21k)."""
    crop_scale: Range = _CROP_SCALE
    """Area of the random crop as a share of the image, smallest and largest."""
    crop_ratio: Range = _CROP_RATIO
    """Width over height of the crop, smallest and largest."""
    flip: bool = True
    """Mirror half of the views."""
    color_jitter: NotNegative = 0.0
    """Strength of random brightness, contrast and saturation."""
    rand_augment: str | None = None
    """RandAugment in timm's words, such as rand-m9-mstd0.5-inc1."""
    three_augment: bool = False
    """One of grey, solarised and blurred for each view (3-Augment, DeiT III); before color_jitter."""
    erasing: Probability = 0.0
    """Probability that a random rectangle of the view is erased."""
    interpolation: Interpolation = "bicubic"
    """Of the crop to the view's size."""
    test_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the centre crop over the resized image's short side, at evaluation (224 of 256)."""
    repeats: Count = 1
    """Views of an image in an epoch's batches (repeated augmentation; DeiT: 3)."""

    @model_validator(mode="after")
    def _check(self) -> "FinetuneData":
        _check_crop_scale(self.crop_scale)
        _check_statistics(self.channels, self.mean, self.std)
        self._check_crop()
        if self.three_augment and self.channels not in (None, 1, 3):
            raise ValueError(
                f"three_augment needs 1 or 3 channels, not {self.channels}; set three_augment to false"
            )
        if self.rand_augment is not None:
            if not self.rand_augment.startswith("rand"):
                raise ValueError(
                    f'rand_augment "{self.rand_augment}" does not begin with rand; use rand-m9-mstd0.5-inc1'
                )
            if self.channels not in (None, 1, 3):
                raise ValueError(
                    f"rand_augment needs 1 or 3 channels, not {self.channels}; set rand_augment to null"
                )
            if self.color_jitter:
                raise ValueError(
                    f"rand_augment replaces color_jitter {self.color_jitter:g}; set color_jitter to 0, "
                    "or rand_augment to null"
                )
            if self.three_augment:
                raise ValueError(
                    "rand_augment and three_augment take each other's place; "
                    "set rand_augment to null, or three_augment to false"
                )
        return self

    def _check_crop(self) -> None:
        if self.crop == "simple":
            for key, default in (("crop_scale", _CROP_SCALE), ("crop_ratio", _CROP_RATIO)):
                if (value := getattr(self, key)) != default:
                    raise ValueError(f"crop simple has no {key}; leave out {list(value)}")


def _check_crop_scale(scale: tuple[float, float]) -> None:
    if scale[1] > 1:
        raise ValueError(f"crop_scale {list(scale)} is a share of the image's area; use at most 1")


def _check_statistics(channels: int | None, mean: Statistics | None, std: Statistics | None) -> None:
    for key, value in (("mean", mean), ("std", std)):
        if value in ("imagenet", "inception") and channels not in (None, 3):
            raise ValueError(
                f"{key} {value} is for 3 channels, not {channels}; use measured, or a list of {channels}"
            )
        if isinstance(value, tuple):
            if channels is not None and len(value) != channels:
                raise ValueError(f"{key} has {len(value)} numbers for {channels} channels; give {channels}")
            if key == "std" and min(value, default=0) <= 0:
                raise ValueError(f"std {list(value)} must be greater than 0 everywhere")
