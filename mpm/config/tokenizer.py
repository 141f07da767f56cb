"""Configuration of tokenizers: what is trained to turn patches into codes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpm.config.section import Count, Fraction, NotNegative, Pair, Positive, Section

__all__ = [
    "TOKENIZER_KINDS",
    "Anneal",
    "DVAEObjective",
    "FeatureInput",
    "HOGTeacher",
    "KMeansObjective",
    "NetworkTeacher",
    "PatchInput",
    "PixelTeacher",
    "Teacher",
    "TokenizerObjective",
    "VQKDObjective",
]


class PatchInput(Section):
    """The pixels of a patch."""

    kind: Literal["pixels"] = "pixels"
    patch_size: Pair
    """Side, or height and width, in pixels."""
    normalize_patches: bool = True
    """By each patch's own mean and deviation, so that codes tell shapes rather than brightness."""


class FeatureInput(Section):
    """Patch tokens of a frozen network."""

    kind: Literal["features"]
    network: str
    """An mpm run or a step in it, a folder of `mpm import`, a file of published weights, or timm:NAME."""
    layer: Count | None = None
    """Block whose output is taken, counted from 1; null: the last, normalised."""


class KMeansObjective(Section):
    """The nearest of V centroids (mini-batch k-means); no gradient, minutes on a CPU."""

    kind: Literal["kmeans"]
    codes: Annotated[int, Field(ge=2, le=65536)] | None = None
    """Number of codes V; null: by the size of the data."""
    input: Annotated[PatchInput | FeatureInput, Field(discriminator="kind")]
    """What is clustered."""


class Anneal(Section):
    """A value that moves from start to end, a half cosine, and stays there."""

    start: NotNegative
    """Value at the first step."""
    end: NotNegative
    """Value from then on."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run after which the end is reached."""


class DVAEObjective(Section):
    """A discrete variational autoencoder (Gumbel-softmax), as BEiT's tokenizers."""

    kind: Literal["dvae"]
    codes: Annotated[int, Field(ge=2, le=65536)] | None = None
    """Number of codes V; null: by the size of the data."""
    code_dim: Count = 512
    """Width of a code's vector."""
    hidden: Count = 256
    """Channels of the convolutions."""
    layers: Annotated[int, Field(ge=1, le=6)] = 3
    """Convolutions of stride 2: a code stands for 2^layers pixels a side."""
    blocks: Annotated[int, Field(ge=0)] = 1
    """Residual blocks after each convolution of encoder and decoder."""
    loss: Literal["l2", "smooth_l1"] = "l2"
    """Of the reconstruction."""
    temperature: Anneal = Anneal(start=1.0, end=0.0625, share=0.5)
    """Of the Gumbel-softmax."""
    kl_weight: Anneal = Anneal(start=0.0, end=0.0)
    """Of the divergence of the codes from equal use."""
    straight_through: bool = False
    """One-hot samples forward, soft ones backward."""

    @model_validator(mode="after")
    def _check(self) -> "DVAEObjective":
        if not (self.temperature.start and self.temperature.end):
            raise ValueError("temperature 0 divides by nothing; give more, such as 0.0625")
        return self


class NetworkTeacher(Section):
    """Patch tokens of a frozen network."""

    kind: Literal["network"]
    checkpoint: str
    """An mpm run or a step in it, a folder of `mpm import`, a file of published weights, or timm:NAME."""


class PixelTeacher(Section):
    """The patches themselves, each by its own mean and deviation."""

    kind: Literal["pixels"]


class HOGTeacher(Section):
    """Histograms of oriented gradients."""

    kind: Literal["hog"]
    cells: Count = 2
    """Histograms per side of a patch."""


Teacher = Annotated[NetworkTeacher | PixelTeacher | HOGTeacher, Field(discriminator="kind")]


class VQKDObjective(Section):
    """Vector-quantised knowledge distillation (BEiT v2, arXiv:2208.06366); `backbone` is the encoder."""

    kind: Literal["vqkd"]
    codes: Annotated[int, Field(ge=2, le=65536)] | None = None
    """Number of codes V; null: by the size of the data."""
    code_dim: Count = 32
    """Width of a code's vector."""
    decoder_depth: Count = 1
    """Blocks of the decoder, of the encoder's width (published: 1 or 3)."""
    teacher: Teacher
    """What the decoder tells."""
    commitment: Positive = 1.0
    """Weight of the distance between a token and its code."""
    decay: Fraction = 0.99
    """Share of a code's vector that is kept at each step."""


TOKENIZER_KINDS = ("kmeans", "dvae", "vqkd")
TokenizerObjective = Annotated[KMeansObjective | DVAEObjective | VQKDObjective, Field(discriminator="kind")]
