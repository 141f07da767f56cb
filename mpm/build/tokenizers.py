"""Tokenizers, and what trains them."""

import math
from functools import partial

from torch import nn

from mpm import config as cfg
from mpm.backbones.create import create_backbone
from mpm.backbones.initialization import initialize
from mpm.objectives.dvae import DVAETraining, anneal
from mpm.objectives.kmeans import KMeans
from mpm.objectives.vqkd import VQKDTraining
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.dvae import DiscreteVAE
from mpm.tokenizers.kmeans import FeatureCodes, PatchCodes
from mpm.tokenizers.vqkd import VQKD


def tokenizer(
    config: cfg.TokenizerConfig, normalize: Normalize
) -> DiscreteVAE | VQKD | PatchCodes | FeatureCodes:
    """Images to codes; parameters are not initialised. `config` is resolved: with its number of codes."""
    objective, data = config.objective, config.data
    assert objective.codes is not None
    match objective:
        case cfg.DVAEObjective():
            return DiscreteVAE(
                objective.codes,
                code_dim=objective.code_dim,
                hidden=objective.hidden,
                layers=objective.layers,
                blocks=objective.blocks,
                channels=data.channels,
                normalize=normalize,
                interpolation=data.interpolation,
            )
        case cfg.VQKDObjective():
            assert config.backbone is not None
            encoder = create_backbone(
                config.backbone.resolved(), image_size=data.image_size, channels=data.channels
            )
            return VQKD(
                encoder,
                num_codes=objective.codes,
                code_dim=objective.code_dim,
                normalize=normalize,
                channels=data.channels,
                interpolation=data.interpolation,
            )
        case cfg.KMeansObjective(input=cfg.PatchInput() as chosen):
            return PatchCodes(
                objective.codes,
                patch_size=chosen.patch_size,
                normalize=normalize,
                channels=data.channels,
                normalize_patches=chosen.normalize_patches,
                interpolation=data.interpolation,
            )
    assert isinstance(objective.input, cfg.FeatureInput) and config.backbone is not None
    layer = objective.input.layer
    frozen = create_backbone(config.backbone.resolved(), image_size=data.image_size, channels=data.channels)
    return FeatureCodes(
        objective.codes,
        backbone=frozen,
        norm=nn.LayerNorm(frozen.dim, eps=1e-6) if layer is None else None,
        normalize=normalize,
        layer=layer,
        interpolation=data.interpolation,
    )


def tokenizer_objective(
    config: cfg.TokenizerConfig, built: nn.Module, *, feature_dim: int | None = None
) -> nn.Module:
    """What trains a tokenizer, with fresh parameters; `feature_dim` is the teacher's."""
    match config.objective, built:
        case cfg.KMeansObjective(), PatchCodes() | FeatureCodes():
            return KMeans(built, seed=config.seed)
        case cfg.DVAEObjective() as stated, DiscreteVAE():
            built.reset_parameters()
            return DVAETraining(
                built,
                loss=stated.loss,
                temperature=partial(anneal, **stated.temperature.model_dump()),
                kl_weight=partial(anneal, **stated.kl_weight.model_dump()),
                straight_through=stated.straight_through,
            )
        case cfg.VQKDObjective() as stated, VQKD():
            assert config.backbone is not None and feature_dim is not None
            training = VQKDTraining(
                built,
                feature_dim=feature_dim,
                decoder_depth=stated.decoder_depth,
                num_heads=config.backbone.resolved().heads,
                commitment=stated.commitment,
                decay=stated.decay,
                seed=config.seed,
            )
            start = config.backbone.in_full(classifier=False).initialization
            assert start is not None
            for part in training.children():  # each trunk counts its blocks from 1
                initialize(part, start)
            return training
    raise AssertionError(f"{type(built).__name__} is not of kind {config.objective.kind}")


def default_codes(num_images: int, num_patches: int) -> int:
    """A number of codes that fits the data: half the root of all patches, as a power of two, 32 to 8192.

    For ImageNet-1k at 196 patches, this is the 8192 of DALL-E and BEiT v2.
    """
    half_root = (num_images * num_patches) ** 0.5 / 2
    power = round(math.log2(half_root))
    return 2 ** min(max(power, 5), 13)
