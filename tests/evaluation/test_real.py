import json
from pathlib import Path

import pytest
import torch

from mpm.evaluation.predictions import Predictions
from mpm.evaluation.real import places_in_validation, read_real_labels, real_accuracy


def test_accuracy_equals_a_loop_over_the_files() -> None:
    """Images lie in class folders, so that their order is not that of the labels; some could not be read."""
    draw = torch.Generator().manual_seed(0)
    labels = [torch.randperm(7, generator=draw)[: i % 4].tolist() for i in range(40)]  # every fourth has none
    numbers = torch.randperm(40, generator=draw).tolist()
    names = [f"n{n % 5:08}/ILSVRC2012_val_{n + 1:08}.JPEG" for n in numbers]
    read = torch.tensor([place for place in range(40) if place not in (3, 17)])
    best = torch.randint(7, (38, 1), generator=draw)
    found = real_accuracy(
        Predictions(read, torch.zeros(38, dtype=torch.int64), best, torch.ones(38)),
        labels,
        places_in_validation(names, 40),
    )
    right = total = 0
    for place, chosen in zip(read.tolist(), best[:, 0].tolist(), strict=True):
        number = int(names[place].removesuffix(".JPEG")[-8:])
        if labels[number - 1]:
            total += 1
            right += chosen in labels[number - 1]
    assert 0 < right < total < 38
    assert found == (right / total, total)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n01440764/cat.jpg", "no validation image of ImageNet by its name"),
        ("ILSVRC2012_val_00000041.JPEG", "a number outside 1 to 40"),
        ("ILSVRC2012_val_00000000.JPEG", "a number outside 1 to 40"),
    ],
)
def test_a_file_of_another_set_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        places_in_validation([name], 40)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1], [", "no JSON"),
        ("[1, 2]", "no list of lists"),
        ('{"a": [1]}', "no list of lists"),
        ("[[1], [7]]", "has label 7, and there are 7 classes"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_real_labels(tmp_path / "real.json", num_classes=7)


def test_images_without_labels_only_are_no_score(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps([[], [2]]))
    labels = read_real_labels(tmp_path / "real.json", num_classes=3)
    one = Predictions(torch.tensor([0]), torch.tensor([1]), torch.tensor([[1]]), torch.ones(1))
    with pytest.raises(ValueError, match="none of the images has a ReaL label"):
        real_accuracy(one, labels, [0])
    assert real_accuracy(one, labels, [1]) == (0.0, 1)
