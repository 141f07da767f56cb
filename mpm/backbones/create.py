"""Networks from an architecture, or from the name of a published one."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from mpm.backbones.attention import Attention, TalkingHeads
from mpm.backbones.backbone import Backbone, Positions
from mpm.backbones.blocks import Block, Mlp, ParallelBlock
from mpm.backbones.classifier import Classifier
from mpm.backbones.initialization import Initialization, initialize
from mpm.backbones.readouts import ClassAttentionReadout, MeanReadout, Readout, TokenReadout
from mpm.patchify.patches import grid_of
from mpm.patchify.stems import ConvStem, HierarchicalMLPStem, LinearStem, Stem
from mpm.variants import VARIANTS, Architecture, architecture, variant

__all__ = [
    "create_backbone",
    "create_blocks",
    "create_classifier",
    "create_readout",
    "create_stem",
    "variants",
]


def variants(pattern: str = "*") -> tuple[str, ...]:
    """Names of the published architectures that match a shell pattern, as `cait_*`.

    `create_classifier` takes `vit_{ti,s,b,l}_NxP` for any N and P besides.
    """
    return tuple(name for name in VARIANTS if fnmatch.fnmatch(name, pattern))


def create_classifier(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    channels: int = 3,
    readout: Mapping[str, Any] | None = None,
    initialization: Initialization | None = None,
    **overrides: Any,
) -> Classifier:
    """A published classifier with fresh weights.

    >>> network = create_classifier("vit_b_12x1", stem={"kind": "hmlp"}, layer_scale=1e-4)

    Args:
        name: one of `variants()`, or `vit_{ti,s,b,l}_NxP`.
        num_classes: L.
        image_size: side, or height and width, in pixels; positions are of this size.
        channels: of the images.
        readout: kind and options, see `create_readout`; None: the published one.
        initialization: scheme, see `initialize`; None: the published one.
        overrides: attributes of `mpm.variants.Architecture`, such as `drop_path=0`.

    Raises:
        ValueError: if a name is unknown, or what is asked for does not fit together.
    """
    published = variant(name)
    loosened = published.architecture.for_fine_tuning().positions
    positions = {**loosened, **overrides.get("positions", {})}
    trunk = architecture(name, **overrides | {"positions": positions})
    reader = create_readout(trunk, **(published.readout if readout is None else readout))
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    backbone = create_backbone(trunk, image_size=sides, channels=channels)
    built = Classifier(backbone, reader, num_classes=num_classes, head_std=published.head_std)
    initialize(built, initialization or published.classifier_initialization)  # type: ignore[arg-type]
    built.reset_heads()
    return built


def create_backbone(
    architecture: Architecture, *, image_size: tuple[int, int], channels: int = 3
) -> Backbone:
    """Stem, positions, prefix tokens and trunk; parameters are not initialised.

    Args:
        architecture: of it.
        image_size: height and width in pixels.
        channels: of the images.

    Raises:
        ValueError: if an option is unknown or does not fit.
    """
    grid = grid_of(image_size, architecture.patch_size)
    table, bias = architecture.positions["table"], architecture.positions["bias"]
    return Backbone(
        create_stem(
            **architecture.stem,
            patch_size=architecture.patch_size,
            dim=architecture.dim,
            channels=channels,
        ),
        create_blocks(architecture),
        grid=grid,
        positions=None if table == "none" else Positions(grid, architecture.dim, learned=table == "learned"),
        relative_bias=None if bias == "none" else bias,
        num_heads=architecture.heads,
        num_prefix=architecture.num_prefix,
    )


def create_stem(
    kind: str, *, patch_size: tuple[int, int], dim: int, channels: int = 3, **options: Any
) -> Stem:
    """Patches to tokens.

    Args:
        kind: "linear", "hmlp" or "conv".
        patch_size: height and width of a patch in pixels.
        dim: width of a token.
        channels: of the images.
        options: of the stem of that kind.

    Raises:
        ValueError: if the kind is unknown, or an option does not fit.
    """
    match kind:
        case "linear":
            return LinearStem(patch_size, dim, channels=channels, **options)
        case "hmlp":
            return HierarchicalMLPStem(patch_size, dim, channels=channels, **options)
        case "conv":
            return ConvStem(patch_size, dim, channels=channels, **options)
    raise ValueError(f"stem.kind {kind} is unknown; use linear, hmlp or conv")


def create_blocks(
    architecture: Architecture, *, drop_path_rates: Sequence[float] | None = None
) -> list[Block | ParallelBlock]:
    """The blocks of a trunk, with their drop path, or as many like them as there are rates given."""
    rates = architecture.drop_path_rates if drop_path_rates is None else drop_path_rates
    dim, scale = architecture.dim, architecture.layer_scale

    def attention() -> Attention:
        attend = TalkingHeads(architecture.heads) if architecture.attention == "talking_heads" else None
        return Attention(dim, architecture.heads, qkv_bias=architecture.qkv_bias, attend=attend)  # type: ignore[arg-type]

    def mlp() -> Mlp:
        return Mlp(dim, int(dim * architecture.mlp_ratio))

    if architecture.branches == 1:
        return [Block(attention(), mlp(), layer_scale=scale, drop_path=rate) for rate in rates]
    branches = range(architecture.branches)
    return [
        ParallelBlock(
            [attention() for _ in branches], [mlp() for _ in branches], layer_scale=scale, drop_path=rate
        )
        for rate in rates
    ]


def create_readout(
    architecture: Architecture,
    *,
    kind: str,
    depth: int = 2,
    queries: int = 1,
    mlp_ratio: float = 4.0,
) -> Readout:
    """What reads a trunk for a classifier.

    Args:
        architecture: of the trunk.
        kind: "token" (class, and distillation token where there is one), "mean" or "class_attention".
        depth: blocks of class attention.
        queries: of class attention: 1, or 2 with a distillation token.
        mlp_ratio: of class attention. Its LayerScale starts as the trunk's.

    Raises:
        ValueError: if the kind is unknown, or the trunk has no class token to read.
    """
    match kind:
        case "token":
            if not architecture.class_token:
                raise ValueError(
                    "readout.kind token reads the class token, but class_token is false; "
                    "use class_attention or mean"
                )
            return TokenReadout(architecture.dim, num_vectors=1 + architecture.distillation_token)
        case "mean":
            return MeanReadout(architecture.dim)
        case "class_attention":
            return ClassAttentionReadout(
                architecture.dim,
                architecture.heads,
                depth=depth,
                num_vectors=queries,
                mlp_ratio=mlp_ratio,
                layer_scale=architecture.layer_scale,
            )
    raise ValueError(f"readout.kind {kind} is unknown; use token, mean or class_attention")
