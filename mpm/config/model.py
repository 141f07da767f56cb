"""Configuration of the network: backbone and readout."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mpm.config.section import Count, Pair, Positive, Section, check_multiple
from mpm.variants import BLOCKS_PATTERN, SIZES, VARIANTS, Architecture, architecture, variant

__all__ = [
    "Backbone",
    "ClassAttentionReadout",
    "ConvStem",
    "HMLPStem",
    "LinearStem",
    "MeanReadout",
    "Positions",
    "Readout",
    "Stem",
    "TokenReadout",
]


class LinearStem(Section):
    """One linear map per patch (ViT)."""

    kind: Literal["linear"] = "linear"
    norm: Literal["none", "layer", "batch"] = "none"
    """After the map: none, over the channels of a token, or over the batch."""
    activation: Literal["none", "gelu"] = "none"
    """After the norm."""
    statistics: Literal["visible", "all"] = "all"
    """Patches that batch norm's statistics come from."""


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
    """How a token knows its place; null: as the variant, else a learned table and no bias."""

    table: Literal["sincos", "learned", "none"] | None = None
    """A vector per place, added to the tokens (MAE: sincos, BEiT and SimMIM: none)."""
    bias: Literal["none", "shared", "per_block"] | None = None
    """Relative position bias of the attention (BEiT and SimMIM pretrain with one shared by all blocks)."""


_NAMES = {"anyOf": [{"enum": list(VARIANTS)}, {"pattern": BLOCKS_PATTERN}]}


class Backbone(Section):
    """Stem, positions, prefix tokens and trunk. Where a key is null, the variant's value stands."""

    variant: Annotated[str, Field(json_schema_extra=_NAMES)] | None = None
    """A published architecture by name (`mpm models` lists them)."""
    patch_size: Pair | None = None
    """Side, or height and width, of a patch in pixels."""
    dim: Count | None = None
    """Width of a token."""
    depth: Count | None = None
    """Blocks, one after the other."""
    heads: Count | None = None
    """Attention heads of a branch."""
    mlp_ratio: Positive | None = None
    """Hidden width of an MLP over dim; 4 without a variant."""
    branches: Count | None = None
    """Attentions, and MLPs, side by side in a block; 1 without a variant."""
    attention: Literal["softmax", "talking_heads"] | None = None
    """Talking heads mix their logits and their weights (CaiT); softmax without a variant."""
    stem: Stem = LinearStem()
    """Patches to tokens."""
    positions: Positions = Positions()
    """How a token knows its place."""
    class_token: bool | None = None
    """A token that stands for the image; true without a variant."""
    distillation_token: bool | None = None
    """A token that stands for the teacher's answer (DeiT); false without a variant."""
    registers: Annotated[int, Field(ge=0)] = 0
    """Further tokens without a meaning (arXiv:2309.16588)."""
    qkv_bias: Literal["all", "query_value", "none"] | None = None
    """Which projections of the attention have a bias (BEiT: query_value); all without a variant."""
    layer_scale: Positive | Literal["none"] | None = None
    """Start value of LayerScale (BEiT-B: 0.1); none without a variant."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Probability of skipping a residual branch; 0 without a variant."""
    drop_path_rule: Literal["linear", "constant"] | None = None
    """Linear: from 0 at the first block to drop_path at the last. Linear without a variant."""
    initialization: Literal["vit", "mae", "beit", "beit_finetuning"] | None = None
    """How parameters start; vit without a variant."""

    @model_validator(mode="after")
    def _check(self) -> "Backbone":
        if self.variant is not None:
            variant(self.variant)
        if not self.missing:
            self._check_sizes(self.resolved())
        return self

    @property
    def missing(self) -> tuple[str, ...]:
        """Sizes that neither a key nor a variant states."""
        if self.variant is not None:
            return ()
        return tuple(key for key in ("patch_size", "dim", "depth", "heads") if getattr(self, key) is None)

    def resolved(self) -> Architecture:
        """Everything: as stated, else the variant's.

        Raises:
            ValueError: if a size is stated nowhere.
        """
        if self.missing:
            raise ValueError(
                f"backbone.{self.missing[0]} is required without a variant; "
                "give it, or backbone.variant, such as vit_b"
            )
        return architecture(self.variant, **self._stated() | {"stem": self.stem.model_dump()})

    def over(self, other: "Backbone") -> "Backbone":
        """`other`, with the drop path and initialization stated here.

        Args:
            other: a checkpoint's backbone.

        Raises:
            ValueError: if another key is stated here and differs from `other`; of a variant, its sizes count.
        """
        stated, theirs = self._stated(), other.resolved()._asdict()
        free: dict[str, Any] = {
            key: stated.pop(key) for key in ("drop_path", "drop_path_rule") if key in stated
        }
        if self.initialization is not None:  # of what starts afresh
            free["initialization"] = self.initialization
        named = architecture(self.variant)._asdict() if self.variant is not None else {}
        for key, value in ({key: named[key] for key in SIZES if key in named} | stated).items():
            their = theirs[key]
            if key == "positions":
                their = {name: their[name] for name in value}
            if value == their:
                continue
            if key in stated:
                raise ValueError(
                    f"backbone.{key} {value} is not the checkpoint's, {their}; "
                    "leave it out, or choose another init.checkpoint"
                )
            raise ValueError(
                f"backbone.variant {self.variant} has {key} {value}, the checkpoint {their}; "
                "name the checkpoint's own variant or sizes, or choose another init.checkpoint"
            )
        return other.model_copy(update=free)

    def in_full(self, *, classifier: bool) -> "Backbone":
        """The same with every value stated: a checkpoint stays what it is where a variant's table changes.

        Args:
            classifier: whether it starts as a classifier does, not as pretraining.
        """
        keys = self.resolved()._asdict()
        if keys["layer_scale"] is None:
            keys["layer_scale"] = "none"
        keys |= {"stem": self.stem, "positions": Positions(**keys["positions"])}
        published = variant(self.variant) if self.variant is not None else None
        start: str = "vit"
        if published is not None:
            start = published.classifier_initialization if classifier else published.initialization
        return self.model_copy(update=keys | {"initialization": self.initialization or start})

    def _stated(self) -> dict[str, Any]:
        """What is stated here of an `Architecture`."""
        keys = self.model_fields_set & set(Architecture._fields) - {"stem", "positions"}
        stated = {key: value for key in keys if (value := getattr(self, key)) is not None}
        if self.layer_scale == "none":
            stated["layer_scale"] = None
        if "stem" in self.model_fields_set:
            stated["stem"] = self.stem.model_dump()
        if positions := self.positions.model_dump(exclude_none=True):
            stated["positions"] = positions
        return stated

    def _check_sizes(self, sizes: Architecture) -> None:
        dim, (rows, columns) = sizes.dim, sizes.patch_size
        check_multiple("dim", dim, sizes.heads, of=f"heads {sizes.heads}")
        if sizes.positions["table"] == "sincos":
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


class TokenReadout(Section):
    """The class token, and the distillation token where the backbone has one."""

    kind: Literal["token"] = "token"


class MeanReadout(Section):
    """The mean of the patch tokens (BEiT, MAE)."""

    kind: Literal["mean"] = "mean"


class ClassAttentionReadout(Section):
    """Tokens that read the patches through blocks of their own (CaiT); LayerScale starts as the trunk's."""

    kind: Literal["class_attention"] = "class_attention"
    depth: Count = 2
    """Blocks."""
    queries: Literal[1, 2] = 1
    """The class token, or with it a distillation token."""
    mlp_ratio: Positive = 4.0
    """Hidden width of an MLP over dim."""


Readout = Annotated[TokenReadout | MeanReadout | ClassAttentionReadout, Field(discriminator="kind")]
