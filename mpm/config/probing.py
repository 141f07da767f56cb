"""Configuration of probes: what frozen features are scored on."""

from typing import Annotated

from pydantic import Field

from mpm.config.data import Interpolation, Source
from mpm.config.section import Count, Section
from mpm.config.training import Run

__all__ = ["ProbeConfig", "ProbeData"]


class ProbeData(Section):
    """Labelled images with the same classes, and the view that a network gets of each."""

    train: Source
    """What probes learn from, and choose their settings on."""
    test: Source
    """What they are scored on."""
    test_crop: Annotated[float, Field(gt=0, le=1)]
    """Side of the centre crop over the resized image's short side."""
    interpolation: Interpolation
    """Of the crop to the view's size."""


class ProbeConfig(Section):
    """Probes of a checkpoint's features."""

    run: Run
    """Where and how; the folder is not written to."""
    data: ProbeData
    """Labelled images."""
    k: Count = 20
    """Neighbours of k-NN, fewer where there are fewer labels (DINO, arXiv:2104.14294)."""
