"""The labelled images of fine-tuning: training, validation and test, apart from each other."""

from typing import NamedTuple

from mpm import build
from mpm.config import FinetuneConfig, HeldOut, Source
from mpm.data.datasets import ImageSource
from mpm.data.subsets import Subset, labelled_subset, train_val_split
from mpm.evaluation.classes import class_difference

__all__ = ["LabelledData", "open_labelled"]


class LabelledData(NamedTuple):
    """Labelled images.

    Attributes:
        train: to learn from.
        val: chooses the checkpoint.
        test: looked at once.
        classes: their names, in the order of the labels.
    """

    train: ImageSource
    val: ImageSource | None
    test: ImageSource | None
    classes: tuple[str, ...]


def open_labelled(config: FinetuneConfig) -> LabelledData:
    """The images of a configuration whose image size and channels are known.

    A held-out share is taken from the labelled subset, so it costs labels.

    Raises:
        ValueError: if data is missing, or its parts have different classes.
    """

    def opened(source: Source, part: str) -> ImageSource:
        image_size, channels = config.data.image_size, config.data.channels
        assert image_size is not None and channels is not None
        return build.source(
            source, image_size=image_size, channels=channels, labelled=True, key=f"data.{part}"
        )

    train = opened(config.data.train, "train")
    classes = train.classes
    assert classes is not None
    if len(classes) < 2:
        raise ValueError(
            f"data.train has one class, {classes[0]}, and there is nothing to tell apart; give a folder that "
            "holds a folder for each class"
        )
    if config.labels is not None:
        labels = config.labels
        train = Subset(
            train, labelled_subset(train, count=labels.count, fraction=labels.fraction, seed=labels.seed)
        )
    val: ImageSource | None = None
    match config.data.val:
        case None:
            pass
        case HeldOut(fraction=fraction):
            kept, held_out = train_val_split(train, fraction, seed=config.seed)
            train, val = Subset(train, kept), Subset(train, held_out)
        case source:
            val = opened(source, "val")
    test = opened(config.data.test, "test") if config.data.test is not None else None
    for name, images in (("val", val), ("test", test)):
        if images is not None and images.classes != classes:
            difference = class_difference(
                images.classes or (), classes, name=f"data.{name}", other="data.train"
            )
            raise ValueError(f"{difference}; name the folders alike")
    return LabelledData(train, val, test, classes)
