"""Configuration of classifiers that are not made of a backbone and a readout."""

from typing import Literal

from mpm.config.section import Section

__all__ = ["TimmNetwork"]


class TimmNetwork(Section):
    """A whole classifier of timm, in place of backbone and readout: a convolutional teacher, say."""

    kind: Literal["timm"] = "timm"
    model: str
    """Its name, as `timm.create_model` takes it."""
    pretrained: bool = False
    """Start from timm's weights, all but those of the head; false: from scratch."""
