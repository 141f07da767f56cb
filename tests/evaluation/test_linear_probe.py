import logging

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mpm.evaluation.linear_probe import fit_logistic_regression


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(3, (80,))
    features = 3 * torch.randn(3, 6)[labels] + torch.randn(80, 6) * torch.tensor([1, 2, 5, 1, 0.1, 0]) + 4
    return features, labels


@pytest.mark.parametrize("l2", [0.1, 10.0])
@pytest.mark.parametrize("standardize", [False, True])
def test_optimum_equals_sklearn(data, l2: float, standardize: bool) -> None:
    features, labels = data
    inputs = StandardScaler().fit_transform(features) if standardize else features.double().numpy()
    oracle = LogisticRegression(C=1 / l2, tol=1e-6, max_iter=10_000).fit(inputs, labels)
    probe = fit_logistic_regression(features, labels, num_classes=3, l2=l2, standardize=standardize)
    found = probe.predict(features).softmax(1)
    np.testing.assert_allclose(found, oracle.predict_proba(inputs), atol=1e-4)  # two stopping rules


def test_a_class_without_samples_is_never_predicted(data) -> None:
    features, labels = data
    probe = fit_logistic_regression(features, labels, num_classes=5)
    assert probe.weight.shape == (5, 6)
    assert probe.predict(features).argmax(1).max() < 3


def test_stopping_early_is_said(data, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        fit_logistic_regression(*data, num_classes=3, max_iter=2)
    assert "stopped early after 2 iterations" in caplog.text


def test_a_start_changes_no_minimum(data) -> None:
    features, labels = data
    cold = fit_logistic_regression(features, labels, num_classes=3, l2=0.1)
    strong = fit_logistic_regression(features, labels, num_classes=3, l2=10.0)
    warm = fit_logistic_regression(features, labels, num_classes=3, l2=0.1, start=strong)
    found, expected = (probe.predict(features).softmax(1) for probe in (warm, cold))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # two ways to the minimum
    begun = fit_logistic_regression(features, labels, num_classes=3, l2=10.0, start=strong, max_iter=1)
    torch.testing.assert_close(begun.weight, strong.weight, atol=1e-4, rtol=0)


def test_l2_must_be_positive(data) -> None:
    with pytest.raises(ValueError, match="l2 0"):
        fit_logistic_regression(*data, num_classes=3, l2=0)
