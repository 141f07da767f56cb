"""`mpm models`: the published architectures, their sizes and costs, counted from the networks themselves."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpm import configfile
from mpm.backbones.backbone import Backbone
from mpm.backbones.classifier import Classifier
from mpm.backbones.cost import backbone_macs, blocks_macs, classifier_macs, linear_macs, stem_macs
from mpm.backbones.create import create_backbone, create_readout, variants
from mpm.config import Backbone as BackboneConfig
from mpm.interop.official import to_official
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.predictors import (
    ClassPretrainingPredictor,
    DecoderPredictor,
    LinearPredictor,
    Predictor,
    create_predictor,
)
from mpm.variants import BLOCKS_PATTERN, Architecture, Variant, variant

__all__ = ["Row", "rows", "table"]

_CHANNELS, _CLASSES, _CODES = 3, 1000, 8192
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")


class Row(NamedTuple):
    """A network at a resolution.

    Attributes:
        name: of the variant.
        network: "classifier" of 1000 classes, "encoder", or "pretraining" with predictor and mask token.
        image_size: side in pixels.
        patch_size: likewise.
        parameters: as the official weights hold them.
        gmacs: billions of multiply-accumulates of one image's forward pass; masked where it pretrains.
        paper: where it comes from.
        layout: the weights its parameters are counted in: the paper's family's; where that has no such
            option, timm's, else mpm's own.
    """

    name: str
    network: str
    image_size: int
    patch_size: int
    parameters: int
    gmacs: float
    paper: str
    layout: str


def rows(pattern: str = "*", words: Sequence[str] = ()) -> Iterator[Row]:
    """The networks whose name matches.

    Args:
        pattern: of a shell, as `cait_*`; a part of names, as `deit`; or any N x P, as `vit_b_6x6`.
        words: `key=value` of a `backbone` section, as `stem.kind=hmlp`.

    Raises:
        ValueError: if there is none, or a word does not fit.
    """
    found = variants(pattern)
    if not found and not re.match(BLOCKS_PATTERN, pattern):
        found = variants(f"*{pattern}*")
    for name in found or (pattern,):
        published = variant(name)
        for network in published.networks:
            for side in published.image_sizes if network == "classifier" else published.image_sizes[:1]:
                yield _row(name, published, network, side, words)


def table(rows: Sequence[Row], *, as_json: bool = False) -> str:
    """Aligned text, or JSON."""
    if as_json:
        return json.dumps([row._asdict() for row in rows], indent=1)
    header = ("name", "network", "px", "patch", "parameters", "GMACs", "paper")
    cells = [
        (
            row.name,
            row.network,
            str(row.image_size),
            str(row.patch_size),
            f"{row.parameters:,}",
            f"{row.gmacs:.2f}",
            row.paper,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
    right = {2, 3, 4, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *cells)
    )


def _row(name: str, published: Variant, network: str, side: int, words: Sequence[str]) -> Row:
    stated = configfile.from_words({"variant": name}, words, BackboneConfig, name="mpm models")
    trunk = stated.resolved()
    if network == "classifier":
        loosened = trunk.for_fine_tuning().positions
        trunk = trunk._replace(positions={**loosened, **stated.positions.model_dump(exclude_none=True)})
    image_size = (side, side)
    facts: dict[str, Any] = {
        "family": published.layout,
        "image_size": image_size,
        "channels": _CHANNELS,
        "backbone": trunk._asdict(),
        "readout": None,
        "num_classes": None,
        "predictor": dict(published.predictor) if network == "pretraining" else None,
    }
    with torch.device("meta"):
        backbone = create_backbone(trunk, image_size=image_size, channels=_CHANNELS).eval()
        match network:
            case "classifier":
                readout = create_readout(trunk, **published.readout)
                classifier = Classifier(backbone, readout, num_classes=_CLASSES)
                facts |= {"readout": dict(published.readout), "num_classes": _CLASSES}
                state, macs = classifier.state_dict(), classifier_macs(classifier)
            case "encoder":
                parts = nn.ModuleDict({"backbone": backbone, "norm": nn.LayerNorm(trunk.dim)})
                state, macs = _as_predictor(parts.state_dict()), backbone_macs(backbone)
                if published.layout == "simmim":  # whose encoder holds the mask token
                    state["predictor.encoder_mask_token"] = torch.empty(trunk.dim)
            case _:
                predictor, macs = _pretraining(published, trunk, backbone)
                state = MaskedPrediction(backbone, predictor, loss=torch.sub).state_dict()
        layout, parameters = _parameters(state, facts)
    return Row(name, network, side, trunk.patch_size[0], parameters, macs / 1e9, published.paper, layout)


def _as_predictor(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The final norm of an encoder is where a pretraining's is."""
    return {f"predictor.{name}" if name.startswith("norm") else name: t for name, t in state.items()}


def _pretraining(published: Variant, trunk: Architecture, backbone: Backbone) -> tuple[Predictor, int]:
    """Predictor, and the cost of a masked pass.

    As the published code computes: a stem that sees all patches, and every token through every block. Ours
    is a little cheaper.
    """
    N, R = backbone.grid[0] * backbone.grid[1], trunk.num_prefix
    out_dim, masked = trunk.patch_size[0] * trunk.patch_size[1] * _CHANNELS, 120  # 30 of 49 units of 2 x 2
    if published.layout == "beit":
        out_dim, masked = _CODES, 75
    predictor = create_predictor(trunk, out_dim=out_dim, grid=backbone.grid, **published.predictor)
    macs = backbone_macs(backbone)
    match predictor:
        case LinearPredictor():
            macs += linear_macs(predictor.head, masked)
        case ClassPretrainingPredictor():
            macs += blocks_macs(list(predictor.blocks), R + N) + linear_macs(predictor.head, 2 * masked)
        case DecoderPredictor():
            visible = R + N // 4
            macs = stem_macs(backbone.stem, N) + blocks_macs(list(backbone.blocks), visible)
            macs += linear_macs(predictor.embed, visible) + linear_macs(predictor.head, R + N)
            macs += blocks_macs(list(predictor.blocks), R + N)
    return predictor, macs


def _parameters(state: dict[str, Tensor], facts: dict[str, Any]) -> tuple[str, int]:
    """The first layout that has the network, and the parameters there."""
    for layout in (facts["family"], "timm"):
        with contextlib.suppress(ValueError):
            return layout, _count(to_official(state, facts, layout=layout))
    return "mpm", _count(state)


def _count(state: Mapping[str, Tensor]) -> int:
    """Parameters; statistics and indices are none."""
    return sum(tensor.numel() for name, tensor in state.items() if not name.endswith(_STATISTICS))
