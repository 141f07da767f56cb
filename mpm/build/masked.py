"""Masked objectives: backbone, predictor, target."""

from functools import partial
from typing import cast

import torch
from torch import nn

from mpm import config as cfg
from mpm.backbones.backbone import Backbone
from mpm.backbones.create import create_backbone
from mpm.backbones.initialization import initialize
from mpm.objectives.hog import HOGTarget
from mpm.objectives.latent import LatentPrediction
from mpm.objectives.losses import patch_loss
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.predictors import Predictor, create_predictor
from mpm.objectives.targets import CodeTarget, PixelTarget, Target
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.base import Tokenizer
from mpm.tokenizers.use import CodeUse


def backbone(config: cfg.Backbone, *, image_size: tuple[int, int], channels: int) -> Backbone:
    """Stem, positions, prefix tokens and trunk; parameters are not initialised."""
    return create_backbone(config.resolved(), image_size=image_size, channels=channels)


def target(config: cfg.PretrainConfig, normalize: Normalize) -> Target:
    """What is predicted, where it follows from the images; for codes see `code_target`."""
    patch_size, channels = config.backbone.resolved().patch_size, config.data.channels
    match config.objective.target:
        case cfg.PixelTarget(normalize_patches=normalize_patches):
            return PixelTarget(
                patch_size, normalize=normalize, channels=channels, normalize_patches=normalize_patches
            )
        case cfg.HOGTarget(bins=bins, cells=cells):
            return HOGTarget(patch_size, channels=channels, bins=bins, cells=cells)
        case _:
            raise ValueError(f"a target of {config.objective.target.kind} is not made from the images alone")


def code_target(
    config: cfg.PretrainConfig, tokenizer: Tokenizer, use: CodeUse, *, dtype: torch.dtype
) -> CodeTarget:
    """The codes of a tokenizer, drawn as `use` tells them."""
    patch_size = config.backbone.resolved().patch_size
    return CodeTarget(tokenizer, patch_size=patch_size, dtype=dtype, draw=use.draw)


def predictor(config: cfg.PretrainConfig, *, out_dim: int) -> Predictor:
    """Encoder output to predictions; parameters are not initialised."""
    stated = config.objective.predictor.model_dump()
    return create_predictor(config.backbone.resolved(), out_dim=out_dim, grid=config.grid, **stated)


def objective(config: cfg.PretrainConfig, out_dim: int | None) -> MaskedPrediction | LatentPrediction:
    """What pretraining trains, with fresh parameters (none on the meta device).

    Args:
        config: of the run.
        out_dim: width of a prediction; None: the backbone's, as latent targets have it.
    """
    trunk = backbone(config.backbone, image_size=config.data.image_size, channels=config.data.channels)
    head = predictor(config, out_dim=out_dim or trunk.dim)
    loss = config.objective.in_full().loss
    start = config.backbone.in_full(classifier=False).initialization
    assert start is not None
    initialize(trunk, start)
    # a decoder is a network of its own; extra blocks continue the trunk
    initialize(cast(nn.Module, head), start, blocks_before=head.layers[0] + 1 if head.layers else 0)
    if isinstance(config.objective.target, cfg.LatentTarget):
        stated = config.objective.target
        return LatentPrediction(
            trunk,
            head,
            num_prototypes=stated.prototypes,
            momentum=stated.momentum,
            teacher_temperature=stated.teacher_temperature,
            student_temperature=stated.student_temperature,
        )
    assert loss is not None
    return MaskedPrediction(trunk, head, loss=partial(patch_loss, kind=loss))
