"""Between loader and objective: what never learns, on the device and without gradients."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mpm.objectives.masked import MaskedInputs
from mpm.objectives.supervised import LabelledInputs
from mpm.objectives.targets import Target
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.patchify.masks import PatchMask
from mpm.patchify.pixels import Normalize, to_unit

__all__ = ["Mixing", "PrepareLabelled", "PrepareMasked", "PrepareTokenizer"]


class _Batch(Protocol):
    @property
    def images(self) -> Tensor: ...


class _MaskedBatch(_Batch, Protocol):
    @property
    def target_images(self) -> Tensor | None: ...
    @property
    def masked(self) -> Tensor | None: ...
    @property
    def codes(self) -> Tensor | None: ...


class _LabelledBatch(Protocol):
    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def teacher(self) -> Tensor | None: ...


class PrepareMasked:
    """Normalises the images and computes the targets, unless their codes come with the batch.

    Args:
        target: what is predicted; it gets its own view of the images, in [0,1]. None: the objective makes it.
        normalize: for the network.
        num_masked: M, the same in every row.
        device: of the network.
    """

    def __init__(self, target: Target | None, *, normalize: Normalize, num_masked: int, device: torch.device):
        self.target = target
        self._normalize = normalize
        self._num_masked = num_masked
        self._device = device

    def __call__(self, batch: _MaskedBatch) -> MaskedInputs:
        """A batch with images [B,C,H,W], masked bool [B,N]; maybe the target's view, or codes int64 [B,N]."""
        assert batch.masked is not None
        images = to_unit(batch.images, self._device)
        mask = PatchMask.from_bool(batch.masked.to(self._device, non_blocking=True), self._num_masked)
        if batch.codes is not None:
            targets = mask.take_masked(batch.codes.to(self._device, non_blocking=True))
        elif self.target is None:
            targets = images.new_empty(0)
        else:
            own = batch.target_images
            targets = self.target(images if own is None else to_unit(own, self._device), mask)
        return MaskedInputs(self._normalize(images), mask, targets)


class PrepareTokenizer:
    """Images in [0,1], and what the teacher says of them.

    Args:
        teacher: images [B,C,H,W] in [0,1] -> features [B,N,F]; None: there is none.
        device: of the tokenizer.
    """

    def __init__(self, teacher: Callable[[Tensor], Tensor] | None, *, device: torch.device):
        self._teacher = teacher
        self._device = device

    def __call__(self, batch: _Batch) -> TokenizerInputs:
        """A batch with images [B,C,H,W]."""
        images = to_unit(batch.images, self._device)
        return TokenizerInputs(images, None if self._teacher is None else self._teacher(images))


class Mixing(NamedTuple):
    """Mixup and CutMix (timm's `Mixup`, one draw a batch).

    Attributes:
        mixup: alpha of the Beta distribution; 0: no Mixup.
        cutmix: likewise for CutMix.
        probability: that a batch is mixed.
        switch: probability of CutMix where both are on.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5


class PrepareLabelled:
    """Normalises, erases and mixes the images of a training batch, and makes soft targets.

    Erased rectangles are filled with standard normal noise, so erasing comes after the normalisation, as in
    timm; mixing is linear and commutes with it. Mixing needs an even number of images. A teacher gets what
    the network gets, with the normalisation undone: of an erased rectangle, noise of the data's own mean and
    deviation.

    Args:
        normalize: for the network.
        num_classes: L.
        device: of the network.
        label_smoothing: share of the target spread over all classes.
        mixing: Mixup and CutMix; None: none.
        erasing: probability of erasing a rectangle of an image (timm's `RandomErasing`, mode "pixel").
        teacher: images [B,C,H,W] in [0,1] -> logits [B,L], where they do not come with the batch; None: there
            is none.
    """

    def __init__(
        self,
        *,
        normalize: Normalize,
        num_classes: int,
        device: torch.device,
        label_smoothing: float = 0.0,
        mixing: Mixing | None = None,
        erasing: float = 0.0,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ):
        self._teacher = teacher
        self._normalize = normalize
        self._num_classes = num_classes
        self._device = device
        self._smoothing = label_smoothing
        self._mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self._erase: Callable[[Tensor], Tensor] | None = None
        if mixing is not None:
            from timm.data import Mixup

            self._mix = Mixup(
                mixup_alpha=mixing.mixup,
                cutmix_alpha=mixing.cutmix,
                prob=mixing.probability,
                switch_prob=mixing.switch,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        if erasing:
            from timm.data.random_erasing import RandomErasing

            self._erase = RandomErasing(probability=erasing, mode="pixel", device=str(device))

    def __call__(self, batch: _LabelledBatch) -> LabelledInputs:
        """A batch with images [B,C,H,W] and labels int64 [B]."""
        images = self._normalize(to_unit(batch.images, self._device))
        labels = batch.labels.to(self._device, non_blocking=True)
        if self._erase is not None:
            images = self._erase(images)
        if self._mix is not None:
            images, targets = self._mix(images, labels)
        else:
            hard = F.one_hot(labels, self._num_classes).float()
            targets = torch.lerp(hard, torch.full_like(hard, 1 / self._num_classes), self._smoothing)
        return LabelledInputs(images, targets, self._told(batch, images))

    def _told(self, batch: _LabelledBatch, images: Tensor) -> Tensor | None:
        if batch.teacher is not None:
            return batch.teacher.to(self._device, non_blocking=True)
        return None if self._teacher is None else self._teacher(self._normalize.undo(images))
