"""Supervised classification."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.classifier import Classifier
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.objectives.masked import ObjectiveOutput

__all__ = [
    "Classification",
    "LabelledInputs",
    "agreement",
    "binary_cross_entropy",
    "cross_entropy",
    "mean_over_heads",
]


class LabelledInputs(NamedTuple):
    """What `prepare` gives to a supervised objective.

    Attributes:
        images: normalised, float32 [B,C,H,W].
        targets: probabilities of the classes, float32 [B,L].
        teacher: its logits, float32 [B,L]; None: there is none.
    """

    images: Tensor
    targets: Tensor
    teacher: Tensor | None = None


class Classification(nn.Module):
    """Every head of the classifier learns the targets.

    Args:
        classifier: the network.
        loss: (logits float32 [B,L], targets [B,L]) -> scalar.
    """

    def __init__(self, classifier: Classifier | TimmClassifier, *, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.classifier = classifier
        self._loss = loss

    def forward(self, inputs: LabelledInputs, progress: Tensor) -> ObjectiveOutput:
        """The mean over the heads; `progress` is not used."""
        logits = self.classifier(inputs.images).float()  # [B,Q,L]
        loss = mean_over_heads(self._loss, logits, inputs.targets)
        return ObjectiveOutput(loss, {"train_accuracy": agreement(logits, inputs.targets)})

    def after_step(self, step: int) -> None:
        """Nothing moves but by the optimizer."""


def mean_over_heads(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of a loss over heads: logits [B,Q,L], targets [B,L]."""
    return torch.stack([loss(head, targets) for head in logits.unbind(1)]).mean()


@torch.no_grad()
def agreement(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of the batch whose highest score, of the mean over heads, is the target's: [B,Q,L], [B,L]."""
    return (logits.mean(1).argmax(1) == targets.argmax(1)).float().mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets [B,L], the mean over the batch."""
    return F.cross_entropy(logits, targets)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """A binary problem per class: every class with a share in the mix is present (RSB, DeiT-III).

    The targets must not be smoothed: each class would then be present.
    """
    return F.binary_cross_entropy_with_logits(logits, targets.gt(0).to(logits.dtype))
