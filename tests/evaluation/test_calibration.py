import pytest
import torch

from mpm.evaluation.calibration import expected_calibration_error


def by_hand(confidence: list[float], is_right: list[bool], bins: int) -> float:
    """Bin by bin, as the paper writes it (arXiv:1706.04599, equation 3)."""
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins]
        if inside:
            accuracy = sum(is_right[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(accuracy - mean)
    return error


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_error_equals_a_loop(bins: int) -> None:
    confidence = torch.rand(200).sqrt()
    confidence[:4] = torch.tensor([1.0, 0.25, 0.5, 0.75])  # the upper edge belongs to a bin
    is_right = torch.rand(200) < confidence**2
    found = expected_calibration_error(confidence, is_right, bins=bins)
    assert found == pytest.approx(by_hand(confidence.tolist(), is_right.tolist(), bins))


def test_who_is_always_sure_and_right_half_of_the_time_is_off_by_half() -> None:
    assert expected_calibration_error(torch.ones(10), torch.arange(10) < 5) == 0.5
    assert expected_calibration_error(torch.full((10,), 0.5), torch.arange(10) < 5) == 0.0


def test_an_edge_belongs_to_the_bin_below() -> None:
    """Together in one bin, too low and too high would cancel."""
    confidence, is_right = torch.tensor([0.5, 0.6]), torch.tensor([True, False])
    assert expected_calibration_error(confidence, is_right, bins=2) == pytest.approx((0.5 + 0.6) / 2)
