"""What happens when an image is broken: the next readable one takes its place, as long as few are."""

import hashlib
from pathlib import Path

import numpy as np
from torch import Tensor

from mpm.data.datasets import ImageSource
from mpm.data.images import UnreadableImage

__all__ = ["Substituting", "check_share", "images_digest", "read_next"]

_TOLERATED = 100  # one in so many
_IMAGES_HASHED = 16


def read_next(source: ImageSource, index: int) -> tuple[int, Tensor, dict[int, str]]:
    """The first readable image from `index` on.

    Returns: its index, its pixels [C,H,W], and index -> reason of the broken ones before it.

    Raises:
        ValueError: if over 1 % of the source is broken in a row.
    """
    count = len(source)
    broken: dict[int, str] = {}
    while True:
        place = (index + len(broken)) % count
        try:
            return place, source.read(place), broken
        except UnreadableImage as error:
            broken[place] = str(error)
        check_share(broken, count)


def check_share(broken: dict[int, str], count: int) -> None:
    """Refuse data of which over 1 % is broken.

    Raises:
        ValueError: naming the first files.
    """
    if len(broken) > count // _TOLERATED:
        raise ValueError(
            f"{len(broken)} of {count} images cannot be read, which is more than 1 %; repair or remove them: "
            f"{'; '.join(list(broken.values())[:3])}{'; ...' if len(broken) > 3 else ''}"
        )


class Substituting:
    """A source in which a broken image, with its label, is replaced by the next readable one.

    Args:
        source: the images.
    """

    def __init__(self, source: ImageSource):
        self.classes = source.classes
        self._source = source
        self._taken: dict[int, int] = {}  # in the process that reads

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Tensor:
        """[C,H,W] uint8, or float32 in [0, 1]. Raises ValueError where over 1 % is broken in a row."""
        place, image, broken = read_next(self._source, index)
        if broken:
            self._taken[index] = place
        return image

    def label(self, index: int) -> int:
        """Class number of the image that was read for `index`."""
        return self._source.label(self._taken.get(index, index))

    def name(self, index: int) -> str:
        """Of the image that was read for `index`."""
        return self._source.name(self._taken.get(index, index))


def images_digest(source: ImageSource) -> str:
    """SHA-256 of the names of all images and the pixels of a few: whether it is the same source."""
    contents = hashlib.sha256()
    for index in range(len(source)):  # absolute names move with the folder
        contents.update(Path(source.name(index)).name.encode(errors="surrogateescape") + b"\0")
    for place in np.linspace(0, len(source) - 1, min(len(source), _IMAGES_HASHED), dtype=int):
        contents.update(Substituting(source).read(int(place)).numpy().tobytes())
    return contents.hexdigest()
