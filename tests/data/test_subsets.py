from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mpm.data.subsets import Subset, labelled_subset, train_val_split


def test_subset_reads_through(memory_images: Callable) -> None:
    source = memory_images(20, num_classes=3)
    subset = Subset(source, [7, 2])
    assert len(subset) == 2
    assert subset.classes == source.classes
    assert torch.equal(subset.read(0), source.read(7))
    assert (subset.label(1), subset.name(1)) == (2, "memory/2")


@pytest.mark.parametrize(
    ("count", "per_class"), [(12, [4, 4, 4]), (13, [4, 4, 5]), (3, [1, 1, 1]), (60, [20] * 3)]
)
def test_counts_are_dealt_out_evenly(memory_images: Callable, count: int, per_class: list[int]) -> None:
    source = memory_images(60, num_classes=3)
    chosen = labelled_subset(source, count=count, seed=0)
    assert len(set(chosen.tolist())) == count
    assert sorted(Counter(source.label(index) for index in chosen).values()) == per_class


def test_small_classes_give_all_they_have(memory_images: Callable) -> None:
    source = Subset(memory_images(60, num_classes=3), [0, 3, *range(1, 60, 3), *range(2, 60, 3)])
    chosen = labelled_subset(source, count=30, seed=0)
    assert Counter(source.label(index) for index in chosen) == {0: 2, 1: 14, 2: 14}


@pytest.mark.parametrize(("fraction", "per_class"), [(0.1, 2), (0.001, 1), (1.0, 20)])
def test_fractions_are_taken_of_every_class(memory_images: Callable, fraction: float, per_class: int) -> None:
    source = memory_images(60, num_classes=3)
    chosen = labelled_subset(source, fraction=fraction, seed=0)
    assert Counter(source.label(index) for index in chosen) == dict.fromkeys(range(3), per_class)


def test_choice_follows_the_seed_and_nests(memory_images: Callable) -> None:
    source = memory_images(60, num_classes=3)
    small, large, other = (
        set(labelled_subset(source, count=count, seed=seed).tolist())
        for count, seed in [(6, 0), (30, 0), (6, 1)]
    )
    assert small < large
    assert small != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2}, r"2 labels do not fit; use 3 \(one a class\) to 60"),
        ({"count": 61}, "61 labels do not fit"),
        ({"fraction": 0.0}, "outside"),
        ({"fraction": 0.5, "count": 5}, "either count or fraction"),
        ({}, "either count or fraction"),
    ],
)
def test_impossible_subsets_are_refused(memory_images: Callable, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled_subset(memory_images(60, num_classes=3), seed=0, **options)


def test_labels_are_needed_for_a_labelled_subset(memory_images: Callable) -> None:
    with pytest.raises(ValueError, match="no labels"):
        labelled_subset(memory_images(60), count=6, seed=0)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_split_is_a_stratified_partition(memory_images: Callable, num_classes: int) -> None:
    source = memory_images(60, num_classes=num_classes)
    train, val = train_val_split(source, 0.2, seed=0)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(60))
    assert len(val) == 12
    if num_classes:
        assert set(Counter(source.label(index) for index in val).values()) == {4}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_empty_parts_are_refused(memory_images: Callable, fraction: float) -> None:
    with pytest.raises(ValueError, match="validation share"):
        train_val_split(memory_images(60), fraction, seed=0)
