"""Losses of predicted patches."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

__all__ = ["PatchLossKind", "patch_loss"]

PatchLossKind = Literal["l1", "l2", "smooth_l1", "cross_entropy"]


def patch_loss(predictions: Tensor, targets: Tensor, *, kind: PatchLossKind) -> Tensor:
    """The loss of each masked patch, in float32.

    Args:
        predictions: [...,M,F].
        targets: [...,M,F], of the same shape; for cross-entropy codes int64 [...,M].
        kind: absolute (SimMIM), squared (MAE) or Huber error with threshold 1, averaged over F, or the
            cross-entropy of logits in nats (BEiT).

    Returns: [...,M].
    """
    if kind == "cross_entropy":
        logits = predictions.flatten(0, -2).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="none").reshape(targets.shape)
    predictions = predictions.to(targets.dtype)
    match kind:
        case "l1":
            loss = F.l1_loss(predictions, targets, reduction="none")
        case "l2":
            loss = F.mse_loss(predictions, targets, reduction="none")
        case "smooth_l1":
            loss = F.smooth_l1_loss(predictions, targets, reduction="none")
    return loss.mean(-1)
