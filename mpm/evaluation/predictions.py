"""What a classifier says about every image, gathered from all processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpm import distributed

__all__ = ["Predictions", "predict_all"]


class Predictions(NamedTuple):
    """One row an image, in the order of the images, on the CPU.

    Attributes:
        place: int64 [n], number of the image in its source.
        labels: int64 [n], true classes.
        best: int64 [n,K], the K = min(5, L) most probable classes, falling.
        confidence: float32 [n], probability of the first of them.
    """

    place: Tensor
    labels: Tensor
    best: Tensor
    confidence: Tensor

    @property
    def is_right(self) -> Tensor:
        """Whether the most probable class is the true one, bool [n]."""
        return self.best[:, 0] == self.labels


@torch.no_grad()
def predict_all(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[Sequence[Any]],
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Predictions:
    """The predictions for the batches of all processes; each gets the same.

    Args:
        logits_of: images on `device` -> logits [B,L]. Train or eval mode is the caller's business.
        batches: this process's share, each batch starting with (images, labels int64 [B], place int64 [B]).
            Shares may be uneven or empty: nothing is padded, so no image counts twice.
        num_classes: L.
        device: where `logits_of` works; what it gives stays there until the end.

    Raises:
        ValueError: a label outside [0, L).
    """
    K = min(5, num_classes)
    best = [torch.empty(0, K, dtype=torch.int64, device=device)]
    confidence = [torch.empty(0, device=device)]
    known = [torch.empty(0, 2, dtype=torch.int64)]  # place and label
    for images, labels, place, *_ in batches:
        if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            seen = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(
                f"labels {seen} do not fit {num_classes} classes; count the classes of the data anew"
            )
        logits = logits_of(images.to(device, non_blocking=True)).float()
        best.append(logits.topk(K).indices)  # of probabilities, some may round to 0
        confidence.append(logits.softmax(1).amax(1))
        known.append(torch.stack([place, labels], 1))
    places, truth = distributed.gather_rows(torch.cat(known)).unbind(1)
    order = places.argsort()
    return Predictions(
        places[order],
        truth[order],
        distributed.gather_rows(torch.cat(best).cpu())[order],
        distributed.gather_rows(torch.cat(confidence).cpu())[order],
    )
