"""Class token and distillation token: what the head of each knows, and how alike the two are (DeiT)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mpm import distributed
from mpm.backbones.classifier import Classifier
from mpm.backbones.readouts import ClassAttentionReadout
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.patchify.pixels import Normalize, to_unit

__all__ = ["Heads", "compare_heads"]

_AT_ONCE = 64  # images; the outputs of all layers are held


class Heads(NamedTuple):
    """Of a classifier with two heads, over the images of all processes.

    Attributes:
        top1: of the class head, the distillation head and both, by name.
        cosine: between the two tokens, means over images: "tokens" are the parameters that they start as,
            "layer_1", ... what the blocks that change them leave, before any norm, "pooled" what the heads
            read.
    """

    top1: dict[str, float]
    cosine: dict[str, float]


@torch.no_grad()
def compare_heads(
    network: Classifier | TimmClassifier,
    batches: Iterable[Any],
    normalize: Normalize,
) -> Heads | None:
    """Look at labelled images, in eval mode and float32; None: there is one head.

    Args:
        network: on the device of `normalize`.
        batches: this process's share, each batch starting with (images, labels int64 [B]).
        normalize: of the network.
    """
    if not isinstance(network, Classifier) or network.readout.num_vectors != 2:
        return None
    device = normalize.mean.device
    was_training = network.training
    network.eval()
    right = torch.zeros(3, dtype=torch.float64, device=device)
    cosines = torch.zeros(_depth(network) + 1, dtype=torch.float64, device=device)
    seen = 0
    for images, labels, *_ in batches:
        for some, theirs in zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
            tokens, logits = _look(network, normalize(to_unit(some, device)))
            scores = torch.cat([logits, logits.mean(1, keepdim=True)], dim=1)  # [B,3,L]
            right += (scores.argmax(2) == theirs.to(device)[:, None]).sum(0)
            cosines += torch.stack([_cosine(pair).sum() for pair in tokens])
        seen += len(images)
    network.train(was_training)
    count = distributed.sum_over_ranks(torch.tensor(float(seen), dtype=torch.float64)).item()
    right, cosines = distributed.sum_over_ranks(right) / count, distributed.sum_over_ranks(cosines) / count
    *layers, pooled = cosines.tolist()
    return Heads(
        top1=dict(zip(("class", "distillation", "both"), right.tolist(), strict=True)),
        cosine={
            "tokens": _cosine(_parameters(network)[None]).item(),
            **{f"layer_{number}": value for number, value in enumerate(layers, start=1)},
            "pooled": pooled,
        },
    )


def _look(network: Classifier, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Both tokens [B,2,D] after each layer and as pooled; logits [B,2,L]."""
    backbone, readout = network.backbone, network.readout
    if isinstance(readout, ClassAttentionReadout):
        encoded = backbone(images)
        tokens = readout.layers(encoded)
    else:
        encoded = backbone.encode(backbone.embed(images), layers=range(backbone.depth))
        tokens = [layer[:, :2] for layer in encoded.layers]
    vectors = readout(encoded)
    return [*tokens, vectors], network.classify(vectors)


def _depth(network: Classifier) -> int:
    """Blocks that change the two tokens."""
    readout = network.readout
    return len(readout.blocks) if isinstance(readout, ClassAttentionReadout) else network.backbone.depth


def _parameters(network: Classifier) -> Tensor:
    """What the two tokens start as, [2,D]."""
    readout = network.readout
    if isinstance(readout, ClassAttentionReadout):
        return readout.tokens
    prefix = network.backbone.prefix_tokens
    assert prefix is not None
    return prefix[:2]


def _cosine(pair: Tensor) -> Tensor:
    """[B,2,D] -> float64 [B]."""
    return F.cosine_similarity(pair[:, 0].double(), pair[:, 1].double(), dim=1)
