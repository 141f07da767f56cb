"""Probes of frozen features under one protocol: settings are chosen on held-out training features.

What a probe has to choose, and which layer is best, is decided on training features that it has not seen;
then it is fitted to all of them and scored on the test features, once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpm.evaluation.features import Features
from mpm.evaluation.knn import knn_predict
from mpm.evaluation.linear_probe import LinearProbe, fit_logistic_regression

__all__ = ["PENALTIES", "Score", "held_out_folds", "knn_score", "linear_score"]

PENALTIES = tuple(10.0**power for power in range(4, -3, -1))  # of the linear probe, strongest first
_USUAL_PENALTY = 1.0  # where no label can be held out; scikit-learn's
_PATIENCE = 2  # weaker penalties without a better score, then the rest is not tried: they take longest
_TOLERANCE = 1e-6  # accuracies no longer change; the exact minimum takes twice the time
_FOLDS = 5
_FEW = 1000  # labels of which a fifth is too few to choose by


class Score(NamedTuple):
    """Accuracy of a probe, in [0, 1].

    Attributes:
        held_out: on held-out training features; None: there were too few labels to hold any out.
        test: on the test features, of the probe fitted to all training features.
        setting: what was chosen: the penalty of the linear probe, the rate of the attentive one.
    """

    held_out: float | None
    test: float
    setting: float | None = None


def held_out_folds(labels: Tensor, *, seed: int) -> list[Tensor]:
    """Which samples are held out: a fifth of each class; of 1,000 at most, each fifth in turn.

    A class with one sample keeps it; where no class has two, nothing can be held out.

    Args:
        labels: int64 [n].
        seed: of the choice.

    Returns: bool [n] for each fold.
    """
    rng = np.random.default_rng(seed)
    fold = np.full(len(labels), -1)
    dealt = 0
    for number in labels.unique():
        own = rng.permutation(np.flatnonzero(labels == number))
        if len(own) > 1:
            fold[own] = (dealt + np.arange(len(own))) % _FOLDS
            dealt += len(own)
    folds = [torch.from_numpy(fold == number) for number in range(_FOLDS if len(labels) <= _FEW else 1)]
    return [held_out for held_out in folds if held_out.any()]


def knn_score(train: Features, test: Features, folds: Sequence[Tensor], *, k: int, num_classes: int) -> Score:
    """Of k-NN; with fewer labels than k, all of them vote.

    Args:
        train: features [n,D] with labels.
        test: likewise.
        folds: what is held out, bool [n] each.
        k: neighbours.
        num_classes: L.
    """

    def hits(bank: Features, queries: Features) -> int:
        scores = knn_predict(
            queries.features,
            bank.features,
            bank.labels,
            k=min(k, len(bank.labels)),
            num_classes=num_classes,
        )
        return int((scores.argmax(1) == queries.labels).sum())

    held_out = None
    if folds:
        right = sum(hits(_part(train, ~fold), _part(train, fold)) for fold in folds)
        held_out = right / sum(int(fold.sum()) for fold in folds)
    return Score(held_out, hits(train, test) / len(test.labels))


def linear_score(train: Features, test: Features, folds: Sequence[Tensor], *, num_classes: int) -> Score:
    """Of logistic regression on standardised features; its penalty is one of `PENALTIES`.

    Of equal ones the strongest is taken. Arguments as in `knn_score`.
    """
    chosen, best = _USUAL_PENALTY, None
    if folds:
        parts = [(_part(train, ~fold), _part(train, fold)) for fold in folds]
        probes: list[LinearProbe | None] = [None] * len(parts)
        count = sum(len(held_out.labels) for _, held_out in parts)
        behind = 0
        for l2 in PENALTIES:
            probes = [
                _fit(fitted, l2, num_classes, start=probe)
                for (fitted, _), probe in zip(parts, probes, strict=True)
            ]
            right = sum(_hits(probe, part) for probe, (_, part) in zip(probes, parts, strict=True))
            if best is None or right / count > best:
                chosen, best, behind = l2, right / count, 0
            elif (behind := behind + 1) == _PATIENCE:
                break
    return Score(best, _hits(_fit(train, chosen, num_classes), test) / len(test.labels), chosen)


def _fit(data: Features, l2: float, num_classes: int, *, start: LinearProbe | None = None) -> LinearProbe:
    return fit_logistic_regression(
        data.features, data.labels, num_classes=num_classes, l2=l2, tolerance=_TOLERANCE, start=start
    )


def _hits(probe: LinearProbe | None, data: Features) -> int:
    assert probe is not None
    return int((probe.predict(data.features).argmax(1) == data.labels).sum())


def _part(data: Features, rows: Tensor) -> Features:
    rows = rows.to(data.labels.device)
    return Features(data.features[rows], data.labels[rows])
