import pytest
import torch

from mpm.objectives.losses import patch_loss

BY_HAND = {
    "l1": abs,
    "l2": lambda e: e * e,
    "smooth_l1": lambda e: e * e / 2 if abs(e) < 1 else abs(e) - 0.5,
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_patch_loss_equals_a_loop(kind) -> None:
    predictions, targets = 2 * torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    errors = (predictions - targets).reshape(24, 5).tolist()
    expected = torch.tensor([sum(map(BY_HAND[kind], row)) / 5 for row in errors]).reshape(2, 3, 4)
    torch.testing.assert_close(patch_loss(predictions, targets, kind=kind), expected)


@pytest.mark.parametrize("kind", BY_HAND)
def test_patch_loss_is_in_float32(kind) -> None:
    predictions = torch.randn(2, 4, 5).bfloat16().requires_grad_()
    targets = torch.randn(2, 4, 5)
    loss = patch_loss(predictions, targets, kind=kind)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, patch_loss(predictions.float(), targets, kind=kind))
    loss.sum().backward()
    assert predictions.grad.dtype == torch.bfloat16
