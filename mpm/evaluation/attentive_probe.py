"""A learned query that attends over frozen patch tokens, and a linear classifier of what it reads.

The probe of AIM (arXiv:2401.08541) and CAPI (arXiv:2502.08769): where information is spread over
the patches, as after masked pretraining, their mean loses some of it. Many probes learn side by side from one
pass over the tokens, one for each layer and rate, as in CAPI's evaluation.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpm.evaluation.probes import Score

__all__ = ["RATES", "AttentiveProbe", "TokenSource", "attentive_scores"]

log = logging.getLogger(__name__)

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
_USUAL_RATE = 1e-2  # where no label can be held out
_BATCH = 256
_EPOCHS, _LEAST_STEPS = 10, 300
_WARMUP = 0.1  # share of the steps
_WEIGHT_DECAY = 1e-2


class TokenSource(Protocol):
    """Patch tokens of labelled images, of several layers at a time.

    Attributes:
        labels: int64 [n], on the CPU.
    """

    labels: Tensor

    def batches(self, orders: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each int64 [B] of rows: tokens [B,layers,T,D] float32 and labels [B], where probes learn."""
        ...


class AttentiveProbe(nn.Module):
    """One query, h heads, no output projection, then a linear classifier.

    A query that does not depend on the image needs no keys of the tokens: `q . (K x) = (K^T q) . x`, and a
    weighted mean of values is the value of the weighted mean. So an image costs 2 T D h products instead of
    2 T D^2, and the outcome is that of multi-head attention. Biases of keys cancel in the softmax, those of
    values are the classifier's.

    Args:
        dim: width of the tokens.
        num_heads: h.
        num_classes: L.
        generator: of the start values (normal, deviation 0.02, as in CAPI).
    """

    def __init__(self, dim: int, num_heads: int, num_classes: int, *, generator: torch.Generator):
        super().__init__()
        width = dim // num_heads

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(*shape, generator=generator))

        self.query = normal(num_heads, width)
        self.key = normal(num_heads, width, dim)
        self.value = normal(num_heads, width, dim)
        self.weight = normal(num_classes, dim)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,T,D] -> scores [B,L]."""
        scale = self.query.shape[1] ** -0.5
        asked = torch.einsum("hw,hwd->hd", self.query * scale, self.key)
        weights = (tokens @ asked.T).softmax(1)  # [B,T,h]
        read = weights.transpose(1, 2) @ tokens  # [B,h,D]
        values = torch.einsum("bhd,hwd->bhw", read, self.value).flatten(1)  # [B,D]
        return F.linear(values, self.weight, self.bias)


class _Probes(nn.Module):
    """Probes of every layer, several a layer, on tokens that batch norm standardises (AIM)."""

    def __init__(
        self, rates: Sequence[Sequence[float]], *, dim: int, num_heads: int, num_classes: int, seed: int
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rates = rates
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim, affine=False, eps=1e-6) for _ in rates)
        self.probes = nn.ModuleList(
            nn.ModuleList(AttentiveProbe(dim, num_heads, num_classes, generator=generator) for _ in own)
            for own in rates
        )

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """[B,layers,T,D] -> for each layer, scores [rates,B,L]."""
        scores = []
        for layer, norm, probes in zip(tokens.unbind(1), self.norms, self._by_layer(), strict=True):
            standard = norm(layer.flatten(0, 1)).view_as(layer)
            scores.append(torch.stack([probe(standard) for probe in probes]))
        return scores

    def _by_layer(self) -> Iterator[nn.ModuleList]:
        for probes in self.probes:
            assert isinstance(probes, nn.ModuleList)
            yield probes

    def groups(self) -> list[dict[str, object]]:
        """Parameters by rate, for the optimizer."""
        return [
            {"params": list(probe.parameters()), "lr": rate}
            for own, probes in zip(self.rates, self._by_layer(), strict=True)
            for rate, probe in zip(own, probes, strict=True)
        ]


def attentive_scores(
    train: TokenSource,
    test: TokenSource,
    rows: Tensor,
    folds: Sequence[Tensor],
    *,
    num_heads: int,
    num_classes: int,
    seed: int,
) -> list[Score]:
    """A score for each layer; the rate is one of `RATES`, of equal ones the lowest.

    AdamW, batches of 256, 10 epochs and at least 300 steps, rates that warm up and fall as a cosine.

    Args:
        train: tokens to learn from.
        test: tokens to be scored on.
        rows: int64 [n], those of the training images that are used.
        folds: of these, what is held out, bool [n] each.
        num_heads: of the probe's attention.
        num_classes: L.
        seed: of start values and order.
    """
    tokens, _ = next(train.batches([rows[:1]]))
    layers, dim, device = tokens.shape[1], tokens.shape[3], tokens.device

    def fitted(rates: Sequence[Sequence[float]], rows: Tensor, *, what: str) -> _Probes:
        log.info("attentive probes of %d layers learn from %d images: %s", layers, len(rows), what)
        probes = _Probes(rates, dim=dim, num_heads=num_heads, num_classes=num_classes, seed=seed)
        return _train(probes.to(device), train, rows, seed=seed)

    chosen = [_USUAL_RATE] * layers
    held_out: list[float | None] = [None] * layers
    if folds:
        right = sum(
            _hits(
                fitted([RATES] * layers, rows[~fold], what=f"to choose the rate, {number} of {len(folds)}"),
                train,
                rows[fold],
            )
            for number, fold in enumerate(folds, start=1)
        )
        assert isinstance(right, Tensor)  # [layers,rates]
        count = sum(int(fold.sum()) for fold in folds)
        held_out = [int(most) / count for most in right.amax(1)]
        chosen = [RATES[int(place)] for place in right.argmax(1)]
    final = fitted([(rate,) for rate in chosen], rows, what="to be tested")
    tested = _hits(final, test, torch.arange(len(test.labels)))[:, 0]
    return [
        Score(held, int(hits) / len(test.labels), rate)
        for held, hits, rate in zip(held_out, tested, chosen, strict=True)
    ]


def _train(probes: _Probes, tokens: TokenSource, rows: Tensor, *, seed: int) -> _Probes:
    steps = max(_EPOCHS * len(rows) // _BATCH, _LEAST_STEPS)
    optimizer = torch.optim.AdamW(probes.groups(), weight_decay=_WEIGHT_DECAY)

    def factor(step: int) -> float:
        warmup = _WARMUP * steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    probes.train()
    for batch, labels in tokens.batches(_orders(rows, steps, seed)):
        loss = torch.stack(
            [
                F.cross_entropy(scores, labels)  # a sum over probes: each gets the gradient of its own
                for own in probes(batch)
                for scores in own
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probes.eval()


def _orders(rows: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Rows of each step: epochs in random order, without their last, smaller batch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(_BATCH, len(rows))
    done = 0
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        for batch in order[: len(rows) // size * size].split(size):
            if done == steps:
                return
            yield batch
            done += 1


@torch.no_grad()
def _hits(probes: _Probes, tokens: TokenSource, rows: Tensor) -> Tensor:
    """Samples that each probe gets right, int64 [layers,rates] on the CPU."""
    right = torch.zeros(1, dtype=torch.int64)
    for batch, labels in tokens.batches(rows.split(_BATCH)):
        best = torch.stack([scores.argmax(2) for scores in probes(batch)])  # [layers,rates,B]
        right = right + (best == labels).sum(2).cpu()
    return right
