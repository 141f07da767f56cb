"""Fine-tuning."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpm.config.checks import check_micro_batch, check_patches, check_statistics_are_stated
from mpm.config.data import (
    FinetuneData,
)
from mpm.config.distillation import Distillation
from mpm.config.model import Backbone, ClassAttentionReadout, Readout, TokenReadout
from mpm.config.network import TimmNetwork
from mpm.config.optimizers import AnyFinetuneOptim
from mpm.config.section import Count, NotNegative, Section, Seed
from mpm.config.training import (
    Ema,
    Init,
    Labels,
    Mixup,
    Run,
)

__all__ = ["FinetuneConfig"]


class FinetuneConfig(Section):
    """Training a classifier on labelled images, from a checkpoint or from scratch."""

    seed: Seed = 0
    """Of new weights, order and augmentation."""
    run: Run
    """Where and how, none of it part of the experiment."""
    init: Init | None = None
    """The pretrained backbone; null: from scratch."""
    data: FinetuneData
    """Labelled images."""
    backbone: Backbone | None = None
    """The encoder. With init: what is not stated is the checkpoint's, and only drop_path may differ."""
    readout: Readout | None = None
    """Encoder output to the vector that is classified; required with a backbone."""
    network: TimmNetwork | None = None
    """A whole classifier in place of init, backbone and readout."""
    tune: Literal["all", "attention", "mlp", "norm", "head"] = "all"
    """What is trained, besides the heads; checkpoints of a part hold what was trained and need their base."""
    eval_mode: bool = False
    """Train in evaluation mode: no drop path, batch norm by its statistics (DeiT at 384)."""
    distillation: Distillation | None = None
    """A teacher to learn from besides the labels; null: none."""
    labels: Labels | None = None
    """How many of the training labels are used; null: all."""
    mixup: Mixup | None = None
    """Mixing of images and labels; null: none."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the label spread over all classes."""
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    """Cross entropy over the classes, or a binary one for each class."""
    optim: AnyFinetuneOptim
    """How."""
    ema: Ema | None = None
    """Moving average of the weights; null: none."""
    evaluate_every: Count | None = None
    """Steps between two evaluations; null: after each epoch."""
    head_init_std: NotNegative = 0.02
    """Deviation of the classifier's first weights (BEiT: 2e-5, MAE: 2e-5)."""
    head_norm: Literal["none", "batch"] = "none"
    """Before the heads; batch: over the batch and all processes, without weights (MAE's linear probe)."""

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        backbone, data = self.backbone, self.data
        self._check_network()
        if self.init is None:
            self._check_scratch()
        if backbone is not None:
            if data.image_size is not None and not backbone.missing:
                check_patches(data.image_size, backbone.resolved().patch_size)
            is_known = not backbone.missing
            is_token = isinstance(self.readout, TokenReadout)
            if is_token and is_known and not backbone.resolved().class_token:
                raise ValueError(
                    "readout.kind token reads the class token, but backbone.class_token is false; "
                    "use class_attention or mean"
                )
        if self.eval_mode and self.head_norm == "batch":
            raise ValueError(
                "eval_mode keeps every batch norm from learning, and head_norm batch knows nothing yet; "
                "set one of them to its default"
            )
        if self.loss == "binary_cross_entropy" and self.label_smoothing:
            raise ValueError(
                f"loss binary_cross_entropy takes no label_smoothing; set {self.label_smoothing:g} to 0"
            )
        self._check_distillation()
        check_micro_batch(self.run.micro_batch, self.optim.batch_size)
        sizes = {"optim.batch_size": self.optim.batch_size, "run.micro_batch": self.run.micro_batch}
        for key, size in sizes.items():
            if self.mixup is not None and size is not None and size % 2:
                raise ValueError(f"{key} {size} is odd, and mixup pairs images; use {size + 1}")
        return self

    def _check_network(self) -> None:
        if self.network is None:
            if self.readout is None:
                raise ValueError(
                    "readout is null; give it, such as {kind: mean}, or network for a whole classifier"
                )
            return
        for key in ("init", "backbone", "readout"):
            if getattr(self, key) is not None:
                raise ValueError(f"network is a whole classifier and takes no {key}; leave one of them out")
        for key, default in (("eval_mode", False), ("head_norm", "none")):
            if (value := getattr(self, key)) != default:
                raise ValueError(f"{key} {value} is not for a whole network of timm; leave it out")
        if self.optim.layer_decay != 1:
            raise ValueError(
                f"optim.layer_decay {self.optim.layer_decay:g} needs the layers of a backbone, and network "
                "has none; use 1"
            )

    def _check_distillation(self) -> None:
        stated, backbone = self.distillation, self.backbone
        if stated is None:
            return
        if stated.through == "token":
            told = "distillation.through token needs a second head"
            match self.readout:
                case ClassAttentionReadout(queries=queries):
                    if queries == 1:
                        raise ValueError(f"{told}; set readout.queries to 2, or through to class")
                case TokenReadout():
                    if backbone and not backbone.missing and not backbone.resolved().distillation_token:
                        raise ValueError(
                            f"{told}; set backbone.distillation_token to true, or through to class. A "
                            "checkpoint without that token can be read by readout {kind: class_attention, "
                            "queries: 2}"
                        )
                case _:
                    what = "network" if self.readout is None else f"readout.kind {self.readout.kind}"
                    raise ValueError(
                        f"{told}, and {what} has one; set through to class, or use a token or "
                        "class_attention readout"
                    )
        if stated.cache is not None:
            changed = {"mixup": self.mixup is not None, "data.erasing": self.data.erasing > 0}
            for key in [key for key, does in changed.items() if does]:
                raise ValueError(
                    f"distillation.cache holds answers to crops, and {key} changes what the teacher sees of "
                    f"them anew each time; set {key} to {'null' if key == 'mixup' else '0'}, or cache to null"
                )

    def _check_scratch(self) -> None:
        if self.tune != "all":
            raise ValueError(
                f"tune {self.tune} freezes the rest, which has no weights yet; "
                "give init.checkpoint, or set tune to all"
            )
        if self.backbone is None and self.network is None:
            raise ValueError("backbone is null; give it, or init.checkpoint to fine-tune")
        if self.data.image_size is None:
            raise ValueError("data.image_size is null; give it, or init.checkpoint to take the checkpoint's")
        if self.backbone is not None:
            self.backbone.resolved()
        check_statistics_are_stated(self.data)

    @property
    def inherited(self) -> frozenset[str]:
        """Dotted keys whose value is the checkpoint's."""
        if self.init is None:
            return frozenset()
        keys = ("image_size", "channels", "mean", "std")
        data = {f"data.{key}" for key in keys if getattr(self.data, key) is None}
        if self.backbone is None:
            return frozenset(data | {"backbone"})
        unstated = type(self.backbone).model_fields.keys() - self.backbone.model_fields_set
        return frozenset(data | {f"backbone.{key}" for key in unstated})
