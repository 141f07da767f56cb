import numpy as np
import pytest
import torch
from sklearn import metrics

from mpm.evaluation.accuracy import confusion_picture, evaluate, summarize
from mpm.evaluation.predictions import Predictions


def _random_scores(
    rng: np.random.Generator, count: int, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.from_numpy(rng.integers(num_classes, size=count))
    scores = torch.from_numpy(rng.normal(size=(count, num_classes)))
    scores[torch.arange(count), labels] += 1.0
    return scores, labels


def _evaluate(scores: torch.Tensor, labels: torch.Tensor, num_classes: int):
    place = torch.arange(len(labels))
    batches = zip(scores.split(7), labels.split(7), place.split(7), strict=True)  # scores stand for images
    return evaluate(lambda images: images, batches, num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [3, 12])
def test_scores_equal_sklearn(rng: np.random.Generator, num_classes: int) -> None:
    scores, labels = _random_scores(rng, 100, num_classes)
    found = _evaluate(scores, labels, num_classes)
    predicted = scores.argmax(1)
    assert found.count == 100
    assert found.top1 == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found.balanced == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    np.testing.assert_array_equal(found.confusion, metrics.confusion_matrix(labels, predicted))
    expected = metrics.precision_recall_fscore_support(labels, predicted)
    np.testing.assert_allclose(np.stack([found.precision, found.recall, found.f1]), expected[:3])
    if num_classes > 5:
        top5 = metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(num_classes))
        assert found.top5 == pytest.approx(top5)
    else:
        assert found.top5 == 1.0


def test_the_five_best_are_told_apart_where_their_probabilities_round_to_none() -> None:
    scores = torch.arange(8, 0, -1).float() * 40
    found = _evaluate(scores.expand(8, 8), torch.arange(8), 8)
    assert found.top1 == 1 / 8
    assert found.top5 == 5 / 8


def test_absent_classes_do_not_count_against_the_means() -> None:
    # classes: 0 and 1 labelled, 2 only predicted, 3 nowhere
    labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 1])
    found = _evaluate(torch.nn.functional.one_hot(predicted, 4).double(), labels, 4)
    assert found.balanced == pytest.approx((0.5 + 1.0) / 2)
    macro_f1 = metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(macro_f1)
    assert found.recall.tolist() == [0.5, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_named(label: int) -> None:
    with pytest.raises(ValueError, match=f"labels {label} to {label} do not fit 3 classes"):
        evaluate(lambda x: x, [(torch.eye(3)[:1], torch.tensor([label]), torch.tensor([0]))], num_classes=3)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate(lambda x: x, [], num_classes=3)


def test_table_is_aligned_and_names_every_class() -> None:
    labels, predicted = torch.tensor([0] * 10 + [1] * 10), torch.tensor([0] * 9 + [1] * 11)
    predictions = Predictions(torch.arange(20), labels, predicted[:, None], torch.ones(20))
    table = summarize(predictions, num_classes=2).table(["a rather long name", "b"])
    header, *rows = table.splitlines()
    assert {len(row) for row in rows} == {len(header)}
    assert rows[0].split()[-4:] == ["10", "100.0%", "90.0%", "94.7%"]
    assert rows[1].split() == ["b", "10", "90.9%", "100.0%", "95.2%"]


@pytest.mark.parametrize("num_classes", [2, 30, 31, 1000])
def test_confusion_picture_shades_the_diagonal_of_a_perfect_classifier(num_classes: int) -> None:
    names = [f"class with a name that is far too long to print {i}" for i in range(num_classes)]
    picture = confusion_picture(100_000 * torch.eye(num_classes, dtype=torch.int64), names)
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    assert picture.shape[1] == picture.shape[2] < 1600
    dark = (picture == torch.tensor([8, 48, 107])[:, None, None].byte()).all(0)
    rows, columns = dark.nonzero().T  # only cells of the diagonal are dark
    cell = 40 if num_classes <= 30 else max(1, 800 // num_classes)
    corner = torch.stack([rows.min(), columns.min()])
    assert torch.equal((rows - corner[0]) // cell, (columns - corner[1]) // cell)
    assert len(((rows - corner[0]) // cell).unique()) == num_classes


def test_the_confusion_matrix_says_of_what_its_shades_are() -> None:
    """Three lines in the corner below the rows' names."""
    picture = confusion_picture(torch.eye(3, dtype=torch.int64))
    corner = picture[0, 3 * 40 + 24 :, 8:126]
    inked = (corner < 255).any(1).int()
    assert int((inked.diff() == 1).sum()) + int(inked[0]) >= 3
