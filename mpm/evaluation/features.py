"""Features of a data set, and what they say without labels."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpm import distributed


class Features(NamedTuple):
    """Features of a data set in its order, on the CPU.

    Attributes:
        features: float32 [n,D].
        labels: int64 [n].
    """

    features: Tensor
    labels: Tensor


@torch.no_grad()
def extract(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[Sequence[Any]],
    *,
    device: torch.device | str = "cpu",
    limit: int | None = None,
) -> Features:
    """Encode the batches of all processes; each gets the features of all.

    Args:
        encode: images on `device` -> [B,D]. Train or eval mode is the caller's business.
        batches: this process's share, each batch starting with (images, labels int64 [B]). Samples are dealt
            to the processes in turn: the i-th of rank r is number `i * world + r`, as `eval_loader` has it.
        device: where `encode` works.
        limit: only the first so many samples of the data set.

    Raises:
        ValueError: if there is no sample.
    """
    rank, world = distributed.rank(), distributed.world_size()
    left = None if limit is None else max(0, -((rank - limit) // world))  # this rank's share of the limit
    features, labels = [], []
    for images, targets, *_ in batches:
        if left == 0:
            break
        features.append(encode(images.to(device, non_blocking=True)).float().cpu()[:left])
        labels.append(targets.cpu()[:left])
        left = None if left is None else left - len(labels[-1])
    width = max(distributed.gather_objects(features[0].shape[1] if features else 0))
    if width == 0:
        raise ValueError("no images to compute features of; look at the data's folder, split or limit")
    own = torch.cat([torch.empty(0, width), *features])
    own_labels = torch.cat([torch.empty(0, dtype=torch.int64), *labels])
    order = distributed.gather_rows(torch.arange(len(own)) * world + rank).argsort()
    return Features(distributed.gather_rows(own)[order], distributed.gather_rows(own_labels)[order])


def rank_me(features: Tensor) -> float:
    """Effective rank of features: exp of the entropy of their singular values (RankMe, arXiv:2210.02885).

    Args:
        features: [n,D], n >= D for a value that does not depend on n.

    Returns: between 1 (all features point one way: collapse) and min(n, D).
    """
    singular = torch.linalg.svdvals(features.double())
    p = singular / singular.sum() + 1e-7  # the paper's epsilon for fp32
    return float((-p * p.log()).sum().exp())


def feature_std(features: Tensor) -> float:
    """Deviation over samples of l2-normalised features [n,D], mean over dimensions.

    `1 / sqrt(D)` for directions spread evenly, 0 where all samples share one (SimSiam, arXiv:2011.10566).
    """
    return float(F.normalize(features, dim=1).std(0).mean())
