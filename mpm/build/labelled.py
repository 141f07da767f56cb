"""Classifiers, and what they are trained with."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mpm import config as cfg
from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_backbone, create_readout
from mpm.backbones.initialization import initialize
from mpm.backbones.readouts import Readout
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.interop.timm_hub import create_timm
from mpm.objectives.distillation import Distillation, hard_loss, soft_loss
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
    stated = config.readout
    assert stated is not None
    body = create_backbone(trunk.resolved(), image_size=image_size, channels=channels)
    built = Classifier(
        body,
        readout(stated, trunk),
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


def timm_classifier(
    config: cfg.TimmNetwork, *, channels: int, num_classes: int, head_std: float = 0.02
) -> TimmClassifier:
    """A whole classifier of timm with a fresh head.

    Raises:
        ValueError: if timm has no such model or weights.
    """
    network = create_timm(
        config.model, pretrained=config.pretrained, in_chans=channels, num_classes=num_classes
    )
    built = TimmClassifier(network, head_std=head_std)
    built.reset_heads()
    return built


def supervised(
    config: cfg.FinetuneConfig, network: Classifier | TimmClassifier
) -> Classification | Distillation:
    """The supervised objective, with what is learned from a teacher where there is one."""
    loss = binary_cross_entropy if config.loss == "binary_cross_entropy" else cross_entropy
    teacher_loss: Callable[[Tensor, Tensor], Tensor]
    match config.distillation:
        case None:
            return Classification(network, loss=loss)
        case cfg.HardDistillation() as stated:
            teacher_loss = hard_loss
        case cfg.SoftDistillation() as stated:
            teacher_loss = partial(soft_loss, temperature=stated.temperature, reduction=stated.reduction)
    return Distillation(
        network, loss=loss, teacher_loss=teacher_loss, weight=stated.weight, through=stated.through
    )


def prepare_labelled(
    config: cfg.FinetuneConfig,
    *,
    normalize: Normalize,
    num_classes: int,
    device: torch.device,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> PrepareLabelled:
    """Mixing, erasing and normalisation of training batches, and what the teacher says of them."""
    mixup = config.mixup
    return PrepareLabelled(
        normalize=normalize,
        num_classes=num_classes,
        device=device,
        label_smoothing=config.label_smoothing,
        mixing=None if mixup is None else Mixing(mixup.alpha, mixup.cutmix, mixup.probability, mixup.switch),
        erasing=config.data.erasing,
        teacher=teacher,
    )
