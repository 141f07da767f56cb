"""Whether a classifier is right as often as it says."""

import torch
from torch import Tensor

__all__ = ["expected_calibration_error"]


def expected_calibration_error(confidence: Tensor, is_right: Tensor, *, bins: int = 15) -> float:
    """Mean distance of accuracy and confidence over bins of equal width (Guo et al., arXiv:1706.04599).

    Bin m of M holds the confidences in ((m - 1) / M, m / M] and counts by its number of samples.

    Args:
        confidence: [n], probability of the class that was chosen.
        is_right: bool [n].
        bins: M; the paper's 15.

    Returns: in [0, 1].
    """
    confidence = confidence.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    number = torch.bucketize(confidence, edges[1:-1])  # above the edge before, up to the edge after
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, is_right.double() - confidence)
    return float(gap.abs().sum() / len(confidence))
