"""Latent targets: the network predicts what an average of itself makes of the hidden patches."""

import copy
import math
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.backbone import Backbone
from mpm.objectives.masked import MaskedInputs, ObjectiveOutput, predict
from mpm.objectives.predictors import Predictor
from mpm.patchify.masks import PatchMask

__all__ = ["LatentPrediction", "Prototypes"]


class Prototypes(nn.Module):
    """Cosine similarity to learned directions (the last layer of DINO's and iBOT's heads).

    Args:
        dim: width of what is compared.
        count: K.
    """

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions at random."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> float32 [...,K] in [-1,1]."""
        with torch.autocast(x.device.type, enabled=False):  # a temperature of 0.04 makes much of rounding
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))


class LatentPrediction(nn.Module):
    """Predicts which prototypes hidden patches are near, as an average of the network tells (iBOT).

    The teacher is an exponential moving average of backbone and prototypes and sees the whole image. Its
    patch tokens, compared with the prototypes, centred and sharpened, are what the network has to tell
    from the visible patches (the masked part of iBOT, arXiv:2111.07832, with lightly's loss).

    Differs from the paper: no loss of class tokens and no second crop; any predictor stands where the head
    is, and the teacher's tokens meet the prototypes through a norm without parameters, so that predictors
    which see visible patches only work too; the teacher's temperature is constant.

    The center moves in each forward pass, the teacher in `after_step`. `perplexity` (of the targets' mean,
    in prototypes) falls to 1 where all patches are told alike, `target_entropy` (in nats) rises to log(K)
    where nothing is told.

    Args:
        backbone: the encoder.
        predictor: encoder output to vectors that are compared with the prototypes, as wide as the backbone.
        num_prototypes: K.
        momentum: share of the teacher that is kept in the first step; it rises to 1, a half cosine.
        teacher_temperature: of the targets.
        student_temperature: of the predictions.
        center_momentum: share of the center that is kept in each forward pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        predictor: Predictor,
        *,
        num_prototypes: int,
        momentum: float = 0.996,
        teacher_temperature: float = 0.04,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
    ):
        from lightly.loss.ibot_loss import IBOTPlusPlusPatchLoss

        super().__init__()
        self.backbone = backbone
        self.predictor = predictor
        self.prototypes = Prototypes(backbone.dim, num_prototypes)
        self.teacher = copy.deepcopy(backbone).requires_grad_(False).eval()
        self.teacher_prototypes = copy.deepcopy(self.prototypes).requires_grad_(False)
        # without a mask, iBOT++ is iBOT for rows of equal length, and does not wait for the device
        self.loss = IBOTPlusPlusPatchLoss(
            num_prototypes,
            teacher_temp=teacher_temperature,
            student_temp=student_temperature,
            center_momentum=center_momentum,
        )
        self._first_momentum = momentum
        self._progress: Tensor | None = None

    def reset_teacher(self) -> None:
        """Make the teacher the network as it is; to be called when the backbone has its start values."""
        self.teacher.load_state_dict(self.backbone.state_dict())
        self.teacher_prototypes.load_state_dict(self.prototypes.state_dict())

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def predict(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Normalised images [B,C,H,W] -> predictions [S,B,M,D]."""
        return predict(self.backbone, self.predictor, images, mask)

    @torch.no_grad()
    def teach(self, images: Tensor, mask: PatchMask) -> Tensor:
        """Normalised images [B,C,H,W], all of them seen -> the teacher's similarities [B,M,K]."""
        patches = self.teacher.encode(self.teacher.embed(images), read=mask.masked).patches  # [B,M,D]
        return self.teacher_prototypes(F.layer_norm(patches, patches.shape[-1:]))

    def forward(self, inputs: MaskedInputs, progress: Tensor) -> ObjectiveOutput:
        """The mean over masked patches, summed over the S predictions; `inputs.targets` is not used."""
        self._progress = progress
        taught = self.teach(inputs.images, inputs.mask)
        told = self.prototypes(self.predict(inputs.images, inputs.mask))  # [S,B,M,K]
        S = len(told)
        metrics = self._signals(taught)  # before the loss moves the center
        # S times as long rather than S calls, for one step of the center
        loss = S * self.loss(taught.repeat(1, S, 1), rearrange(told, "s b m k -> b (s m) k"))
        return ObjectiveOutput(loss, metrics)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The teacher follows the network."""
        assert self._progress is not None
        share = 1 - self.momentum_at(self._progress)
        for average, module in (
            (self.teacher, self.backbone),
            (self.teacher_prototypes, self.prototypes),
        ):
            for old, parameter in zip(average.parameters(), module.parameters(), strict=True):
                old.lerp_(parameter, share)
            for old_buffer, buffer in zip(average.buffers(), module.buffers(), strict=True):
                old_buffer.copy_(buffer)

    def momentum_at(self, progress: Tensor) -> Tensor:
        """Share of the teacher that is kept, [], rising to 1."""
        return 1 - (1 - self._first_momentum) * (1 + torch.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def _signals(self, taught: Tensor) -> dict[str, Tensor]:
        logits = (taught.flatten(0, 1) - self.loss.center.value) / self.loss.teacher_temp
        targets = logits.softmax(-1)  # [B*M,K]
        mean = targets.mean(0)
        return {
            "perplexity": torch.special.entr(mean).sum().exp(),
            "target_entropy": torch.special.entr(targets).sum(-1).mean(),
        }
