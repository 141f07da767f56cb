"""Configuration of weights that others trained: what `mpm import` writes beside them."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from mpm.config.data import Interpolation, Source
from mpm.config.model import Backbone, Readout
from mpm.config.objective import Predictor
from mpm.config.section import Count, Pair, Section
from mpm.config.training import Run

__all__ = ["ImportedConfig", "ImportedData"]

Numbers = Annotated[tuple[float, ...], Strict(False)]


class ImportedData(Section):
    """The images the network was trained on, as it gets them."""

    image_size: Pair
    """Height and width in pixels."""
    channels: Count
    """Of the images."""
    mean: Numbers
    """Channel means in [0, 1]."""
    std: Numbers
    """Channel standard deviations."""
    interpolation: Interpolation = "bicubic"
    """Of an image to the network's size."""
    test_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the centre crop over the resized image's short side."""
    test: Source | None = None
    """Labelled images to evaluate on, one folder a class; their sorted names are taken for the classes'."""


class ImportedConfig(Section):
    """A network of others, in mpm's form."""

    kind: Literal["imported"] = "imported"
    source: str
    """The file, folder or timm name it came from."""
    family: str
    """Whose names its weights had."""
    run: Run
    """Where and how it is evaluated."""
    data: ImportedData
    """Its images."""
    backbone: Backbone
    """The encoder."""
    readout: Readout | None = None
    """What a classifier reads; null: it is pretrained only."""
    num_classes: Count | None = None
    """Of the classifier."""
    predictor: Predictor | None = None
    """What predicts hidden patches, where the weights have it."""
