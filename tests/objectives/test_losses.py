import math

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


def test_cross_entropy_equals_a_loop() -> None:
    logits, codes = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(5, (2, 3, 4))
    rows = zip(logits.reshape(24, 5).tolist(), codes.flatten().tolist(), strict=True)
    expected = [math.log(sum(map(math.exp, row))) - row[code] for row, code in rows]
    found = patch_loss(logits, codes, kind="cross_entropy")
    torch.testing.assert_close(found, torch.tensor(expected).reshape(2, 3, 4))


def test_cross_entropy_of_equal_logits_is_the_logarithm_of_their_number() -> None:
    found = patch_loss(
        torch.zeros(1, 2, 3, 8192).bfloat16(), torch.zeros(1, 2, 3, dtype=torch.int64), kind="cross_entropy"
    )
    torch.testing.assert_close(found, torch.full((1, 2, 3), math.log(8192)))
