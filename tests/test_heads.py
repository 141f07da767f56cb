"""What is told of two heads and two tokens, against the networks' own outputs."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpm.backbones.classifier import Classifier
from mpm.backbones.readouts import MeanReadout
from mpm.heads import compare_heads
from mpm.patchify.pixels import Normalize
from tests.networks import DIM, make_backbone, randomize
from tests.objectives.test_distillation import CLASSES, cait, vit

NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def batches_of(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(4), labels.split(4), strict=True))


@pytest.mark.parametrize("create", [vit, cait])
def test_heads_and_tokens_are_compared(create) -> None:
    network = randomize(create()).train()
    images, labels = torch.rand(6, 3, 12, 16), torch.randint(CLASSES, (6,))
    heads = compare_heads(network, batches_of(images, labels), NORMALIZE)
    assert network.training
    logits = network.eval()(NORMALIZE(images))
    expected = {"class": logits[:, 0], "distillation": logits[:, 1], "both": logits.mean(1)}
    assert heads.top1 == pytest.approx(
        {name: (scores.argmax(1) == labels).float().mean().item() for name, scores in expected.items()}
    )
    vectors = network.vectors(NORMALIZE(images))
    pooled = F.cosine_similarity(vectors[:, 0], vectors[:, 1]).mean().item()
    assert heads.cosine["pooled"] == pytest.approx(pooled, abs=1e-5)
    last = max(name for name in heads.cosine if name.startswith("layer_"))
    assert last == ("layer_2" if create is vit else "layer_1")
    # undoing the readout's norm is not possible, so the last layer is normed here
    seen: list[Tensor] = []
    network.readout.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(NORMALIZE(images))
    before = F.cosine_similarity(seen[0][:, 0], seen[0][:, 1]).mean().item()
    assert heads.cosine[last] == pytest.approx(before, abs=1e-5)
    tokens = network.backbone.prefix_tokens if create is vit else network.readout.tokens
    assert heads.cosine["tokens"] == pytest.approx(F.cosine_similarity(*tokens, dim=0).item(), abs=1e-5)


def test_one_head_has_nothing_to_be_compared_with() -> None:
    network = Classifier(make_backbone(), MeanReadout(DIM), num_classes=CLASSES)
    assert compare_heads(network, [], NORMALIZE) is None
