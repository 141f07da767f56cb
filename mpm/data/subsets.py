"""Parts of an image source, chosen so that classes stay balanced and the choice can be repeated."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mpm.data.datasets import ImageSource


class Subset:
    """The images of a source at `indices`, in that order.

    Args:
        source: whose images these are.
        indices: numbers in the source.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        """[C,H,W] uint8, or float32 in [0, 1]."""
        return self.source.read(int(self.indices[index]))

    def label(self, index: int) -> int:
        """Class number, as in the source."""
        return self.source.label(int(self.indices[index]))

    def name(self, index: int) -> str:
        """As in the source."""
        return self.source.name(int(self.indices[index]))


def labelled_subset(
    source: ImageSource, *, count: int | None = None, fraction: float | None = None, seed: int
) -> np.ndarray:
    """Indices of a class-balanced part of a labelled source, ascending.

    A `count` is dealt out evenly, as far as the classes reach; a `fraction` is taken of every class. Each
    class keeps at least one image. With one seed, a smaller part lies within a larger one.

    Args:
        source: with classes.
        count: number of images; exclusive with `fraction`.
        fraction: share of the images, in (0, 1].
        seed: of the choice.

    Raises:
        ValueError: if there are no labels, or the number does not fit the source.
    """
    if (count is None) == (fraction is None):
        raise ValueError("a labelled subset takes either count or fraction")
    groups = _shuffled_classes(source, seed)
    sizes = np.array([len(group) for group in groups])
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction {fraction} of the labels is outside (0, 1]")
        shares = np.maximum(np.rint(sizes * fraction).astype(int), 1)
    else:
        assert count is not None
        if not len(groups) <= count <= sizes.sum():
            raise ValueError(
                f"{count} labels do not fit; use {len(groups)} (one a class) to {sizes.sum()} (all images)"
            )
        shares = _dealt_out(count, sizes)
    return np.sort(np.concatenate([group[:share] for group, share in zip(groups, shares, strict=True)]))


def train_val_split(source: ImageSource, fraction: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for validation, ascending; the validation share is taken of every class.

    Args:
        source: with classes or without.
        fraction: share of the validation images, in (0, 1).
        seed: of the choice.

    Raises:
        ValueError: if the fraction leaves one of the two empty.
    """
    if source.classes is None:
        groups = [_generator(seed, 0).permutation(len(source))]
    else:
        groups = _shuffled_classes(source, seed)
    cuts = [round(len(group) * fraction) for group in groups]
    held_out = np.sort(np.concatenate([group[:cut] for group, cut in zip(groups, cuts, strict=True)]))
    kept = np.sort(np.concatenate([group[cut:] for group, cut in zip(groups, cuts, strict=True)]))
    if not len(held_out) or not len(kept):
        raise ValueError(
            f"validation share {fraction} leaves {len(kept)} images to train on, {len(held_out)} held out"
        )
    return kept, held_out


def _shuffled_classes(source: ImageSource, seed: int) -> list[np.ndarray]:
    if source.classes is None:
        raise ValueError("the images have no labels; put them into one folder a class")
    labels = np.array([source.label(index) for index in range(len(source))])
    groups = [np.flatnonzero(labels == number) for number in range(len(source.classes))]
    return [_generator(seed, number).permutation(group) for number, group in enumerate(groups) if len(group)]


def _generator(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, number])


def _dealt_out(count: int, sizes: np.ndarray) -> np.ndarray:
    """Deal `count` cards to players in rounds, each taking at most its size."""
    shares = np.zeros_like(sizes)
    while (left := count - shares.sum()) > 0:
        open_classes = np.flatnonzero(shares < sizes)
        if left < len(open_classes):
            shares[open_classes[:left]] += 1
        else:
            each = min(left // len(open_classes), (sizes - shares)[open_classes].min())
            shares[open_classes] += each
    return shares
