"""Configuration of a run: where it writes, how it optimises, what is watched."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PlainSerializer, Strict, model_validator

from mpm.config.data import Source
from mpm.config.section import Count, Fraction, Location, NotNegative, Positive, Probability, Section, Seed
from mpm.launch import cores_of_a_process

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "Ema",
    "Init",
    "Labels",
    "Mixup",
    "Moments",
    "Monitor",
    "MultistepSchedule",
    "Optim",
    "PretrainOptim",
    "Run",
    "Schedule",
    "TokenizerMonitor",
    "TokenizerOptim",
]

Beta = Annotated[float, Field(ge=0, lt=1)]


def _loaders() -> int:
    return min(8, cores_of_a_process())


class Run(Section):
    """Where and how it runs: two runs are the same experiment where all but this is equal.

    Nothing here moves more than rounding, except that a micro-batch is what batch norm, Mixup and drop path
    see at once, what a codebook starts from, and what moves the center of latent targets.
    """

    output_dir: Location
    """Folder of checkpoints, logs and the resolved configuration."""
    resume: Literal["auto", "never"] = "auto"
    """Continue from the newest checkpoint in output_dir, or begin anew."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Auto: CUDA where there is one."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of each block; auto: on CUDA."""
    workers: Annotated[int, Field(ge=0, default_factory=_loaders)]
    """Loader processes per training process; by default 8, or one a core where there are fewer."""
    threads: Count | None = None
    """CPU threads per training process; null: the cores, shared out."""
    micro_batch: Count | None = None
    """Images a process sends through the network at once; null: its whole share of the batch."""
    log_every: Count = 50
    """Steps between two lines of the log."""
    save_every: Count = 1000
    """Steps between two checkpoints."""
    keep: Count = 2
    """Newest checkpoints that stay, beside the best."""
    tune_allocator: bool = True
    """Keep freed memory in the process (CPU with glibc only; faster)."""


class Init(Section):
    """Weights to start from."""

    checkpoint: str
    """An mpm run or a step in it, a folder of `mpm import`, a file of published weights, or timm:NAME."""


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine."""

    kind: Literal["cosine"] = "cosine"
    final: NotNegative = 0.0
    """Rate at the end."""
    start: NotNegative = 0.0
    """Rate at the beginning of the warm-up."""
    over: Literal["rest", "run"] = "rest"
    """Steps of the half cosine: those after the warm-up (BEiT, MAE), or all (timm's: DeiT, CaiT, SimMIM)."""


class MultistepSchedule(Section):
    """Linear warm-up, then a constant rate that drops at milestones (SimMIM)."""

    kind: Literal["multistep"] = "multistep"
    milestones: Annotated[tuple[Positive, ...], Strict(False)]
    """Epochs at which the rate drops, ascending."""
    factor: Fraction = 0.1
    """Of the rate at each milestone."""
    start: NotNegative = 0.0
    """Rate at the beginning of the warm-up."""


class ConstantSchedule(Section):
    """Linear warm-up, then the same rate to the end (DeiT at 384)."""

    kind: Literal["constant"] = "constant"
    start: NotNegative = 0.0
    """Rate at the beginning of the warm-up."""


Schedule = Annotated[CosineSchedule | MultistepSchedule | ConstantSchedule, Field(discriminator="kind")]


class Optim(Section):
    """Durations, rates and the rest that every optimizer has."""

    alternatives: ClassVar = {
        "epochs": "steps",
        "steps": "epochs",
        "warmup_epochs": "warmup_steps",
        "warmup_steps": "warmup_epochs",
    }

    epochs: Positive | None = None
    """Passes over the data."""
    steps: Count | None = None
    """Optimizer steps, in place of epochs."""
    batch_size: Count
    """Images of an optimizer step, over all processes."""
    lr: Positive
    """Peak rate, absolute, for the batch as given."""
    weight_decay: NotNegative = 0.05
    """Of weights; norms and biases are not decayed."""
    warmup_epochs: NotNegative = 0.0
    """Length of the linear warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Length of the warm-up in steps, in place of epochs."""
    schedule: Schedule = CosineSchedule()
    """The rate after the warm-up."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient; null: not clipped."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of activations (autocast); parameters stay in fp32."""

    @model_validator(mode="after")
    def _check(self) -> "Optim":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs {self.epochs} and steps {self.steps} are given; give exactly one")
        if self.warmup_epochs and self.warmup_steps is not None:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} and warmup_steps {self.warmup_steps} given; give one"
            )
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} is not below epochs {self.epochs:g}; use less"
            )
        if self.steps is not None and (self.warmup_steps or 0) >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is not below steps {self.steps}; use less")
        for key in ("final", "start"):
            if (rate := getattr(self.schedule, key, 0.0)) > self.lr:
                raise ValueError(f"schedule.{key} {rate:g} is above the peak rate lr {self.lr:g}; use less")
        if isinstance(self.schedule, MultistepSchedule):
            self._check_milestones(self.schedule.milestones)
        return self

    def _check_milestones(self, milestones: tuple[float, ...]) -> None:
        end = self.epochs or float("inf")
        if list(milestones) != sorted({m for m in milestones if self.warmup_epochs <= m < end}):
            raise ValueError(
                f"schedule.milestones {list(milestones)} must ascend, from the end of the warm-up (epoch "
                f"{self.warmup_epochs:g}) to before the end of the run (epoch {end:g})"
            )


class Moments(Section):
    """What optimizers with two moments have: AdamW and LAMB."""

    betas: Annotated[tuple[Beta, Beta], Strict(False)] = (0.9, 0.999)
    """Decay of the two moments (MAE: [0.9, 0.95])."""
    eps: Positive = 1e-8
    """Added to the denominator (LAMB: 1e-6)."""


class PretrainOptim(Moments, Optim):
    """AdamW for pretraining."""

    decay_tokens: Annotated[
        frozenset[Literal["mask", "prefix"]], Strict(False), PlainSerializer(sorted, return_type=list[str])
    ] = frozenset()
    """Tokens whose weights decay (MAE: both; BEiT, SimMIM: the mask token)."""


class TokenizerOptim(Moments, Optim):
    """AdamW for tokenizers; k-means has no gradient and takes durations, batch size and dtype only."""

    lr: NotNegative = 0.0
    """Peak rate, absolute, for the batch as given; 0 for k-means."""
    weight_decay: NotNegative = 0.0
    """Of weights; norms and biases are not decayed (BEiT v2: 1e-4)."""


class Monitor(Section):
    """What is watched while pretraining; nothing here is trained on."""

    train: Source | None = None
    """Labelled images that k-NN and probes learn from; null: only label-free signals."""
    test: Source | None = None
    """Labelled images that they are tested on."""
    every: Count = 5000
    """Steps between two looks: probes and pictures."""
    k: Count = 20
    """Neighbours of k-NN."""
    images: Annotated[int, Field(ge=0)] = 8
    """Images reconstructed in a picture."""

    @model_validator(mode="after")
    def _check(self) -> "Monitor":
        if (self.train is None) != (self.test is None):
            missing = "train" if self.train is None else "test"
            raise ValueError(f"{missing} is null; give both train and test, or none")
        return self


class TokenizerMonitor(Section):
    """What is watched while a tokenizer is trained."""

    images: Annotated[int, Field(ge=0)] = 8
    """Images reconstructed in a picture."""
    every: Count = 1000
    """Steps between two looks: use of the codes, histogram, picture."""
    test: Source | None = None
    """Images looked at; null: some of the training images."""


class Labels(Section):
    """A labelled subset of the training images, balanced over the classes."""

    alternatives: ClassVar = {"count": "fraction", "fraction": "count"}

    count: Count | None = None
    """Labelled images, at least one a class."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the images, in place of count."""
    seed: Seed = 0
    """Of the draw."""

    @model_validator(mode="after")
    def _check(self) -> "Labels":
        if (self.count is None) == (self.fraction is None):
            raise ValueError(f"count {self.count} and fraction {self.fraction} are given; give exactly one")
        return self


class Mixup(Section):
    """Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899), one of the two per batch."""

    alpha: NotNegative = 0.8
    """Of Mixup's Beta distribution; 0: CutMix alone."""
    cutmix: NotNegative = 1.0
    """Of CutMix's Beta distribution; 0: Mixup alone."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """That a batch is mixed."""
    switch: Probability = 0.5
    """That a mixed batch is cut rather than blended."""

    @model_validator(mode="after")
    def _check(self) -> "Mixup":
        if not self.alpha and not self.cutmix:
            raise ValueError("alpha 0 and cutmix 0 mix nothing; raise one, or set mixup to null")
        return self


class Ema(Section):
    """A moving average of the weights, evaluated beside them."""

    decay: Fraction = 0.9999
    """Share of the average kept at each step."""
