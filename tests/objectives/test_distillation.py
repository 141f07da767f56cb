"""Losses of distillation against loops and torch's own divergence; who learns what."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.classifier import Classifier
from mpm.backbones.initialization import initialize
from mpm.backbones.readouts import ClassAttentionReadout, TokenReadout
from mpm.objectives.distillation import Distillation, hard_loss, soft_loss
from mpm.objectives.supervised import LabelledInputs, cross_entropy
from tests.networks import DIM, HEADS, make_backbone, random_images, train_steps_of
from tests.objectives.test_supervised import CLASSES, PROGRESS, Fixed, soft_targets


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def test_hard_loss_equals_a_loop() -> None:
    logits, teacher = torch.randn(4, CLASSES), torch.randn(4, CLASSES)
    total = 0.0
    for row, wanted in zip(logits.tolist(), teacher.tolist(), strict=True):
        total -= math.log(softmax(row)[wanted.index(max(wanted))]) / 4
    assert hard_loss(logits, teacher).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_loss_equals_a_loop(temperature: float) -> None:
    logits, teacher = 3 * torch.randn(4, CLASSES), 3 * torch.randn(4, CLASSES)
    total = 0.0
    for row, wanted in zip(logits.tolist(), teacher.tolist(), strict=True):
        student, known = softmax(row, temperature), softmax(wanted, temperature)
        total += sum(p * math.log(p / q) for p, q in zip(known, student, strict=True))
    ours = soft_loss(logits, teacher, temperature=temperature)
    assert ours.item() == pytest.approx(temperature**2 * total / 4, rel=1e-5)


def test_soft_loss_is_torchs_divergence_and_that_of_deits_code() -> None:
    """`batchmean` is the paper's; the code sums and divides by the number of elements."""
    logits, teacher, tau = torch.randn(4, CLASSES), torch.randn(4, CLASSES), 3.0
    student, known = F.log_softmax(logits / tau, 1), F.softmax(teacher / tau, 1)
    paper = tau**2 * F.kl_div(student, known, reduction="batchmean")
    torch.testing.assert_close(soft_loss(logits, teacher), paper)
    code = (
        F.kl_div(student, F.log_softmax(teacher / tau, 1), reduction="sum", log_target=True)
        * (tau * tau)
        / logits.numel()
    )
    torch.testing.assert_close(soft_loss(logits, teacher, reduction="all_elements"), code)
    torch.testing.assert_close(code * CLASSES, paper)


LOSSES = {"hard": hard_loss, "soft": partial(soft_loss, temperature=2.0)}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("weight", [0.5, 0.1])
def test_the_class_head_learns_labels_and_the_distillation_head_the_teacher(kind: str, weight: float) -> None:
    logits, teacher, targets = torch.randn(4, 2, CLASSES), torch.randn(4, CLASSES), soft_targets()
    student = Fixed(logits)
    objective = Distillation(
        student, loss=cross_entropy, teacher_loss=LOSSES[kind], weight=weight, through="token"
    )
    output = objective(LabelledInputs(random_images(4), targets, teacher), PROGRESS)
    labels, told = cross_entropy(logits[:, 0], targets), LOSSES[kind](logits[:, 1], teacher)
    torch.testing.assert_close(output.loss.detach(), (1 - weight) * labels + weight * told)
    output.loss.backward()
    alone = logits[:, 0].clone().requires_grad_()
    ((1 - weight) * cross_entropy(alone, targets)).backward()
    torch.testing.assert_close(student.logits.grad[:, 0], alone.grad)  # nothing of the teacher


@pytest.mark.parametrize("heads", [1, 2])
def test_through_the_class_token_each_head_learns_both(heads: int) -> None:
    logits, teacher, targets = torch.randn(4, heads, CLASSES), torch.randn(4, CLASSES), soft_targets()
    objective = Distillation(
        Fixed(logits), loss=cross_entropy, teacher_loss=hard_loss, weight=0.3, through="class"
    )
    output = objective(LabelledInputs(random_images(4), targets, teacher), PROGRESS)
    each = [0.7 * cross_entropy(head, targets) + 0.3 * hard_loss(head, teacher) for head in logits.unbind(1)]
    torch.testing.assert_close(output.loss.detach(), torch.stack(each).mean())


def test_metrics_say_who_agrees_with_whom() -> None:
    def logits_of(classes: list[int]) -> Tensor:
        return 9 * torch.eye(CLASSES)[classes]

    heads = torch.stack([logits_of([0, 1, 2, 3]), 2 * logits_of([0, 1, 3, 3])], dim=1)
    objective = Distillation(
        Fixed(heads), loss=cross_entropy, teacher_loss=hard_loss, weight=0.5, through="token"
    )
    inputs = LabelledInputs(random_images(4), torch.eye(CLASSES)[[0, 1, 2, 2]], logits_of([0, 2, 3, 2]))
    metrics = objective(inputs, PROGRESS).metrics
    assert metrics["teacher_accuracy"] == 0.5  # 0 and 2
    assert metrics["teacher_agreement"] == 0.5  # of the distillation head: 0 and 3
    assert metrics["train_accuracy"] == 0.5  # of the mean, which the larger head decides: 0 and 1
    assert not any(value.requires_grad for value in metrics.values())


def vit() -> Classifier:
    return Classifier(make_backbone(num_prefix=2), TokenReadout(DIM, num_vectors=2), num_classes=CLASSES)


def cait() -> Classifier:
    backbone = make_backbone(num_prefix=0, attention="talking_heads", layer_scale=0.1)
    readout = ClassAttentionReadout(DIM, HEADS, depth=1, num_vectors=2, layer_scale=0.1)
    return Classifier(backbone, readout, num_classes=CLASSES)


@pytest.mark.parametrize("create", [vit, cait])
def test_both_architectures_learn_through_a_token(create) -> None:
    student: nn.Module = create()
    objective = Distillation(student, loss=cross_entropy, teacher_loss=hard_loss, weight=0.5, through="token")
    initialize(objective, "vit")
    student.reset_heads()
    images, targets, teacher = random_images(6), soft_targets(6), torch.randn(6, CLASSES)
    inputs = LabelledInputs(images, targets, teacher)
    logits = student(images)
    by_hand = (cross_entropy(logits[:, 0], targets) + F.cross_entropy(logits[:, 1], teacher.argmax(1))) / 2
    torch.testing.assert_close(objective(inputs, PROGRESS).loss, by_hand)
    losses = train_steps_of(objective, inputs)
    assert losses[-1] < losses[0]
