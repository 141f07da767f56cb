"""The configuration of the two scripts: every default, unit and rule, checked before torch is imported.

`PretrainConfig` and `FinetuneConfig` hold the rules between sections; the sections are in `data`,
`mask`, `model` and `training`, and re-exported here.
"""

from bisect import bisect
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpm.config.data import (
    FinetuneData,
    FolderData,
    FolderSource,
    HeldOut,
    PretrainData,
    PretrainView,
    Source,
    Statistics,
    SyntheticData,
    SyntheticSource,
    TorchvisionData,
    TorchvisionSource,
)
from mpm.config.imported import ImportedConfig, ImportedData
from mpm.config.mask import BlockMask, Mask, RandomMask
from mpm.config.model import (
    Backbone,
    ClassAttentionReadout,
    ClassPretrainingPredictor,
    CodeTarget,
    ConvStem,
    DecoderPredictor,
    HMLPStem,
    HOGTarget,
    LatentTarget,
    LinearPredictor,
    LinearStem,
    MaskedObjective,
    MeanReadout,
    Objective,
    PixelTarget,
    Positions,
    Predictor,
    Readout,
    Stem,
    Target,
    TokenReadout,
)
from mpm.config.section import Count, NotNegative, Section, Seed, check_multiple
from mpm.config.tokenizer import (
    TOKENIZER_KINDS,
    Anneal,
    DVAEObjective,
    FeatureInput,
    HOGTeacher,
    KMeansObjective,
    NetworkTeacher,
    PatchInput,
    PixelTeacher,
    Teacher,
    TokenizerObjective,
    VQKDObjective,
)
from mpm.config.training import (
    CosineSchedule,
    Ema,
    FinetuneOptim,
    Init,
    Labels,
    Mixup,
    Monitor,
    MultistepSchedule,
    Optim,
    PretrainOptim,
    Run,
    Schedule,
    TokenizerMonitor,
    TokenizerOptim,
)

__all__ = [
    "TOKENIZER_KINDS",
    "Anneal",
    "Backbone",
    "BlockMask",
    "ClassAttentionReadout",
    "ClassPretrainingPredictor",
    "CodeTarget",
    "ConvStem",
    "CosineSchedule",
    "DVAEObjective",
    "DecoderPredictor",
    "Ema",
    "FeatureInput",
    "FinetuneConfig",
    "FinetuneData",
    "FinetuneOptim",
    "FolderData",
    "FolderSource",
    "HMLPStem",
    "HOGTarget",
    "HOGTeacher",
    "HeldOut",
    "ImportedConfig",
    "ImportedData",
    "Init",
    "KMeansObjective",
    "Labels",
    "LatentTarget",
    "LinearPredictor",
    "LinearStem",
    "Mask",
    "MaskedObjective",
    "MeanReadout",
    "Mixup",
    "Monitor",
    "MultistepSchedule",
    "NetworkTeacher",
    "Objective",
    "Optim",
    "PatchInput",
    "PixelTarget",
    "PixelTeacher",
    "Positions",
    "Predictor",
    "PretrainConfig",
    "PretrainData",
    "PretrainOptim",
    "PretrainView",
    "RandomMask",
    "Readout",
    "Run",
    "Schedule",
    "Section",
    "Source",
    "Statistics",
    "Stem",
    "SyntheticData",
    "SyntheticSource",
    "Target",
    "Teacher",
    "TokenReadout",
    "TokenizerConfig",
    "TokenizerMonitor",
    "TokenizerObjective",
    "TokenizerOptim",
    "TorchvisionData",
    "TorchvisionSource",
    "VQKDObjective",
]


class PretrainConfig(Section):
    """Pretraining on unlabelled images."""

    seed: Seed = 0
    """Of weights, order, crops and masks."""
    run: Run
    """Where and how, none of it part of the experiment."""
    init: Init | None = None
    """Weights to continue from; null: from scratch."""
    data: PretrainData
    """Unlabelled images."""
    mask: Mask
    """Which patches are hidden."""
    backbone: Backbone
    """The encoder."""
    objective: Objective
    """What is learned."""
    optim: PretrainOptim
    """How."""
    monitor: Monitor = Monitor()
    """What is watched."""

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        check_patches(self.data.image_size, self.backbone.resolved().patch_size)
        self.mask.masked(self.grid)
        check_micro_batch(self.run.micro_batch, self.optim.batch_size)
        if self.init is None:
            check_statistics_are_stated(self.data)
        if isinstance(self.objective.predictor, ClassPretrainingPredictor):
            self._check_class_pretraining(self.objective.predictor)
        if isinstance(self.objective.target, HOGTarget):
            check_cells(self.backbone, self.objective.target.cells, "objective.target.cells")
        return self

    def _check_class_pretraining(self, predictor: ClassPretrainingPredictor) -> None:
        architecture = self.backbone.resolved()
        key = "objective.predictor.kind class_pretraining"
        if not architecture.class_token:
            raise ValueError(f"{key} trains the class token, but backbone.class_token is false; use linear")
        if predictor.early_layer > architecture.depth:
            raise ValueError(
                f"objective.predictor.early_layer {predictor.early_layer} is above the trunk's "
                f"{architecture.depth} blocks; use 1 to {architecture.depth}"
            )

    @property
    def inherited(self) -> frozenset[str]:
        """Dotted keys whose value is the checkpoint's."""
        unstated = {f"data.{key}" for key in ("mean", "std") if getattr(self.data, key) is None}
        return frozenset(unstated if self.init is not None else ())

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per side (rows, columns)."""
        height, width = self.data.image_size
        patch_height, patch_width = self.backbone.resolved().patch_size
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def num_masked(self) -> int:
        """M, the same for every image."""
        return self.mask.masked(self.grid)


class TokenizerConfig(Section):
    """Training a tokenizer on unlabelled images; pretrain.py does it, as it does pretraining."""

    seed: Seed = 0
    """Of weights, order and crops."""
    run: Run
    """Where and how, none of it part of the experiment."""
    data: PretrainData
    """Unlabelled images; those a tokenizer is trained on have the size of its own view."""
    backbone: Backbone | None = None
    """The encoder of vqkd. Of k-means on features: the frozen network, filled in from its checkpoint."""
    objective: TokenizerObjective
    """Which tokenizer."""
    optim: TokenizerOptim
    """How."""
    monitor: TokenizerMonitor = TokenizerMonitor()
    """What is watched."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        objective, optim = self.objective, self.optim
        if (objective.kind == "kmeans") != (optim.lr == 0):
            rule = (
                "takes no rate; remove it" if optim.lr else "learns nothing at rate 0; use 5e-4, for example"
            )
            raise ValueError(f"optim.lr {optim.lr:g}: {objective.kind} {rule}")
        if objective.kind == "vqkd" and self.backbone is None:
            raise ValueError("backbone is null; objective.kind vqkd needs it: the encoder")
        if self.backbone is not None and not self._takes_backbone:
            raise ValueError(f"backbone is given, but objective.kind {objective.kind} has none; remove it")
        if self.stride is not None:
            check_patches(self.data.image_size, self.stride)
        if isinstance(objective, VQKDObjective) and isinstance(objective.teacher, HOGTeacher):
            assert self.backbone is not None
            check_cells(self.backbone, objective.teacher.cells, "objective.teacher.cells")
        check_micro_batch(self.run.micro_batch, optim.batch_size)
        if not isinstance(objective, KMeansObjective) or isinstance(objective.input, PatchInput):
            check_statistics_are_stated(self.data)
        return self

    @property
    def _takes_backbone(self) -> bool:
        objective = self.objective
        if isinstance(objective, KMeansObjective):
            return isinstance(objective.input, FeatureInput)
        return isinstance(objective, VQKDObjective)

    @property
    def inherited(self) -> frozenset[str]:
        """Dotted keys whose value is a checkpoint's: of k-means on features, the network and its moments."""
        if self._takes_backbone and not isinstance(self.objective, VQKDObjective):
            stated = {"backbone": self.backbone, "data.mean": self.data.mean, "data.std": self.data.std}
            return frozenset(key for key, value in stated.items() if value is None)
        return frozenset()

    @property
    def stride(self) -> tuple[int, int] | None:
        """Height and width in pixels of what a code stands for; None: the network's that is not read yet."""
        match self.objective:
            case DVAEObjective(layers=layers):
                return 2**layers, 2**layers
            case KMeansObjective(input=PatchInput(patch_size=patch_size)):
                return patch_size
        return None if self.backbone is None else self.backbone.resolved().patch_size


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
    labels: Labels | None = None
    """How many of the training labels are used; null: all."""
    mixup: Mixup | None = None
    """Mixing of images and labels; null: none."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the label spread over all classes."""
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    """Cross entropy over the classes, or a binary one for each class."""
    optim: FinetuneOptim
    """How."""
    ema: Ema | None = None
    """Moving average of the weights; null: none."""
    evaluate_every: Count | None = None
    """Steps between two evaluations; null: after each epoch."""
    head_init_std: NotNegative = 0.02
    """Deviation of the classifier's first weights (BEiT: 2e-5, MAE: 2e-5)."""

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


def check_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Refuse an image that is not whole patches.

    Raises:
        ValueError: naming the nearest sizes that are.
    """
    square = image_size[0] == image_size[1] and patch_size[0] == patch_size[1]
    for side, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        of = "" if square else f" ({side})"
        check_multiple(f"image_size{of}", size, patch, of=f"patch_size{of} {patch}")


def check_cells(backbone: Backbone, cells: int, key: str) -> None:
    """Refuse histograms that do not divide a patch.

    Raises:
        ValueError: naming the nearest sides that they do.
    """
    for side in backbone.resolved().patch_size:
        check_multiple("backbone.patch_size", side, cells, of=f"{key} {cells}")


def check_statistics_are_stated(data: PretrainData | FinetuneData) -> None:
    """Refuse ImageNet's moments, which stand where none are stated, for other than three channels.

    Raises:
        ValueError: naming what to state.
    """
    for key in ("mean", "std"):
        if getattr(data, key) is None and data.channels not in (None, 3):
            raise ValueError(
                f"data.{key} is null, so ImageNet's, which is for 3 channels, not {data.channels}; "
                f"use measured, or a list of {data.channels}"
            )


def check_micro_batch(micro_batch: int | None, batch_size: int) -> None:
    """Refuse a micro-batch that does not divide the batch.

    Raises:
        ValueError: naming the nearest that do.
    """
    if micro_batch is not None and batch_size % micro_batch:
        divisors = [size for size in range(1, batch_size + 1) if not batch_size % size]
        place = bisect(divisors, micro_batch)
        legal = " or ".join(str(size) for size in divisors[place - 1 : place + 1])
        raise ValueError(
            f"run.micro_batch {micro_batch} does not divide batch_size {batch_size}; use {legal}"
        )
