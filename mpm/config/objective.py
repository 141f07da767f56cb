"""Configuration of what is learned from masked images: predictor, target and loss."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mpm.config.section import Count, Fraction, Location, Positive, Probability, Section, check_multiple

__all__ = [
    "ClassPretrainingPredictor",
    "CodeTarget",
    "DecoderPredictor",
    "HOGTarget",
    "LatentTarget",
    "LinearPredictor",
    "MaskedObjective",
    "Objective",
    "PixelTarget",
    "Predictor",
    "Target",
]


class LinearPredictor(Section):
    """One linear map of the trunk's masked tokens (SimMIM, BEiT); mask tokens enter the trunk."""

    kind: Literal["linear"] = "linear"


class DecoderPredictor(Section):
    """A small transformer (MAE); only visible patches enter the trunk."""

    kind: Literal["decoder"] = "decoder"
    dim: Count = 512
    """Width."""
    depth: Count = 8
    """Blocks."""
    heads: Count = 16
    """Attention heads of a block."""

    @model_validator(mode="after")
    def _check(self) -> "DecoderPredictor":
        check_multiple("dim", self.dim, 4, of="4, which sincos positions need")
        check_multiple("dim", self.dim, self.heads, of=f"heads {self.heads}")
        return self


class ClassPretrainingPredictor(Section):
    """One linear map, after the trunk and after extra blocks on class token and early patches (BEiT v2).

    The extra blocks make the class token say what the image holds; they are thrown away after pretraining.
    """

    kind: Literal["class_pretraining"]
    early_layer: Count
    """Block whose patch tokens the extra blocks get, counted from 1 (BEiT v2: 9 of 12, 21 of 24)."""
    depth: Count = 2
    """Extra blocks."""


Predictor = Annotated[
    LinearPredictor | DecoderPredictor | ClassPretrainingPredictor, Field(discriminator="kind")
]


class PixelTarget(Section):
    """The pixels of a patch."""

    kind: Literal["pixels"]
    normalize_patches: bool = False
    """By each patch's own mean and deviation (MAE's better target)."""


class CodeTarget(Section):
    """A tokenizer's code (BEiT)."""

    kind: Literal["codes"]
    tokenizer: str
    """A run of configs/tokenizers or a step in it, or a published file (DALL-E, DALLE-pytorch, BEiT v2)."""
    min_live: Probability = 0.2
    """Smallest share of the codes that the images must use; below it, the run does not start."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the tokenizer's matrix products; auto: bf16 where optim.dtype is and 99 % of the codes agree."""
    crops: Count | None = None
    """Crops of an image, drawn once and shown in turn, epoch after epoch; null: a new one each epoch."""
    cache: Location | None = None
    """File of the codes of all crops, filled by `mpm tokenize`; null: codes are computed in each step."""

    @model_validator(mode="after")
    def _check(self) -> "CodeTarget":
        if self.cache is not None and self.crops is None:
            raise ValueError(
                "cache holds the codes of a given number of crops, but crops is null; give it, such as 10"
            )
        return self


class HOGTarget(Section):
    """Histograms of oriented gradients (MaskFeat, arXiv:2112.09133)."""

    kind: Literal["hog"]
    bins: Count = 9
    """Orientations over half a turn."""
    cells: Count = 2
    """Histograms per side of a patch."""


class LatentTarget(Section):
    """What a moving average of the network makes of the patches (iBOT, arXiv:2111.07832)."""

    kind: Literal["latent"]
    prototypes: Count = 1024
    """Directions that tokens are compared with (iBOT: 8192)."""
    momentum: Fraction = 0.996
    """Share of the average kept at the first step; it rises to 1. Short runs want 0.99."""
    teacher_temperature: Positive = 0.04
    """Of the targets."""
    student_temperature: Positive = 0.1
    """Of the predictions."""


Target = Annotated[PixelTarget | CodeTarget | HOGTarget | LatentTarget, Field(discriminator="kind")]


class MaskedObjective(Section):
    """Predict what is hidden."""

    kind: Literal["masked"]
    predictor: Predictor
    """Encoder output to predictions."""
    target: Target
    """What is predicted."""
    loss: Literal["l1", "l2", "smooth_l1", "cross_entropy"] | None = None
    """Of a patch (MAE, MaskFeat: l2, SimMIM: l1); null: cross_entropy for codes, latent's own, else l2."""

    @model_validator(mode="after")
    def _check(self) -> "MaskedObjective":
        regression = ("l1", "l2", "smooth_l1")
        legal = {"codes": ("cross_entropy",), "latent": ()}.get(self.target.kind, regression)
        if self.loss is not None and self.loss not in legal:
            use = " or ".join(legal) or "null"
            raise ValueError(f"loss {self.loss} is not for target.kind {self.target.kind}; use {use}")
        return self

    def in_full(self) -> "MaskedObjective":
        """With the loss stated."""
        usual: Any = {"codes": "cross_entropy", "latent": None}.get(self.target.kind, "l2")
        return self.model_copy(update={"loss": self.loss or usual})


Objective = MaskedObjective
