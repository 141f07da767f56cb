"""What is told of evaluated networks: a table side by side, classes of one, JSON."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from mpm.evaluation.accuracy import SCORES, Accuracy
from mpm.evaluation.mistakes import Mistake
from mpm.evaluation.real import RealAccuracy

__all__ = ["Scores", "Speed", "as_json", "as_table", "as_text"]


class Speed(NamedTuple):
    """How fast a network was here.

    Attributes:
        images_per_s: of the forward pass alone, in float32.
        batch: images at once.
        device: its name.
        threads: of the process.
    """

    images_per_s: float
    batch: int
    device: str
    threads: int

    @property
    def conditions(self) -> str:
        """What the number depends on."""
        threads = "" if self.device != "cpu" else f", {self.threads} thread(s)"
        return f"float32, batch {self.batch}, {self.device}{threads}, forward pass only"


class Scores(NamedTuple):
    """A network at one image size and crop.

    Attributes:
        checkpoint: as it was given.
        image_size: height and width in pixels.
        crop: share of the resized image's side.
        accuracy: against the labels.
        real: against ReaL labels.
        classes: names.
        matched: how the images' classes were matched with the network's; "": they are the same.
        left_out: images that could not be read, which are not counted.
        parameters: of the network at this size.
        speed: measured here.
    """

    checkpoint: str
    image_size: tuple[int, int]
    crop: float
    accuracy: Accuracy
    real: RealAccuracy | None
    classes: tuple[str, ...]
    matched: str
    left_out: int
    parameters: int
    speed: Speed

    def numbers(self) -> dict[str, Any]:
        """All single numbers and their conditions, for JSON."""
        real = {} if self.real is None else {"real_top1": self.real.top1, "real_count": self.real.count}
        return {
            "checkpoint": self.checkpoint,
            "image_size": self.image_size,
            "crop": self.crop,
            **{name: getattr(self.accuracy, name) for name in SCORES},
            **real,
            "left_out": self.left_out,
            "classes_matched": self.matched or None,
            "parameters": self.parameters,
            **self.speed._asdict(),
        }


_PERCENT = {
    "top-1": "top1",
    "top-5": "top5",
    "balanced accuracy": "balanced",
    "macro F1": "macro_f1",
    "calibration error": "calibration_error",
}


def as_text(scores: Scores) -> str:
    """Of one network, with a line for each class."""
    named = {"images": f"{scores.accuracy.count:,}{_left_out(scores)}"}
    named |= {name: f"{getattr(scores.accuracy, key):.2%}" for name, key in _PERCENT.items()}
    if scores.real is not None:
        named["ReaL top-1"] = f"{scores.real.top1:.2%} of the {scores.real.count:,} images with ReaL labels"
    named |= {
        "image size, crop": f"{_sides(scores.image_size)}, {scores.crop:g}",
        "parameters": f"{scores.parameters:,}",
        "images/s": f"{_rounded(scores.speed.images_per_s)} ({scores.speed.conditions})",
    }
    width = max(map(len, named))
    lines = [f"{name:<{width}}  {value}" for name, value in named.items()]
    return "\n".join([*lines, "", scores.accuracy.table(scores.classes)])


def as_table(rows: Sequence[Scores]) -> str:
    """Side by side, a line each; the best of a column has a star."""
    columns: dict[str, list[str]] = {
        "checkpoint": [row.checkpoint for row in rows],
        "size": [_sides(row.image_size) for row in rows],
        "crop": [f"{row.crop:g}" for row in rows],
        "images": [f"{row.accuracy.count:,}{_left_out(row)}" for row in rows],
    }
    for name, key in _PERCENT.items():
        values = [getattr(row.accuracy, key) for row in rows]
        columns[name] = _starred([f"{value:.2%}" for value in values], values, least=key.endswith("error"))
    if all(row.real is not None for row in rows):
        reals = [row.real.top1 for row in rows if row.real is not None]
        columns["ReaL"] = _starred([f"{value:.2%}" for value in reals], reals)
    columns["parameters"] = [f"{row.parameters:,}" for row in rows]
    speeds = [row.speed.images_per_s for row in rows]
    columns["images/s"] = _starred([_rounded(value) for value in speeds], speeds)
    aligned = []
    for number, (title, cells) in enumerate(columns.items()):
        title, cells = title.replace(" accuracy", ""), [*cells]
        width = max(map(len, [title, *cells]))
        side = "<" if number == 0 else ">"
        aligned.append([f"{cell:{side}{width}}" for cell in [title, *cells]])
    lines = ["  ".join(cells).rstrip() for cells in zip(*aligned, strict=True)]
    told = [f"* best of its column; images/s: {rows[0].speed.conditions}"]
    if rows[0].real is not None:
        told.append(f"ReaL: top-1 over the images with ReaL labels, {_counts(rows)}")
    return "\n".join([*lines, "", *told])


def as_json(rows: Sequence[Scores], mistakes: Sequence[tuple[str, Mistake]]) -> str:
    """One object: of one network with its classes, confusion matrix and mistakes, of several a list `rows`.

    Args:
        rows: one or more.
        mistakes: of the last, each with the name of its image.
    """
    if len(rows) > 1:
        return json.dumps({"rows": [row.numbers() for row in rows]})
    (row,) = rows
    found = row.accuracy
    per_class = {
        name: {
            "images": int(found.confusion[number].sum()),
            "precision": float(found.precision[number]),
            "recall": float(found.recall[number]),
            "f1": float(found.f1[number]),
        }
        for number, name in enumerate(row.classes)
    }
    listed = [
        {"image": image, "true": wrong.true, "predicted": wrong.predicted, "confidence": wrong.confidence}
        for image, wrong in mistakes
    ]
    return json.dumps(
        row.numbers() | {"classes": per_class, "confusion": found.confusion.tolist(), "mistakes": listed}
    )


def _counts(rows: Sequence[Scores]) -> str:
    counts = dict.fromkeys(f"{row.real.count:,}" for row in rows if row.real is not None)
    return " or ".join(counts)


def _left_out(scores: Scores) -> str:
    return f" ({scores.left_out:,} unreadable)" if scores.left_out else ""


def _sides(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _starred(cells: list[str], values: Sequence[float], *, least: bool = False) -> list[str]:
    """With a star at the best, unless all are equally good; the others get a blank, so that digits align."""
    best = min(values) if least else max(values)
    if all(value == best for value in values):
        return cells
    return [cell + ("*" if value == best else " ") for cell, value in zip(cells, values, strict=True)]
