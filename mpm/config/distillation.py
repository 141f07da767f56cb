"""Configuration of distillation: what a classifier learns of a teacher."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpm.config.section import Count, Location, Pair, Positive, Section

__all__ = [
    "CheckpointTeacher",
    "ClassTeacher",
    "Distillation",
    "HardDistillation",
    "SoftDistillation",
    "TimmTeacher",
]

Share = Annotated[float, Field(gt=0, le=1)]


class TimmTeacher(Section):
    """A classifier of timm, with its own normalisation."""

    kind: Literal["timm"]
    model: str = "regnety_160.deit_in1k"
    """Its name, as `timm.create_model` takes it; DeiT's RegNetY-16GF."""
    weights: Location | None = None
    """A local file of its weights, with as many classes as the data; null: the published ones."""
    random: bool = False
    """Random weights, drawn with the run's seed, in place of trained ones."""
    image_size: Pair | None = None
    """Side, or height and width, in pixels of the images it gets; null: those of the student."""

    @model_validator(mode="after")
    def _check(self) -> "TimmTeacher":
        if self.random and self.weights is not None:
            raise ValueError(f"random weights and weights {self.weights} are asked for; leave one out")
        return self


class CheckpointTeacher(Section):
    """A classifier that fine-tuning left, or that others published, with its own normalisation."""

    kind: Literal["checkpoint"]
    checkpoint: str
    """A run of fine-tuning or a step in it, a folder of `mpm import`, or a file of published weights."""
    image_size: Pair | None = None
    """Side, or height and width, in pixels of the images it gets; null: those of the student."""


ClassTeacher = Annotated[TimmTeacher | CheckpointTeacher, Field(discriminator="kind")]


class _Distillation(Section):
    through: Literal["token", "class"] = "token"
    """Token: the class head learns labels, the distillation head the teacher. Class: a head learns both."""
    teacher: ClassTeacher
    """Frozen; it sees the student's images, augmented and mixed as they are."""
    crops: Count | None = None
    """Crops of an image, drawn once and shown in turn, epoch after epoch; null: a new one each epoch."""
    cache: Location | None = None
    """File of what the teacher says of all crops, filled by `mpm teach`; null: it is asked in each step."""

    @model_validator(mode="after")
    def _check_cache(self) -> "_Distillation":
        if self.cache is not None and self.crops is None:
            raise ValueError(
                "cache holds the answers to a given number of crops, but crops is null; give it, such as 10"
            )
        return self


class HardDistillation(_Distillation):
    """Cross entropy with the teacher's class, which is not smoothed (DeiT, arXiv:2012.12877)."""

    kind: Literal["hard"]
    weight: Share = 0.5
    """Of the teacher's part of the loss; the labels' is the rest."""


class SoftDistillation(_Distillation):
    """Divergence from the teacher's probabilities, at a temperature (arXiv:1503.02531)."""

    kind: Literal["soft"]
    weight: Share = 0.1
    """Of the teacher's part of the loss, lambda; the labels' is the rest."""
    temperature: Positive = 3.0
    """That both logits are divided by, tau; the divergence counts tau squared times."""
    reduction: Literal["batch_mean", "all_elements"] = "batch_mean"
    """Divergence over the images (the paper), or over images times classes (its released code)."""


Distillation = Annotated[HardDistillation | SoftDistillation, Field(discriminator="kind")]
