"""Optimizer and schedule, and what is said about them."""

from typing import Any

import torch
from torch import nn

from mpm import config as cfg
from mpm import distributed
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.launch import cores_of_a_process
from mpm.objectives.distillation import Distillation
from mpm.objectives.supervised import Classification
from mpm.training.optimizer import create_adamw, create_lamb, create_lars, create_sgd, parameter_groups
from mpm.training.schedule import cosine, multistep


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
                    begin=0 if shape.over == "run" else None,
                )
            case cfg.ConstantSchedule():
                self.lr_at = multistep(
                    peak=config.lr, steps=self.steps, warmup_steps=warmup, milestones=[], start=shape.start
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


def optimizer(
    config: cfg.PretrainOptim | cfg.TokenizerOptim | cfg.FinetuneOptim, module: nn.Module
) -> torch.optim.Optimizer | None:
    """Over groups by layer and decay; None where gradients train nothing (k-means)."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    layers: dict[str, Any] = {}
    decayed: set[str] = set()
    undecayed = {"mask_token", "encoder_mask_token", "prefix_tokens"}
    undecayed |= {"tokens", "table"}  # of class attention; of positions. Relative biases decay, as in BEiT
    if isinstance(config, cfg.FinetuneOptim):
        assert isinstance(module, Classification | Distillation)
        network = module.classifier
        layers = {
            "layer_of": lambda name: network.layer_of(name.removeprefix("classifier.")),
            "num_layers": network.depth + 1,
            "layer_decay": config.layer_decay,
        }
        if isinstance(network, TimmClassifier):
            undecayed |= network.undecayed
    elif isinstance(config, cfg.PretrainOptim):
        names = {"mask": {"mask_token", "encoder_mask_token"}, "prefix": {"prefix_tokens"}}
        decayed = set().union(*(names[kind] for kind in config.decay_tokens))
    groups = parameter_groups(
        module,
        lr=config.lr,
        weight_decay=config.weight_decay,
        decayed=decayed,
        undecayed=undecayed - decayed,
        **layers,
    )
    match config:
        case cfg.LambOptim():
            return create_lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        case cfg.LarsOptim():
            return create_lars(groups, lr=config.lr, momentum=config.momentum)
        case cfg.SGDOptim():
            return create_sgd(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
        case cfg.AdamWOptim() | cfg.PretrainOptim() | cfg.TokenizerOptim():
            return create_adamw(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        case _:
            raise AssertionError(config)  # FinetuneOptim is no kind


def dtype(config: cfg.Optim) -> torch.dtype:
    """Of autocast."""
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def accumulation(config: cfg.PretrainConfig | cfg.TokenizerConfig | cfg.FinetuneConfig) -> int:
    """Micro-batches of a step on each process."""
    share = config.optim.batch_size // distributed.world_size()
    return share // (config.run.micro_batch or share)


def parameters(module: nn.Module) -> str:
    """How many parameters are trained, of how many, and how many of them are a backbone's."""
    trained, trunk = (
        sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        for part in (module, module.get_submodule("backbone"))
    )
    everything = sum(parameter.numel() for parameter in module.parameters())
    share = f" trained of {everything:,} ({trained / everything:.1%})" if trained < everything else ""
    if isinstance(module, TimmClassifier):  # whose backbone holds the head
        return f"{trained:,}{share}"
    return f"{trained:,}{share}, of them {trunk:,} in the backbone"


def facts(
    config: cfg.PretrainConfig | cfg.TokenizerConfig | cfg.FinetuneConfig,
    schedule: Schedule,
    *,
    num_images: int,
    device: torch.device,
    start: int,
) -> dict[str, str]:
    """What both scripts tell at the start."""
    optim, processes = config.optim, distributed.world_size()
    loaders = f"{config.run.workers} loader(s)"
    if config.run.workers > (cores := cores_of_a_process()):
        loaders += f" on {cores} core(s)"
    return {
        "images": f"{num_images:,}",
        "steps": f"{schedule.steps:,}, {schedule.per_epoch:,} an epoch"
        + (f"; from {start:,}" if start else ""),
        "batch": f"{optim.batch_size} = {processes} process(es) x {accumulation(config)} micro-batch(es)",
        **({"peak rate": f"{optim.lr:g}"} if optim.lr else {}),
        "device": f"{device}, {optim.dtype}, {torch.get_num_threads()} thread(s) and {loaders} a process",
        "writes to": str(config.run.output_dir),
    }
