import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpm.evaluation import knn
from mpm.evaluation.knn import knn_accuracy, knn_predict


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    centres = torch.randn(4, 8)
    labels, bank_labels = torch.randint(4, (30,)), torch.randint(4, (50,))
    # the last queries are of class 3 and random: not all are easy
    return (
        centres[labels] + torch.randn(30, 8),
        labels,
        centres[bank_labels] + torch.randn(50, 8),
        bank_labels,
    )


def test_scores_equal_a_loop(features) -> None:
    queries, _, bank, bank_labels = features
    expected = np.zeros((30, 4))
    for i, query in enumerate(queries.double().numpy()):
        similarity = [query @ b / np.linalg.norm(query) / np.linalg.norm(b) for b in bank.double().numpy()]
        for j in sorted(range(50), key=lambda j: -similarity[j])[:5]:
            expected[i, bank_labels[j]] += np.exp(similarity[j] / 0.07)
    expected /= expected.sum(1, keepdims=True)
    found = knn_predict(queries, bank, bank_labels, k=5, num_classes=4)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # fp32 similarities, divided by 0.07


@pytest.mark.slow  # the import takes 3 s
def test_predictions_equal_lightly(features) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainer it imports
        from lightly.utils.benchmarking import knn_predict as lightly_predict
    queries, labels, bank, bank_labels = features
    unit_queries, unit_bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    expected = lightly_predict(unit_queries, unit_bank.T, bank_labels, 4, knn_k=20, knn_t=0.1)[:, 0]
    settings = {"k": 20, "temperature": 0.1, "num_classes": 4}
    assert torch.equal(knn_predict(queries, bank, bank_labels, **settings).argmax(1), expected)
    accuracy = knn_accuracy(queries, labels, bank, bank_labels, **settings)
    assert accuracy == pytest.approx(float((expected == labels).float().mean()))


def test_chunks_do_not_change_scores(features, monkeypatch) -> None:
    queries, _, bank, bank_labels = features
    whole = knn_predict(queries, bank, bank_labels, num_classes=4)
    monkeypatch.setattr(knn, "_SIMILARITIES", 7 * 50)
    torch.testing.assert_close(knn_predict(queries, bank, bank_labels, num_classes=4), whole)


@pytest.mark.parametrize("k", [0, 51])
def test_k_must_fit_the_bank(features, k: int) -> None:
    queries, _, bank, bank_labels = features
    with pytest.raises(ValueError, match=f"k {k} is not between 1 and the 50"):
        knn_predict(queries, bank, bank_labels, k=k, num_classes=4)
