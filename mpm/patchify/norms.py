"""Batch normalisation over tokens whose statistics are reduced over processes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm import distributed

__all__ = ["TokenBatchNorm", "recalibrate"]


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis, over all others and over all processes.

    As `torch.nn.SyncBatchNorm`, which has no CPU path; arguments and names of the state are `BatchNorm1d`'s.
    Statistics are computed in float32.

    Shapes: [...,F] -> [...,F].
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the statistics of the batch in train mode, with the running ones in eval mode."""
        flat = x.reshape(-1, x.shape[-1])
        if self.training and distributed.world_size() > 1:
            return self._normalize_over_ranks(flat).reshape(x.shape)
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            flat,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return y.reshape(x.shape)

    def _normalize_over_ranks(self, flat: Tensor) -> Tensor:
        wide = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
        ones = wide.new_full((1,), float(len(wide)))
        total = distributed.differentiable_sum(torch.cat([wide.sum(0), ones]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        # a second reduction, rather than E[x^2] - mean^2, keeps one process equal to many in float32
        variance = distributed.differentiable_sum((wide - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        y = (wide - mean) * torch.rsqrt(variance + self.eps)
        if self.affine:
            y = y * self.weight + self.bias
        return y.to(flat.dtype)


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set running statistics to the mean over some batches; does nothing without batch norm.

    Args:
        module: called with each batch.
        batches: its inputs.
    """
    norms = [part for part in module.modules() if isinstance(part, TokenBatchNorm)]
    if not norms:
        return
    modes, momenta = [norm.training for norm in norms], [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
    for count, batch in enumerate(batches, start=1):
        for norm in norms:
            norm.momentum = 1 / count  # the first batch replaces, the n-th joins with its share
        module(batch)
    for norm, mode, momentum in zip(norms, modes, momenta, strict=True):
        norm.train(mode)
        norm.momentum = momentum
