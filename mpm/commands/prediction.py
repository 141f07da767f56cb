"""`mpm predict`: classes of images, as CSV."""

import csv
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from torch import Tensor

from mpm import distributed
from mpm.commands.inference import ImageFiles, image_files, infer
from mpm.commands.outputs import appearing
from mpm.network import load

__all__ = ["predict"]

log = logging.getLogger(__name__)

_COLUMN_EACH = 20  # classes; with more, only the best are listed
_BEST = 5


def predict(
    checkpoint: Path,
    paths: Sequence[Path],
    *,
    output: Path | None = None,
    device: str = "auto",
    workers: int = 0,
) -> None:
    """Write a row for each image that can be read: its path, the class, its probability, and the others'.

    Args:
        checkpoint: of fine-tuning.
        paths: images and folders of images.
        output: of the CSV; None: standard output.
        device: auto, cpu or cuda.
        workers: processes that read ahead.

    Raises:
        ValueError: if no image can be read.
    """
    network = load(checkpoint, device=distributed.start(device))
    source = ImageFiles(image_files(paths), network.reading)
    count = 0
    with _opened(output) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", *_header(network.classes)])
        for places, probabilities in infer(network, source, network.predict, workers=workers):
            rows = zip(places, _rows(probabilities, network.classes), strict=True)
            writer.writerows([source.name(place), *row] for place, row in rows)
            count += len(places)
    log.info("classes of %d images; %d could not be read", count, len(source) - count)


@contextmanager
def _opened(output: Path | None) -> Iterator[IO[str]]:
    if output is None:
        yield sys.stdout
        return
    with appearing(output) as (partial,), partial.open("w", encoding="utf-8", newline="") as file:
        yield file


def _header(classes: Sequence[str]) -> list[str]:
    if len(classes) <= _COLUMN_EACH:
        return ["class", "probability", *(f"p({name})" for name in classes)]
    places = ["", *(f"_{place}" for place in range(2, _BEST + 1))]
    return [f"{column}{place}" for place in places for column in ("class", "probability")]


def _rows(probabilities: Tensor, classes: Sequence[str]) -> Iterator[list[str]]:
    """Probabilities [B,L] as the columns of the header."""
    best = probabilities.topk(1 if len(classes) <= _COLUMN_EACH else _BEST)
    for row, values, places in zip(probabilities, best.values, best.indices, strict=True):
        ranked = zip(places.tolist(), values.tolist(), strict=True)
        cells = [cell for place, value in ranked for cell in (classes[place], f"{value:.6g}")]
        yield cells if len(classes) > _COLUMN_EACH else cells + [f"{value:.6g}" for value in row.tolist()]
