"""`mpm stats`: what a set of images is, and the lines of a configuration that say so."""

import collections
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpm import build
from mpm.config import FinetuneConfig, FolderSource, PretrainConfig, TokenizerConfig
from mpm.data.datasets import FolderImages, ImageSource
from mpm.data.images import Stored, UnreadableImage, stored_image
from mpm.data.statistics import ChannelStatistics, channel_statistics

__all__ = ["survey_config", "survey_folder"]

_LOOKED_AT = 200  # files, for channels and depth
_LIMIT = 10_000  # images, for the statistics


def survey_folder(root: Path, *, channels: int | None = None, max_value: float | None = None) -> str:
    """Number, channels, depth and statistics of the images below a folder, and lines to paste.

    Args:
        root: the folder.
        channels: to convert to; None: what most files have.
        max_value: the stored value that becomes 1; None: found from the files.

    Raises:
        ValueError: if the folder holds no readable image.
    """
    source = FolderImages(root, channels=channels or 3)
    stored = _stored(source)
    channels = channels or collections.Counter(image.channels for image in stored).most_common(1)[0][0]
    max_value = max_value or _largest_float(stored)
    source = FolderImages(root, channels=channels, max_value=max_value)
    found = channel_statistics(source, limit=_LIMIT)
    level = _white_level(stored, found.maximum) if max_value is None else None
    if level is not None:
        found, max_value = _relative_to(level, found), level.of
    return _report(source, found, max_value=max_value, stored=stored)


def survey_config(config: PretrainConfig | TokenizerConfig | FinetuneConfig) -> str:
    """The same of a configuration's training images."""
    is_labelled = isinstance(config, FinetuneConfig)
    section = config.data.train if isinstance(config, FinetuneConfig) else config.data
    channels = config.data.channels or 3
    image_size = config.data.image_size or (32, 32)  # only generated images ask
    source = build.source(section, image_size=image_size, channels=channels, labelled=is_labelled)
    max_value = section.max_value if isinstance(section, FolderSource) else None
    stored = _stored(source) if isinstance(source, FolderImages) else []
    found = channel_statistics(source, limit=_LIMIT)
    return _report(source, found, max_value=max_value, stored=stored)


def _stored(source: FolderImages) -> list[Stored]:
    """How some of the files keep their images."""
    found: list[Stored] = []
    places = np.random.default_rng(0).permutation(len(source))[:_LOOKED_AT]
    for place in places.tolist():
        try:
            found.append(stored_image(source.path(place)))
        except UnreadableImage as error:
            reason = str(error)
    if not found:
        raise ValueError(f"none of {len(places)} images in {source.root} can be read: {reason}")
    return found


def _largest_float(stored: list[Stored]) -> float | None:
    """What floats have to be divided by to lie in [0, 1]; None where they do, or are none."""
    largest = max((image.maximum for image in stored if image.dtype.startswith("float")), default=0.0)
    return math.ceil(largest) if largest > 1 else None


class _WhiteLevel(NamedTuple):
    of: int
    natural: int


def _white_level(stored: list[Stored], maximum: float) -> _WhiteLevel | None:
    """What a camera of 10, 12 or 14 bits calls white in integers of 16; None where they are used in full.

    Args:
        stored: how the files keep their images.
        maximum: largest value seen, as a share of the type's.
    """
    dtypes = {image.dtype for image in stored}
    if not dtypes <= {"uint16", "uint32"} or len(dtypes) > 1 or not maximum:
        return None
    natural = int(np.iinfo(dtypes.pop()).max)
    level = 2 ** round(maximum * natural).bit_length() - 1
    return _WhiteLevel(level, natural) if level < natural else None


def _relative_to(level: _WhiteLevel, found: ChannelStatistics) -> ChannelStatistics:
    """Statistics in units of a lower white level."""
    times = level.natural / level.of
    return found._replace(
        mean=tuple(value * times for value in found.mean),
        std=tuple(value * times for value in found.std),
        minimum=found.minimum * times,
        maximum=found.maximum * times,
    )


def _report(
    source: ImageSource, found: ChannelStatistics, *, max_value: float | None, stored: list[Stored]
) -> str:
    looked_at = min(len(source), _LIMIT)
    facts = {"images": f"{len(source):,}, looked at {looked_at:,}, of them {looked_at - found.images} broken"}
    if stored:
        kinds = collections.Counter((image.dtype, image.channels) for image in stored)
        listed = [f"{dtype}, {count} channel(s)" for (dtype, count), _ in kinds.most_common(3)]
        values = f"{min(s.minimum for s in stored):g} to {max(s.maximum for s in stored):g}"
        facts["stored as"] = f"{'; '.join(listed)}; values {values}"
    facts |= {
        "read as": f"{found.dtype}, {found.minimum:.4g} to {found.maximum:.4g}",
        "mean": _row(found.mean),
        "std": _row(found.std),
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    data = {"channels": len(found.mean), "mean": f"[{_row(found.mean)}]", "std": f"[{_row(found.std)}]"}
    if max_value is not None:
        data["max_value"] = f"{max_value:g}  # beside the root"
    paste = ["data:", *(f"  {key}: {value}" for key, value in data.items())]
    return "\n".join([*lines, "", "to paste into a configuration:", *paste])


def _row(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
