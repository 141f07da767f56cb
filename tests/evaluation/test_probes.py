import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mpm.evaluation.features import Features
from mpm.evaluation.probes import PENALTIES, held_out_folds, knn_score, linear_score


def _clusters(count: int, spread: float, *, classes: int = 3, dim: int = 6, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.eye(dim)[:classes]
    labels = torch.arange(count) % classes
    return Features(centres[labels] + spread * torch.randn(count, dim, generator=generator), labels)


@pytest.mark.parametrize(("count", "folds"), [(50, 5), (1000, 5), (1025, 1)])
def test_a_fifth_of_each_class_is_held_out(count: int, folds: int) -> None:
    labels = torch.arange(count) % 5
    found = held_out_folds(labels, seed=0)
    assert len(found) == folds
    for held_out in found:
        assert labels[held_out].bincount().tolist() == [count // 25] * 5
    if folds == 5:
        assert torch.stack(found).sum(0).eq(1).all()  # each sample once
    assert not torch.equal(found[0], held_out_folds(labels, seed=1)[0])


def test_a_lone_sample_stays_in_training() -> None:
    found = held_out_folds(torch.tensor([0, 1, 1, 2]), seed=0)
    assert sum(found).tolist() == [0, 1, 1, 0]
    assert all(held_out.sum() == 1 for held_out in found)
    assert held_out_folds(torch.tensor([2, 0, 1]), seed=0) == []


def test_separable_features_are_told_apart() -> None:
    train, test = _clusters(60, 0.1), _clusters(30, 0.1, seed=1)
    folds = held_out_folds(train.labels, seed=0)
    assert knn_score(train, test, folds, k=20, num_classes=3)[:2] == (1.0, 1.0)
    assert linear_score(train, test, folds, num_classes=3)[:2] == (1.0, 1.0)


def _nearest(bank: Features, queries: Tensor, k: int) -> list[int]:
    """k-NN of a loop, weights exp(cosine / 0.07)."""
    said = []
    for query in queries.double().numpy():
        votes = np.zeros(3)
        near = [
            (query @ b / np.linalg.norm(query) / np.linalg.norm(b), int(label))
            for b, label in zip(bank.features.double().numpy(), bank.labels, strict=True)
        ]
        for similarity, label in sorted(near)[-k:]:
            votes[label] += np.exp(similarity / 0.07)
        said.append(int(votes.argmax()))
    return said


@pytest.mark.parametrize("k", [5, 100])
def test_knn_equals_a_loop(k: int) -> None:
    train, test = _clusters(30, 2.0), _clusters(40, 2.0, seed=1)
    folds = held_out_folds(train.labels, seed=0)
    found = knn_score(train, test, folds, k=k, num_classes=3)
    right = np.array(_nearest(train, test.features, k)) == test.labels.numpy()
    assert found.test == right.mean()
    hits = [
        said == int(label)
        for fold in folds
        for said, label in zip(
            _nearest(Features(train.features[~fold], train.labels[~fold]), train.features[fold], k),
            train.labels[fold],
            strict=True,
        )
    ]
    assert found.held_out == np.mean(hits)


def test_the_penalty_is_the_best_on_held_out_features() -> None:
    train, test = _clusters(40, 2.5, dim=30), _clusters(200, 2.5, dim=30, seed=1)
    folds = held_out_folds(train.labels, seed=0)

    def scores(l2: float, parts: list[tuple[Features, Features]]) -> float:
        hits, count = 0.0, 0
        for fitted, asked in parts:
            scaler = StandardScaler().fit(fitted.features)
            oracle = LogisticRegression(C=1 / l2, tol=1e-6, max_iter=10_000)
            oracle.fit(scaler.transform(fitted.features), fitted.labels)
            hits += oracle.score(scaler.transform(asked.features), asked.labels) * len(asked.labels)
            count += len(asked.labels)
        return hits / count

    def part(rows: Tensor) -> Features:
        return Features(train.features[rows], train.labels[rows])

    held_out = {l2: scores(l2, [(part(~fold), part(fold)) for fold in folds]) for l2 in PENALTIES}
    best = max(PENALTIES, key=lambda l2: held_out[l2])  # the first of equal ones
    assert len(set(held_out.values())) > 2
    found = linear_score(train, test, folds, num_classes=3)
    assert found.setting == best
    assert found.held_out == pytest.approx(held_out[best])
    assert found.test == pytest.approx(scores(best, [(train, test)]))


def test_test_labels_choose_nothing() -> None:
    train, test = _clusters(40, 2.0), _clusters(40, 2.0, seed=1)
    folds = held_out_folds(train.labels, seed=0)
    found = linear_score(train, test, folds, num_classes=3)
    wrong = linear_score(train, Features(test.features, (test.labels + 1) % 3), folds, num_classes=3)
    assert (found.held_out, found.setting) == (wrong.held_out, wrong.setting)
    assert found.test > wrong.test


def test_one_label_a_class_is_enough_for_a_test_score() -> None:
    train, test = _clusters(3, 0.1, dim=3), _clusters(30, 0.1, dim=3, seed=1)
    assert linear_score(train, test, [], num_classes=3) == (None, 1.0, 1.0)
    assert knn_score(train, test, [], k=20, num_classes=3) == (None, 1.0, None)
