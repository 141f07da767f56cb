"""Classifiers, and what they are trained with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpm import config as cfg
from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_backbone, create_readout
from mpm.backbones.initialization import initialize
from mpm.backbones.readouts import Readout
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.config.section import check_multiple
from mpm.interop.timm_hub import create_timm
from mpm.objectives.distillation import Distillation, hard_loss, soft_loss
from mpm.objectives.prepare import Mixing, PrepareLabelled
from mpm.objectives.supervised import Classification, binary_cross_entropy, cross_entropy
from mpm.objectives.teachers import own_size, takes_any_grid
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
    config: cfg.TimmNetwork,
    *,
    image_size: tuple[int, int],
    channels: int,
    num_classes: int,
    head_std: float = 0.02,
) -> TimmClassifier:
    """A whole classifier of timm with a fresh head.

    Raises:
        ValueError: if timm has no such model or weights, or it takes no images of that size.
    """
    network = create_timm(
        config.model, pretrained=config.pretrained, in_chans=channels, num_classes=num_classes
    )
    fit_timm(network, image_size, name=f"network.model {config.model}", key="data.image_size")
    built = TimmClassifier(network, head_std=head_std)
    built.reset_heads()
    return built


def fit_timm(network: Any, image_size: tuple[int, int], *, name: str, key: str) -> None:
    """Set a model of timm to images of a size, where its grid can be chosen.

    Args:
        network: in place.
        image_size: height and width in pixels.
        name: of the model, for errors.
        key: of its image size, for errors.

    Raises:
        ValueError: if its patches do not divide them, or it takes others only.
    """
    if takes_any_grid(network):
        for side, patch in zip(image_size, network.patch_embed.patch_size, strict=True):
            check_multiple(key, side, patch, of=f"the patch_size {patch} of {name}")
        network.set_input_size(img_size=image_size)
    elif (own := own_size(network)) not in (None, image_size):
        assert own is not None
        raise ValueError(
            f"{name} takes images of {own[0]}x{own[1]} only, not {image_size[0]}x{image_size[1]}; "
            f"set {key}={list(own)}"
        )


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
