import math

import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from mpm.backbones.classifier import Classifier
from mpm.backbones.initialization import initialize
from mpm.backbones.readouts import MeanReadout, TokenReadout
from mpm.objectives.supervised import Classification, LabelledInputs, binary_cross_entropy, cross_entropy
from tests.networks import DIM, STEMS, make_backbone, random_images, train_steps_of

CLASSES = 5
PROGRESS = torch.tensor(0.0)
READOUTS = {"token": TokenReadout, "mean": MeanReadout}


def soft_targets(batch: int = 4) -> Tensor:
    return torch.randn(batch, CLASSES).softmax(1)


class Fixed(nn.Module):
    """A classifier that gives the logits it is made of."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def test_cross_entropy_equals_a_loop_and_timm() -> None:
    logits, targets = torch.randn(4, CLASSES), soft_targets()
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(x) for x in row))
        total += sum(t * (normaliser - x) for x, t in zip(row, target, strict=True)) / 4
    assert cross_entropy(logits, targets).item() == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets))


def test_binary_cross_entropy_makes_every_class_of_a_mix_present() -> None:
    logits = torch.randn(2, CLASSES)
    mixed = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 1.0, 0, 0]])
    present = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 0, 0]])
    by_hand = -(present * logits.sigmoid().log() + (1 - present) * (-logits).sigmoid().log()).mean()
    torch.testing.assert_close(binary_cross_entropy(logits, mixed), by_hand)
    theirs = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    torch.testing.assert_close(binary_cross_entropy(logits, mixed), theirs(logits, mixed))


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_every_head_learns_the_targets(loss) -> None:
    logits, targets = torch.randn(4, 2, CLASSES), soft_targets()
    output = Classification(Fixed(logits), loss=loss)(LabelledInputs(random_images(4), targets), PROGRESS)
    expected = (loss(logits[:, 0], targets) + loss(logits[:, 1], targets)) / 2
    torch.testing.assert_close(output.loss.detach(), expected)


def test_training_accuracy_is_of_the_mean_over_heads() -> None:
    logits = torch.zeros(4, 2, CLASSES)
    logits[:, 0, 1], logits[:, 1, 2] = 1.0, 3.0  # the mean says 2
    targets = torch.eye(CLASSES)[[2, 2, 1, 2]]
    output = Classification(Fixed(logits), loss=cross_entropy)(
        LabelledInputs(random_images(4), targets), PROGRESS
    )
    assert output.metrics["train_accuracy"].item() == 0.75
    assert not output.metrics["train_accuracy"].requires_grad


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("stem", STEMS)
def test_every_combination_learns_and_every_parameter_gets_a_gradient(stem: str, readout: str) -> None:
    backbone = make_backbone(stem, relative_bias="per_block", layer_scale=0.1, drop_path=0.0)
    classifier = Classifier(backbone, READOUTS[readout](DIM), num_classes=CLASSES)
    objective = Classification(classifier, loss=cross_entropy)
    initialize(objective, "vit")
    classifier.reset_heads()
    losses = train_steps_of(objective, LabelledInputs(random_images(6), soft_targets(6)))
    assert losses[0] == pytest.approx(math.log(CLASSES), abs=0.1)
    assert losses[-1] < losses[0]


def test_the_loss_is_in_float32_under_autocast() -> None:
    classifier = Classifier(make_backbone(), TokenReadout(DIM), num_classes=CLASSES)
    initialize(classifier, "vit")
    with torch.autocast("cpu", torch.bfloat16):
        output = Classification(classifier, loss=cross_entropy)(
            LabelledInputs(random_images(4), soft_targets()), PROGRESS
        )
    assert output.loss.dtype == torch.float32
