"""What a recipe of fine-tuning does, as one row of a table: from a configuration, or typed from a paper."""

from typing import Any, NamedTuple

from mpm.config import FinetuneConfig, MultistepSchedule

__all__ = ["Constant", "Cosine", "Steps", "Taught", "recipe_of"]


class Cosine(NamedTuple):
    """Half a cosine after a linear warm-up."""

    start: float
    final: float
    over: str  # "rest": after the warm-up; "run": timm's, from step 0 on


class Constant(NamedTuple):
    """One rate after a linear warm-up."""

    start: float


class Steps(NamedTuple):
    """A rate that drops at epochs, after a linear warm-up."""

    start: float
    milestones: tuple[float, ...]
    factor: float


class Taught(NamedTuple):
    """A teacher, the share of its loss, and where it is learned from."""

    kind: str
    through: str
    weight: float
    teacher: str


def recipe_of(config: FinetuneConfig) -> dict[str, Any]:
    """What a resolved configuration does, in the columns of the tables below."""
    optim, data, mixup, taught = config.optim, config.data, config.mixup, config.distillation
    assert config.backbone is not None
    assert config.readout is not None
    trunk, shape = config.backbone.resolved(), optim.schedule
    ends = shape.model_dump(exclude={"kind"})
    kinds = {"cosine": Cosine, "constant": Constant, "multistep": Steps}
    if isinstance(shape, MultistepSchedule):
        ends["milestones"] = tuple(shape.milestones)
    of_optim = (
        "kind",
        "lr",
        "batch_size",
        "epochs",
        "warmup_epochs",
        "weight_decay",
        "layer_decay",
        "clip_norm",
    )
    of_kind = ("betas", "eps", "momentum", "nesterov")
    of_data = (
        *("image_size", "crop", "crop_scale", "crop_ratio", "flip", "interpolation", "color_jitter"),
        *("rand_augment", "three_augment", "erasing", "repeats", "test_crop"),
    )
    of_all = ("label_smoothing", "loss", "head_init_std", "head_norm", "tune", "eval_mode")
    return {
        **{key: getattr(optim, key) for key in of_optim},
        **{key: getattr(optim, key, None) for key in of_kind},
        **{key: getattr(data, key) for key in of_data},
        **{key: getattr(config, key) for key in of_all},
        "schedule": kinds[shape.kind](**ends),
        "drop_path": trunk.drop_path,
        "drop_path_rule": trunk.drop_path_rule,
        "readout": config.readout.kind,
        "mixup": mixup.alpha if mixup else None,
        "cutmix": mixup.cutmix if mixup else None,
        "mixing": (mixup.probability, mixup.switch) if mixup else None,
        "ema": config.ema.decay if config.ema else None,
        "labels": config.labels,
        "distillation": None
        if taught is None
        else Taught(taught.kind, taught.through, taught.weight, getattr(taught.teacher, "model", "")),
    }
