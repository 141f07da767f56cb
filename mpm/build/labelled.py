"""Classifiers, and what they are trained with."""

import torch

from mpm import config as cfg
from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_backbone, create_readout
from mpm.backbones.initialization import initialize
from mpm.backbones.readouts import Readout
from mpm.objectives.prepare import Mixing, PrepareLabelled
from mpm.objectives.supervised import Classification, binary_cross_entropy, cross_entropy
from mpm.patchify.pixels import Normalize


def classifier(
    config: cfg.FinetuneConfig,
    trunk: cfg.Backbone,
    *,
    image_size: tuple[int, int],
    channels: int,
    num_classes: int,
) -> Classifier:
    """What fine-tuning trains, with fresh parameters. `trunk` is the resolved backbone."""
    body = create_backbone(trunk.resolved(), image_size=image_size, channels=channels)
    built = Classifier(
        body,
        readout(config.readout, trunk),
        num_classes=num_classes,
        head_std=config.head_init_std,
        head_norm=config.head_norm,
    )
    start = trunk.in_full(classifier=True).initialization
    assert start is not None
    initialize(built, start)
    built.reset_heads()
    return built


def readout(config: cfg.Readout, trunk: cfg.Backbone) -> Readout:
    """Encoder output to the vectors that are classified; parameters are not initialised."""
    return create_readout(trunk.resolved(), **config.model_dump())


def supervised(config: cfg.FinetuneConfig, network: Classifier) -> Classification:
    """The supervised objective."""
    loss = binary_cross_entropy if config.loss == "binary_cross_entropy" else cross_entropy
    return Classification(network, loss=loss)


def prepare_labelled(
    config: cfg.FinetuneConfig, *, normalize: Normalize, num_classes: int, device: torch.device
) -> PrepareLabelled:
    """Mixing, erasing and normalisation of training batches."""
    mixup = config.mixup
    return PrepareLabelled(
        normalize=normalize,
        num_classes=num_classes,
        device=device,
        label_smoothing=config.label_smoothing,
        mixing=None if mixup is None else Mixing(mixup.alpha, mixup.cutmix, mixup.probability, mixup.switch),
        erasing=config.data.erasing,
    )
