"""Tiny networks, masks and images that the tests put together. Patches are 4x4, grids are not square."""

from typing import Any

import torch
from torch import Tensor, nn

from mpm.backbones.attention import RelativePositionBias
from mpm.backbones.backbone import Backbone, Positions
from mpm.backbones.create import create_blocks
from mpm.objectives.losses import patch_loss
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.predictors import ClassPretrainingPredictor, DecoderPredictor, LinearPredictor
from mpm.patchify.masks import PatchMask
from mpm.patchify.stems import ConvStem, HierarchicalMLPStem, LinearStem, Stem
from mpm.variants import Architecture

PATCH = (4, 4)
GRID = (3, 4)
DIM, HEADS, DEPTH = 16, 2, 2
CHANNELS = 3
CODES = 10

STEMS = ("linear", "hmlp-layer", "hmlp-visible", "hmlp-all", "conv-layer", "conv-batch")


def make_stem(kind: str, patch_size: int = 4, dim: int = DIM, *, channels: int = CHANNELS) -> Stem:
    """A stem by the name of its kind, then its norm or batch norm's statistics."""
    patch = (patch_size, patch_size)
    match kind.split("-"):
        case ["linear"]:
            return LinearStem(patch, dim, channels=channels)
        case ["hmlp", "layer"]:
            return HierarchicalMLPStem(patch, dim, channels=channels, norm="layer")
        case ["hmlp", ("visible" | "all") as statistics]:
            return HierarchicalMLPStem(patch, dim, channels=channels, norm="batch", statistics=statistics)
        case ["conv", ("layer" | "batch") as norm]:
            return ConvStem(patch, dim, channels=channels, norm=norm)
    raise AssertionError(kind)


def make_backbone(
    stem: Stem | str = "linear",
    *,
    grid: tuple[int, int] = GRID,
    dim: int = DIM,
    depth: int = DEPTH,
    heads: int = HEADS,
    learned_positions: bool | None = True,
    relative_bias: str | None = None,
    num_prefix: int = 1,
    **architecture: Any,
) -> Backbone:
    """A ViT; `learned_positions` None: no table. `architecture`: of its blocks, as `branches=2`."""
    sizes = Architecture(PATCH, dim=dim, depth=depth, heads=heads, **architecture)
    return Backbone(
        make_stem(stem, dim=dim) if isinstance(stem, str) else stem,
        create_blocks(sizes),
        grid=grid,
        positions=None if learned_positions is None else Positions(grid, dim, learned=learned_positions),
        relative_bias=relative_bias,
        num_heads=heads,
        num_prefix=num_prefix,
    )


def make_masked(method: str, backbone: Backbone) -> MaskedPrediction:
    """MAE, SimMIM, BEiT or BEiT v2, by the parts that make it; codes are 0 to `CODES` - 1."""
    area = backbone.stem.patch_size[0] * backbone.stem.patch_size[1] * CHANNELS
    match method:
        case "mae":
            decoder = DecoderPredictor(backbone.dim, area, grid=backbone.grid, width=12, depth=2, num_heads=3)
            return MaskedPrediction(backbone, decoder, loss=lambda x, y: patch_loss(x, y, kind="l2"))
        case "simmim":
            linear = LinearPredictor(backbone.dim, area)
            return MaskedPrediction(backbone, linear, loss=lambda x, y: patch_loss(x, y, kind="l1"))
        case "beit":
            linear = LinearPredictor(backbone.dim, CODES)
            return MaskedPrediction(
                backbone, linear, loss=lambda x, y: patch_loss(x, y, kind="cross_entropy")
            )
        case "beitv2":
            sizes = Architecture(PATCH, dim=backbone.dim, depth=2, heads=HEADS)
            predictor = ClassPretrainingPredictor(
                backbone.dim, CODES, blocks=create_blocks(sizes), early_layer=1
            )
            return MaskedPrediction(
                backbone, predictor, loss=lambda x, y: patch_loss(x, y, kind="cross_entropy")
            )
    raise AssertionError(method)


def targets_of(method: str, batch: int, masked: int) -> Tensor:
    """Random ones, codes or pixels."""
    if method in ("beit", "beitv2"):
        return torch.randint(CODES, (batch, masked))
    return torch.randn(batch, masked, PATCH[0] * PATCH[1] * CHANNELS)


def randomize(module: nn.Module) -> nn.Module:
    """Random values in every parameter and statistic, so that no term is hidden by a 0 or a 1."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.num_batches_tracked.zero_()
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
        if isinstance(part, Positions | RelativePositionBias):
            part.reset_parameters()  # the fixed table, the index of offsets
        for parameter in part.parameters(recurse=False):
            with torch.no_grad():
                parameter.normal_(0, 0.3)
    return module


def random_mask(batch: int, patches: int, masked: int) -> PatchMask:
    """`masked` of the patches, drawn independently for every row."""
    hidden = torch.rand(batch, patches).argsort(1) < masked
    return PatchMask.from_bool(hidden, masked)


def random_images(
    batch: int = 2, *, grid: tuple[int, int] = GRID, patch_size: int = 4, channels: int = CHANNELS
):
    """Standard normal pixels [B,C,H,W]."""
    return torch.randn(batch, channels, grid[0] * patch_size, grid[1] * patch_size)


def with_hidden(images: Tensor, mask: PatchMask, value: Tensor | float, *, patch_size: int = 4) -> Tensor:
    """The images with the pixels of masked patches replaced, by loops."""
    images = images.clone()
    columns = images.shape[3] // patch_size
    for b, row in enumerate(mask.masked.tolist()):
        for patch in row:
            top, left = patch // columns * patch_size, patch % columns * patch_size
            box = (b, slice(None), slice(top, top + patch_size), slice(left, left + patch_size))
            images[box] = value[box] if isinstance(value, Tensor) else value
    return images


def train_steps_of(objective: nn.Module, inputs: Any) -> list[float]:
    """The losses of a few steps on one batch; in the first, every parameter must get a gradient."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(4):
        loss = objective(inputs, torch.tensor(0.0)).loss
        assert loss.shape == ()
        losses.append(loss.item())
        loss.backward()
        if step == 0:
            for name, parameter in objective.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name
        optimizer.step()
        optimizer.zero_grad()
    return losses
