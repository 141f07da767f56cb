"""Configuration of the network and what it learns: backbone, objective, readout."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpm.config.section import Count, Pair, Positive, Section, check_multiple
from mpm.variants import VARIANTS, Sizes

__all__ = [
    "Backbone",
    "ConvStem",
    "DecoderPredictor",
    "HMLPStem",
    "LinearPredictor",
    "LinearStem",
    "MaskedObjective",
    "MeanReadout",
    "Objective",
    "PixelTarget",
    "Positions",
    "Predictor",
    "Readout",
    "Stem",
    "Target",
    "TokenReadout",
]


class LinearStem(Section):
    """One linear map per patch (ViT)."""

    kind: Literal["linear"] = "linear"


class HMLPStem(Section):
    """Hierarchical MLP per patch ("Three things", arXiv:2203.09795, section 5)."""

    kind: Literal["hmlp"] = "hmlp"
    norm: Literal["layer", "batch"] = "batch"
    """Over the channels of a token, or over the batch (the paper's choice)."""
    statistics: Literal["visible", "all"] = "all"
    """Patches that batch norm's statistics come from; all: as in the paper, which masks after the stem."""


class ConvStem(Section):
    """Overlapping 3x3 convolutions of stride 2; hidden pixels are blanked first."""

    kind: Literal["conv"] = "conv"
    norm: Literal["layer", "batch"] = "batch"
    """Over the channels of a location, or over the batch."""


Stem = Annotated[LinearStem | HMLPStem | ConvStem, Field(discriminator="kind")]


class Positions(Section):
    """How a token knows its place."""

    table: Literal["sincos", "learned", "none"] = "learned"
    """A vector per place, added to the tokens (MAE: sincos, BEiT and SimMIM: none)."""
    bias: Literal["none", "shared", "per_block"] = "none"
    """Relative position bias of the attention (BEiT and SimMIM pretrain with one shared by all blocks)."""


class Backbone(Section):
    """Stem, positions, prefix tokens and trunk."""

    variant: Annotated[str, Field(json_schema_extra={"enum": list(VARIANTS)})] | None = None
    """Published sizes by name; of the five keys below, those given replace its own."""
    patch_size: Pair | None = None
    """Side, or height and width, of a patch in pixels."""
    dim: Count | None = None
    """Width of a token."""
    depth: Count | None = None
    """Blocks."""
    heads: Count | None = None
    """Attention heads of a block."""
    mlp_ratio: Positive | None = None
    """Hidden width of a block's MLP over dim; 4 without a variant."""
    stem: Stem = LinearStem()
    """Patches to tokens."""
    positions: Positions = Positions()
    """How a token knows its place."""
    class_token: bool = True
    """A token that stands for the image."""
    registers: Annotated[int, Field(ge=0)] = 0
    """Further tokens without a meaning (arXiv:2309.16588)."""
    qkv_bias: Literal["all", "query_value", "none"] = "all"
    """Which projections of the attention have a bias (BEiT: query_value)."""
    layer_scale: Positive | None = None
    """Start value of LayerScale (BEiT-B: 0.1); null: none."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of skipping the last block, from 0 at the first rising linearly."""
    initialization: Literal["vit", "mae", "beit"] = "vit"
    """How parameters start."""

    @model_validator(mode="after")
    def _check(self) -> "Backbone":
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f'variant "{self.variant}" is unknown; use one of {", ".join(VARIANTS)}')
        if not self.missing:
            self._check_sizes(self.resolved())
        return self

    @property
    def missing(self) -> tuple[str, ...]:
        """Sizes that neither a key nor a variant states."""
        if self.variant is not None:
            return ()
        return tuple(key for key in ("patch_size", "dim", "depth", "heads") if getattr(self, key) is None)

    def resolved(self) -> Sizes:
        """All sizes: as stated, else the variant's.

        Raises:
            ValueError: if a size is stated nowhere.
        """
        if self.missing:
            raise ValueError(
                f"backbone.{self.missing[0]} is required without a variant; "
                f"give it, or backbone.variant (one of {', '.join(VARIANTS)})"
            )
        stated = {key: value for key in Sizes._fields if (value := getattr(self, key)) is not None}
        return VARIANTS[self.variant]._replace(**stated) if self.variant else Sizes(**stated)

    def over(self, other: "Backbone") -> "Backbone":
        """`other`, with the drop path stated here.

        Args:
            other: a checkpoint's backbone.

        Raises:
            ValueError: if another key is stated here and differs from `other`.
        """
        theirs = {**dict(other), **other.resolved()._asdict()}
        ours = {key: value for key in self.model_fields_set if (value := getattr(self, key)) is not None}
        if self.variant is not None:
            ours |= self.resolved()._asdict()
        for key in sorted(ours.keys() - {"variant", "drop_path"}):
            if ours[key] != theirs[key]:
                raise ValueError(
                    f"backbone.{key} {ours[key]} is not the checkpoint's, {theirs[key]}; "
                    "leave it out, or choose another init.checkpoint"
                )
        return other.model_copy(update={"drop_path": ours.get("drop_path", other.drop_path)})

    def _check_sizes(self, sizes: Sizes) -> None:
        dim, (rows, columns) = sizes.dim, sizes.patch_size
        check_multiple("dim", dim, sizes.heads, of=f"heads {sizes.heads}")
        if self.positions.table == "sincos":
            check_multiple("dim", dim, 4, of="4, which sincos positions need")
        if not isinstance(self.stem, LinearStem) and rows != columns:
            raise ValueError(
                f"the {self.stem.kind} stem needs square patches; use patch_size {rows} or {columns}"
            )
        if isinstance(self.stem, HMLPStem):
            check_multiple("dim", dim, 4, of="4, which the hmlp stem needs")
        if isinstance(self.stem, ConvStem):
            if rows < 2 or rows & (rows - 1):
                raise ValueError(
                    f"patch_size {rows} is no power of two, which the conv stem needs; use 2, 4, 8, 16 or 32"
                )
            check_multiple(
                "dim", dim, rows // 2, of=f"{rows // 2}, which a conv stem of patch_size {rows} needs"
            )


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


Predictor = Annotated[LinearPredictor | DecoderPredictor, Field(discriminator="kind")]


class PixelTarget(Section):
    """The pixels of a patch."""

    kind: Literal["pixels"]
    normalize_patches: bool = False
    """By each patch's own mean and deviation (MAE's better target)."""


# the only kind so far; a second joins as `Annotated[PixelTarget | CodeTarget, Field(discriminator="kind")]`
Target = PixelTarget


class MaskedObjective(Section):
    """Predict what is hidden."""

    kind: Literal["masked"]
    predictor: Predictor
    """Encoder output to predictions."""
    target: Target
    """What is predicted."""
    loss: Literal["l1", "l2", "smooth_l1"] = "l2"
    """Of pixels (MAE: l2, SimMIM: l1)."""


Objective = MaskedObjective


class TokenReadout(Section):
    """The class token."""

    kind: Literal["token"] = "token"


class MeanReadout(Section):
    """The mean of the patch tokens (BEiT, MAE)."""

    kind: Literal["mean"] = "mean"


Readout = Annotated[TokenReadout | MeanReadout, Field(discriminator="kind")]
