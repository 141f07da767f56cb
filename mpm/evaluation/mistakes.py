"""The images that a classifier is most sure of, and wrong."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpm.evaluation.gallery import Tile, gallery, scaled
from mpm.evaluation.predictions import Predictions

__all__ = ["mistakes_picture", "worst_mistakes"]

_COLUMNS, _TILE_PX = 6, 160


def worst_mistakes(predictions: Predictions, count: int) -> Tensor:
    """Rows of the predictions with the highest probability of a wrong class, falling: int64 [<= count]."""
    wrong = (~predictions.is_right).nonzero()[:, 0]
    order = predictions.confidence[wrong].argsort(descending=True, stable=True)
    return wrong[order[:count]]


def mistakes_picture(
    predictions: Predictions, names: Sequence[str], image_of: Callable[[int], Tensor], *, count: int = 24
) -> Tensor:
    """The worst mistakes: each image with its class, what it was taken for, and how sure.

    Args:
        predictions: at least one of them wrong.
        names: of the L classes.
        image_of: number of an image in its source -> uint8 [3,h,w], all of one size.
        count: images at most.

    Returns: uint8 [3,H,W].
    """
    tiles = []
    for row in worst_mistakes(predictions, count).tolist():
        image = scaled(image_of(int(predictions.place[row])), _TILE_PX)
        true, taken = names[int(predictions.labels[row])], names[int(predictions.best[row, 0])]
        tiles.append(Tile(image, (f"is {true}", f"{float(predictions.confidence[row]):.1%} {taken}")))
    wrong = int(torch.count_nonzero(~predictions.is_right))
    return gallery(
        [tiles[first : first + _COLUMNS] for first in range(0, len(tiles), _COLUMNS)],
        legend=f"the {len(tiles)} surest of {wrong:,} mistakes in {len(predictions.labels):,} images: "
        "the true class, and the probability of the wrong one",
    )
