"""Fine-tuning."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpm.config.checks import check_micro_batch, check_patches, check_statistics_are_stated
from mpm.config.data import (
    FinetuneData,
)
from mpm.config.model import Backbone, Readout
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
    readout: Readout
    """Encoder output to the vector that is classified."""
    tune: Literal["all", "attention", "mlp", "norm", "head"] = "all"
    """What is trained, besides the heads; checkpoints of a part hold what was trained and need their base."""
    eval_mode: bool = False
    """Train in evaluation mode: no drop path, batch norm by its statistics (DeiT at 384)."""
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
        if self.init is None:
            self._check_scratch()
        if backbone is not None:
            if data.image_size is not None and not backbone.missing:
                check_patches(data.image_size, backbone.resolved().patch_size)
            is_known = not backbone.missing
            if self.readout.kind == "token" and is_known and not backbone.resolved().class_token:
                raise ValueError(
                    "readout.kind token reads the class token, but backbone.class_token is false; "
                    "use class_attention or mean"
                )
        if self.loss == "binary_cross_entropy" and self.label_smoothing:
            raise ValueError(
                f"loss binary_cross_entropy takes no label_smoothing; set {self.label_smoothing:g} to 0"
            )
        check_micro_batch(self.run.micro_batch, self.optim.batch_size)
        sizes = {"optim.batch_size": self.optim.batch_size, "run.micro_batch": self.run.micro_batch}
        for key, size in sizes.items():
            if self.mixup is not None and size is not None and size % 2:
                raise ValueError(f"{key} {size} is odd, and mixup pairs images; use {size + 1}")
        return self

    def _check_scratch(self) -> None:
        if self.tune != "all":
            raise ValueError(
                f"tune {self.tune} freezes the rest, which has no weights yet; "
                "give init.checkpoint, or set tune to all"
            )
        if self.backbone is None:
            raise ValueError("backbone is null; give it, or init.checkpoint to fine-tune")
        if self.data.image_size is None:
            raise ValueError("data.image_size is null; give it, or init.checkpoint to take the checkpoint's")
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
