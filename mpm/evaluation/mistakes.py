"""The images that a classifier is most sure of, and wrong."""

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import NamedTuple

from torch import Tensor

from mpm.evaluation.gallery import Tile, gallery, scaled
from mpm.evaluation.predictions import Predictions

__all__ = ["Mistake", "mistakes_picture", "worst_mistakes"]

_COLUMNS, _TILE_PX = 6, 160


class Mistake(NamedTuple):
    """An image that was taken for another class than its own.

    Attributes:
        place: number of the image in its source.
        true: name of its class.
        predicted: name of the most probable class.
        confidence: its probability.
    """

    place: int
    true: str
    predicted: str
    confidence: float


def worst_mistakes(predictions: Predictions, names: Sequence[str]) -> list[Mistake]:
    """All mistakes, the surest first; `names` are of the L classes."""
    wrong = (~predictions.is_right).nonzero()[:, 0]
    order = wrong[predictions.confidence[wrong].argsort(descending=True, stable=True)]
    columns = (predictions.place, predictions.labels, predictions.best[:, 0], predictions.confidence)
    rows = zip(*(column[order].tolist() for column in columns), strict=True)
    return [Mistake(place, names[true], names[taken], sure) for place, true, taken, sure in rows]


def mistakes_picture(
    mistakes: Sequence[Mistake],
    name_of: Callable[[int], str],
    image_of: Callable[[int], Tensor],
    *,
    images: int,
    most: int = 24,
) -> Tensor:
    """The first mistakes: each image with its class, what it was taken for, how sure, and its file.

    Args:
        mistakes: one or more.
        name_of: number of an image in its source -> path of its file.
        image_of: likewise -> uint8 [3,h,w], all of one size.
        images: of all, with those that are right.
        most: drawn at most.

    Returns: uint8 [3,H,W].
    """
    tiles = []
    for mistake in mistakes[:most]:
        said = f"{mistake.confidence:.1%} {mistake.predicted}"
        file = PurePath(name_of(mistake.place)).name
        tiles.append(Tile(scaled(image_of(mistake.place), _TILE_PX), (f"is {mistake.true}", said, file)))
    return gallery(
        [tiles[first : first + _COLUMNS] for first in range(0, len(tiles), _COLUMNS)],
        legend=f"the {len(tiles)} surest of {len(mistakes):,} mistakes in {images:,} images: "
        "the true class, the probability of the wrong one, the file",
    )
