"""Distillation: a classifier learns the labels and what a teacher says of the same images (DeiT)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.classifier import Classifier
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.objectives.masked import ObjectiveOutput
from mpm.objectives.supervised import LabelledInputs, agreement, mean_over_heads

__all__ = ["Distillation", "hard_loss", "soft_loss"]


class Distillation(nn.Module):
    """Labels and teacher, weighted: (1 - weight) of the labels' loss + weight of the teacher's.

    Args:
        classifier: the student.
        loss: of the labels: (logits float32 [B,L], targets [B,L]) -> scalar.
        teacher_loss: likewise (logits [B,L], the teacher's [B,L]) -> scalar.
        weight: of the teacher's loss.
        through: "token": the first head learns the labels and the others the teacher; "class": each head
            learns both.
    """

    def __init__(
        self,
        classifier: Classifier | TimmClassifier,
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        teacher_loss: Callable[[Tensor, Tensor], Tensor],
        weight: float,
        through: Literal["token", "class"],
    ):
        super().__init__()
        self.classifier = classifier
        self._loss = loss
        self._teacher_loss = teacher_loss
        self._weight = weight
        self._through = through

    def forward(self, inputs: LabelledInputs, progress: Tensor) -> ObjectiveOutput:
        """The weighted sum; `progress` is not used."""
        assert inputs.teacher is not None
        logits = self.classifier(inputs.images).float()  # [B,Q,L]
        of_labels, of_teacher = logits, logits
        if self._through == "token":
            of_labels, of_teacher = logits[:, :1], logits[:, 1:]
        labels = mean_over_heads(self._loss, of_labels, inputs.targets)
        teacher = mean_over_heads(self._teacher_loss, of_teacher, inputs.teacher)
        metrics = {
            "label_loss": labels.detach(),
            "teacher_loss": teacher.detach(),
            "train_accuracy": agreement(logits, inputs.targets),
            "teacher_accuracy": agreement(inputs.teacher[:, None], inputs.targets),
            "teacher_agreement": agreement(of_teacher, inputs.teacher),
        }
        return ObjectiveOutput(torch.lerp(labels, teacher, self._weight), metrics)

    def after_step(self, step: int) -> None:
        """Nothing moves but by the optimizer."""


def hard_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy with the teacher's class, the mean over the batch; both are logits [B,L]."""
    return F.cross_entropy(logits, teacher.argmax(1))


def soft_loss(
    logits: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 3.0,
    reduction: Literal["batch_mean", "all_elements"] = "batch_mean",
) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher at a temperature, times its square.

    The sum over classes p_teacher (log p_teacher - log p_student). The paper writes the arguments the other
    way round; its released code, Hinton's and this are the same.

    Args:
        logits: of the student, [B,L].
        teacher: its logits, [B,L].
        temperature: tau.
        reduction: "batch_mean" divides by B, as the paper says; "all_elements" by B x L, as its released
            code does, where the teacher counts L times less.
    """
    student, wanted = (F.log_softmax(both / temperature, dim=1) for both in (logits, teacher))
    divergence = F.kl_div(student, wanted, reduction="none", log_target=True)  # [B,L]
    summed = divergence.sum(1) if reduction == "batch_mean" else divergence
    return summed.mean() * temperature**2
