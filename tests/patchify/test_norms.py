"""Batch norm over tokens; `main` below is what torchrun starts."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from mpm import distributed
from mpm.patchify.norms import TokenBatchNorm
from tests.networks import randomize


def _pair() -> tuple[TokenBatchNorm, nn.BatchNorm2d]:
    ours, theirs = randomize(TokenBatchNorm(6)), nn.BatchNorm2d(6)
    theirs.load_state_dict(ours.state_dict())  # the names are the same
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
def test_it_equals_batch_norm_2d(training: bool) -> None:
    ours, theirs = _pair()
    for norm in (ours, theirs):
        norm.train(training)
    for _ in range(3):
        images = torch.randn(4, 6, 5, 3, requires_grad=True)
        tokens = images.detach().permute(0, 2, 3, 1).flatten(1, 2).requires_grad_()  # [B,N,F]
        expected, found = theirs(images), ours(tokens)
        torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).flatten(1, 2), rtol=1e-5, atol=1e-5)
        expected.square().sum().backward()
        found.square().sum().backward()
        torch.testing.assert_close(
            tokens.grad, images.grad.permute(0, 2, 3, 1).flatten(1, 2), rtol=1e-4, atol=1e-4
        )  # sums of 60 squares in another order
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-4)


def test_statistics_are_computed_in_float32() -> None:
    ours, reference = TokenBatchNorm(6), TokenBatchNorm(6)
    x = (10 + torch.randn(512, 6)).bfloat16()
    assert ours(x).dtype == torch.bfloat16
    reference(x.float())
    torch.testing.assert_close(ours.running_mean, reference.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var, reference.running_var, rtol=1e-5, atol=1e-6)


def _step(norm: TokenBatchNorm, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * weight).square().sum().backward()
    return y, x.grad, [norm.weight.grad, norm.bias.grad]


def main() -> None:
    """Uneven shares of one batch, in every type the network runs in."""
    distributed.start("cpu")
    torch.manual_seed(0)
    one, whole = randomize(TokenBatchNorm(6).double()), torch.randn(7, 3, 6, dtype=torch.float64) + 5
    weight = torch.randn(7, 3, 6, dtype=torch.float64)
    many = copy.deepcopy(one)
    share = slice(0, 2) if distributed.rank() == 0 else slice(2, 7)
    # what one process would compute: torch's own batch norm
    reference = nn.BatchNorm1d(6).double()
    reference.load_state_dict(one.state_dict())
    x = whole.clone().requires_grad_()
    expected = reference(x.reshape(21, 6)).reshape(7, 3, 6)
    (expected * weight).square().sum().backward()

    y, gradient, parameters = _step(many, whole[share], weight[share])
    torch.testing.assert_close(y, expected[share], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, x.grad[share], rtol=1e-9, atol=1e-9)
    for found, theirs in zip(parameters, (reference.weight.grad, reference.bias.grad), strict=True):
        torch.testing.assert_close(distributed.sum_over_ranks(found), theirs, rtol=1e-9, atol=1e-9)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(many.state_dict()[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    assert many.float()(whole[share].bfloat16()).dtype == torch.bfloat16
    distributed.stop()


@pytest.mark.torchrun
def test_two_processes_equal_one() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "-m", "tests.patchify.test_norms"],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


if __name__ == "__main__":
    main()
