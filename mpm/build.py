"""From a configuration to objects: one `match` per choice, no registry.

Everything here calls the constructors that users call.
"""

from functools import partial
from typing import Any, assert_never

import torch
from torch import nn

from mpm import config as cfg
from mpm import distributed
from mpm.backbones.backbone import Backbone
from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_backbone, create_readout
from mpm.backbones.initialization import initialize
from mpm.backbones.readouts import Readout
from mpm.data.datasets import FolderImages, ImageSource, SyntheticImages, TorchvisionImages
from mpm.data.loading import BatchLoader, ViewDataset, train_loader
from mpm.data.statistics import channel_statistics
from mpm.data.stream import EpochStream
from mpm.data.views import PretrainView, TrainView
from mpm.objectives.losses import patch_loss
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.predictors import DecoderPredictor, LinearPredictor, Predictor
from mpm.objectives.prepare import Mixing, PrepareLabelled
from mpm.objectives.supervised import Classification, binary_cross_entropy, cross_entropy
from mpm.objectives.targets import PixelTarget, Target
from mpm.patchify.masks import BlockMask, MaskSampler, RandomMask
from mpm.patchify.pixels import Normalize
from mpm.training.optimizer import create_adamw, parameter_groups
from mpm.training.schedule import cosine, multistep

Moments = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Moments = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION: Moments = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


# Data


def source(
    config: cfg.Source | cfg.PretrainData, *, image_size: tuple[int, int], channels: int, labelled: bool
) -> ImageSource:
    """The images of a data section; `image_size` is that of synthetic ones."""
    match config:
        case cfg.FolderSource():
            return FolderImages(
                config.root,
                channels=channels,
                labels="folders" if labelled else "none",
                background=config.background,
                max_value=config.max_value,
                index_file=config.index,
            )
        case cfg.TorchvisionSource():
            return TorchvisionImages(
                config.name, root=config.root, split=config.split, channels=channels, download=config.download
            )
        case cfg.SyntheticSource():
            return SyntheticImages(
                config.count,
                image_size=image_size,
                channels=channels,
                num_classes=config.classes,
                seed=config.seed,
            )
        case _:
            assert_never(config)


def statistics(
    mean: cfg.Statistics, std: cfg.Statistics, images: ImageSource | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and deviations as numbers; for `measured` ones the main process looks at the images."""
    named = {"imagenet": IMAGENET, "inception": INCEPTION}
    if "measured" in (mean, std):
        assert images is not None
        named["measured"] = distributed.broadcast_object(
            channel_statistics(images)[:2] if distributed.is_main() else None
        )
    return (
        named[mean][0] if isinstance(mean, str) else mean,
        named[std][1] if isinstance(std, str) else std,
    )


def mask_sampler(config: cfg.PretrainConfig) -> MaskSampler:
    """Draws the masks, in the loader's workers."""
    match config.mask:
        case cfg.RandomMask(unit=unit):
            return RandomMask(config.grid, count=config.num_masked, unit=unit)
        case cfg.BlockMask(min_area=min_area):
            return BlockMask(config.grid, count=config.num_masked, min_area=min_area)


def pretrain_view(config: cfg.PretrainConfig) -> PretrainView:
    """Crops, flips and masks."""
    data = config.data
    return PretrainView(
        data.image_size,
        mask_sampler=mask_sampler(config),
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        color_jitter=data.color_jitter,
        interpolation=data.interpolation,
    )


def train_view(config: cfg.FinetuneData, image_size: tuple[int, int]) -> TrainView:
    """Crops, flips and augments."""
    return TrainView(
        image_size,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        flip=config.flip,
        color_jitter=config.color_jitter,
        rand_augment=config.rand_augment,
        interpolation=config.interpolation,
    )


def training_loader(
    config: cfg.PretrainConfig | cfg.FinetuneConfig,
    images: ImageSource,
    view: PretrainView | TrainView,
    *,
    start: int,
    stop: int,
    pin_memory: bool,
) -> BatchLoader:
    """This process's micro-batches of steps `start` to `stop`."""
    stream = EpochStream(
        len(images),
        config.optim.batch_size,
        seed=config.seed,
        start_step=start,
        stop_step=stop,
        micro_batch=config.run.micro_batch,
        repeats=config.data.repeats if isinstance(config, cfg.FinetuneConfig) else 1,
    )
    dataset = ViewDataset(images, view, seed=config.seed)
    return train_loader(dataset, stream, workers=config.run.workers, pin_memory=pin_memory)


# Networks


def backbone(config: cfg.Backbone, *, image_size: tuple[int, int], channels: int) -> Backbone:
    """Stem, positions, prefix tokens and trunk; parameters are not initialised."""
    return create_backbone(config.resolved(), image_size=image_size, channels=channels)


def target(config: cfg.PretrainConfig, normalize: Normalize) -> Target:
    """What is predicted."""
    return PixelTarget(
        config.backbone.resolved().patch_size,
        normalize=normalize,
        channels=config.data.channels,
        normalize_patches=config.objective.target.normalize_patches,
    )


def predictor(config: cfg.Predictor, *, dim: int, out_dim: int, grid: tuple[int, int]) -> Predictor:
    """Encoder output to predictions; parameters are not initialised."""
    match config:
        case cfg.LinearPredictor():
            return LinearPredictor(dim, out_dim)
        case cfg.DecoderPredictor():
            return DecoderPredictor(
                dim, out_dim, grid=grid, width=config.dim, depth=config.depth, num_heads=config.heads
            )


def objective(config: cfg.PretrainConfig, out_dim: int) -> MaskedPrediction:
    """What pretraining trains, with fresh parameters (none on the meta device)."""
    trunk = backbone(config.backbone, image_size=config.data.image_size, channels=config.data.channels)
    head = predictor(config.objective.predictor, dim=trunk.dim, out_dim=out_dim, grid=trunk.grid)
    built = MaskedPrediction(trunk, head, loss=partial(patch_loss, kind=config.objective.loss))
    start = config.backbone.in_full(classifier=False).initialization
    assert start is not None
    for part in (trunk, head):
        initialize(part, start)  # type: ignore[arg-type]
    return built


def classifier(
    config: cfg.FinetuneConfig,
    trunk: cfg.Backbone,
    *,
    image_size: tuple[int, int],
    channels: int,
    num_classes: int,
) -> Classifier:
    """What fine-tuning trains, with fresh parameters. `trunk` is the resolved backbone."""
    body = backbone(trunk, image_size=image_size, channels=channels)
    built = Classifier(
        body,
        readout(config.readout, trunk),
        num_classes=num_classes,
        head_std=config.head_init_std,
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


# Optimisation


class Schedule:
    """Steps of the run and the rate of each.

    Args:
        config: durations in epochs or steps.
        num_images: of the training data.

    Attributes:
        steps: of the whole run.
        per_epoch: a batch that is larger than the data is an epoch.
    """

    def __init__(self, config: cfg.Optim, num_images: int):
        self.per_epoch = max(1, num_images // config.batch_size)
        self.steps = config.steps or max(1, round((config.epochs or 0) * self.per_epoch))
        warmup = config.warmup_steps
        if warmup is None:
            warmup = round(config.warmup_epochs * self.per_epoch)
        shape = config.schedule
        match shape:
            case cfg.CosineSchedule():
                self.lr_at = cosine(
                    peak=config.lr,
                    steps=self.steps,
                    warmup_steps=warmup,
                    final=shape.final,
                    start=shape.start,
                )
            case cfg.MultistepSchedule():
                self.lr_at = multistep(
                    peak=config.lr,
                    steps=self.steps,
                    warmup_steps=warmup,
                    milestones=[round(epoch * self.per_epoch) for epoch in shape.milestones],
                    factor=shape.factor,
                    start=shape.start,
                )


def optimizer(config: cfg.PretrainOptim | cfg.FinetuneOptim, module: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over groups by layer and decay."""
    layers: dict[str, Any] = {}
    decayed: set[str] = set()
    if isinstance(config, cfg.FinetuneOptim):
        assert isinstance(module, Classification)
        network = module.classifier
        layers = {
            "layer_of": lambda name: network.layer_of(name.removeprefix("classifier.")),
            "num_layers": network.backbone.depth + 1,
            "layer_decay": config.layer_decay,
        }
    else:
        names = {"mask": {"mask_token", "encoder_mask_token"}, "prefix": {"prefix_tokens"}}
        decayed = set().union(*(names[kind] for kind in config.decay_tokens))
    tokens = ("mask_token", "encoder_mask_token", "prefix_tokens", "tokens")  # `tokens`: of class attention
    groups = parameter_groups(
        module,
        lr=config.lr,
        weight_decay=config.weight_decay,
        decayed=decayed,
        undecayed={*tokens, "table"}
        - decayed,  # `table`: learned positions; relative biases decay, as in BEiT
        **layers,
    )
    return create_adamw(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def dtype(config: cfg.Optim) -> torch.dtype:
    """Of autocast."""
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def accumulation(config: cfg.PretrainConfig | cfg.FinetuneConfig) -> int:
    """Micro-batches of a step on each process."""
    share = config.optim.batch_size // distributed.world_size()
    return share // (config.run.micro_batch or share)


# What is said about it


def parameters(module: nn.Module) -> str:
    """How many parameters are trained, and how many of them are the backbone's."""
    whole, trunk = (
        sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        for part in (module, module.get_submodule("backbone"))
    )
    return f"{whole:,}, of them {trunk:,} in the backbone"


def facts(
    config: cfg.PretrainConfig | cfg.FinetuneConfig,
    schedule: Schedule,
    *,
    num_images: int,
    device: torch.device,
    start: int,
) -> dict[str, str]:
    """What both scripts tell at the start."""
    optim, processes = config.optim, distributed.world_size()
    return {
        "images": f"{num_images:,}",
        "steps": f"{schedule.steps:,}, {schedule.per_epoch:,} an epoch"
        + (f"; from {start:,}" if start else ""),
        "batch": f"{optim.batch_size} = {processes} process(es) x {accumulation(config)} micro-batch(es)",
        "peak rate": f"{optim.lr:g}",
        "device": f"{device}, {optim.dtype}, {torch.get_num_threads()} thread(s) a process",
        "writes to": str(config.run.output_dir),
    }
