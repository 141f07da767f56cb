"""Pretraining: a masked objective, or a tokenizer."""

from pydantic import model_validator

from mpm.config.checks import check_cells, check_micro_batch, check_patches, check_statistics_are_stated
from mpm.config.data import (
    PretrainData,
)
from mpm.config.mask import Mask
from mpm.config.model import Backbone
from mpm.config.objective import ClassPretrainingPredictor, HOGTarget, Objective
from mpm.config.section import Section, Seed
from mpm.config.tokenizer import (
    DVAEObjective,
    FeatureInput,
    HOGTeacher,
    KMeansObjective,
    PatchInput,
    TokenizerObjective,
    VQKDObjective,
)
from mpm.config.training import (
    Init,
    Monitor,
    PretrainOptim,
    Run,
    TokenizerMonitor,
    TokenizerOptim,
)

__all__ = ["PretrainConfig", "TokenizerConfig"]


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
        for key in ("weight_decay", "betas", "eps", "warmup_epochs", "warmup_steps", "schedule", "clip_norm"):
            value = getattr(optim, key)
            if objective.kind == "kmeans" and value != type(optim).model_fields[key].default:
                raise ValueError(f"optim.{key} {value}: kmeans has no gradient; remove it")
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
        if self.backbone is None or self.backbone.missing:
            return None
        return self.backbone.resolved().patch_size
