"""ReaL: the validation images of ImageNet with every label that fits (Beyer et al., arXiv:2006.07159)."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mpm.evaluation.predictions import Predictions

__all__ = ["RealAccuracy", "places_in_validation", "read_real_labels", "real_accuracy"]

_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")


class RealAccuracy(NamedTuple):
    """Against ReaL labels.

    Attributes:
        top1: share of images whose most probable class is one of their labels, in [0, 1].
        count: images that have labels; the others are skipped.
    """

    top1: float
    count: int  # type: ignore[assignment]  # in place of tuple.count


def read_real_labels(path: Path, *, num_classes: int) -> list[list[int]]:
    """The published file: a JSON list with a list of class numbers for each validation image.

    Raises:
        ValueError: if it is something else, or has a number that is no class.
    """
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; give real.json of the ReaL labels") from None
    if not isinstance(labels, list) or not all(isinstance(each, list) for each in labels):
        raise ValueError(f"{path} is no list of lists; give real.json of the ReaL labels")
    wrong = {n for each in labels for n in each if not isinstance(n, int) or not 0 <= n < num_classes}
    if wrong:
        raise ValueError(f"{path} has label {min(map(str, wrong))}, and there are {num_classes} classes")
    return labels


def places_in_validation(names: Iterable[str], count: int) -> list[int]:
    """Number from 0 of each image among the validation images, which its file's name holds.

    Folders of classes put the images in another order, so their place in a source says nothing.

    Args:
        names: such as `n01440764/ILSVRC2012_val_00000293.JPEG`, whose place is 292.
        count: of the labels.

    Raises:
        ValueError: if a name has no number, or one that is too large.
    """
    places = []
    for name in names:
        found = _NAME.search(name)
        if found is None:
            raise ValueError(
                f"{name} is no validation image of ImageNet by its name; "
                "ReaL labels need files named ILSVRC2012_val_00000001.JPEG and so on"
            )
        if not 0 < int(found[1]) <= count:
            raise ValueError(f"{name} has a number outside 1 to {count}, for which there are ReaL labels")
        places.append(int(found[1]) - 1)
    return places


def real_accuracy(
    predictions: Predictions, labels: Sequence[Sequence[int]], places: Sequence[int]
) -> RealAccuracy:
    """Accuracy over the images that have labels.

    Args:
        predictions: of the images of a source.
        labels: classes of each validation image, none where people found none that fits.
        places: of each image of the source among the validation images.

    Raises:
        ValueError: if no image has labels.
    """
    fitting = [set(labels[places[place]]) for place in predictions.place.tolist()]
    hits = torch.tensor(
        [
            chosen in classes
            for chosen, classes in zip(predictions.best[:, 0].tolist(), fitting, strict=True)
            if classes
        ]
    )
    if not len(hits):
        raise ValueError("none of the images has a ReaL label")
    return RealAccuracy(float(hits.double().mean()), len(hits))
