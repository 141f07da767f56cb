"""Accuracy of a classifier: every sample counted once, on any number of processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mpm.evaluation.calibration import expected_calibration_error
from mpm.evaluation.predictions import Predictions, predict_all

SCORES = ("top1", "top5", "balanced", "macro_f1", "calibration_error", "count")
"""What is written of an `Accuracy`: its single numbers."""

_NAMED_CLASSES = 30  # with more, names and counts no longer fit
_CELL_PX, _FONT_PX, _GAP_PX, _CORNER_PX, _HEAT_MAP_PX = 40, 13, 8, 130, 800
_LONGEST_NAME = 28  # characters
_FULL = np.array([8, 48, 107])  # dark blue; an empty cell is white


@dataclass(frozen=True, eq=False)
class Accuracy:
    """What a classifier got right, over all processes. All scores are in [0, 1].

    Attributes:
        top1: share of samples whose highest score is at the true class.
        top5: share of samples whose true class is among the five highest scores (among all where L < 5).
        balanced: mean recall of the classes that occur among the labels.
        macro_f1: mean F1 of the classes that occur among the labels or the predictions.
        calibration_error: expected calibration error of the probabilities, see `expected_calibration_error`;
            they are a softmax, which a network that learned by binary cross entropy was not trained for.
        count: number of samples.
        confusion: int64 [L,L], samples by true class (row) and predicted class (column).
        precision: float64 [L], 0 for a class that was never predicted.
        recall: float64 [L], 0 for a class without samples.
        f1: float64 [L], 0 where precision and recall are.
    """

    top1: float
    top5: float
    balanced: float
    macro_f1: float
    calibration_error: float
    count: int
    confusion: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor

    def table(self, class_names: Sequence[str] | None = None) -> str:
        """One aligned line for each class: samples, precision, recall and F1 in percent."""
        names = list(class_names or map(str, range(len(self.f1))))
        width = max(len(name) for name in [*names, "class"])
        lines = [f"{'class':<{width}} {'images':>8} {'precision':>10} {'recall':>8} {'f1':>8}"]
        images = self.confusion.sum(1)
        for i, name in enumerate(names):
            scores = f"{self.precision[i]:>10.1%} {self.recall[i]:>8.1%} {self.f1[i]:>8.1%}"
            lines.append(f"{name:<{width}} {images[i]:>8d} {scores}")
        return "\n".join(lines)


def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[Sequence[Any]],
    *,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """Accuracy over the batches of all processes; each gets the same answer. Arguments: see `predict_all`.

    Raises:
        ValueError: a label outside [0, L), or no sample at all.
    """
    predictions = predict_all(logits_of, batches, num_classes=num_classes, device=device)
    return summarize(predictions, num_classes=num_classes)


def summarize(predictions: Predictions, *, num_classes: int) -> Accuracy:
    """Scores of predictions.

    Raises:
        ValueError: if there are none.
    """
    count = len(predictions.labels)
    if count == 0:
        raise ValueError("nothing to evaluate: the data has no images; look at its folder or split")
    cell = predictions.labels * num_classes + predictions.best[:, 0]
    confusion = cell.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    right = confusion.diagonal().double()
    labelled, predicted = confusion.sum(1), confusion.sum(0)
    # right is 0 wherever the divisor is: the clamp turns 0/0 into 0
    recall, precision = right / labelled.clamp(min=1), right / predicted.clamp(min=1)
    f1 = 2 * right / (labelled + predicted).clamp(min=1)
    return Accuracy(
        top1=float(right.sum()) / count,
        top5=int((predictions.best == predictions.labels[:, None]).sum()) / count,
        balanced=float(recall[labelled > 0].mean()),
        macro_f1=float(f1[labelled + predicted > 0].mean()),
        calibration_error=expected_calibration_error(predictions.confidence, predictions.is_right),
        count=count,
        confusion=confusion,
        precision=precision,
        recall=recall,
        f1=f1,
    )


def confusion_picture(confusion: Tensor, class_names: Sequence[str] | None = None) -> Tensor:
    """Draw a confusion matrix: rows are true classes, columns are predictions.

    The shade of a cell is the square root of its share of the row, so that rare mistakes can be seen. Up to
    30 classes get their names and counts written out; beyond that it is a heat map with class numbers.

    Args:
        confusion: int64 [L,L].
        class_names: L names; numbers where absent.

    Returns: uint8 [3,H,W].
    """
    counts = confusion.cpu().numpy()
    L = len(counts)
    named = L <= _NAMED_CLASSES
    cell = _CELL_PX if named else max(1, _HEAT_MAP_PX // L)
    shade = np.sqrt(counts / counts.sum(1, keepdims=True).clip(min=1))  # [L,L] in [0,1]
    pixels = (255 + shade[..., None] * (_FULL - 255)).round().astype(np.uint8)
    if named:
        names = {i: _shortened(class_names[i] if class_names else str(i)) for i in range(L)}
    else:
        names = {i: str(i) for i in range(0, L, 10 ** (len(str(L - 1)) - 1))}  # every tenth, hundredth, ...

    font = ImageFont.load_default(_FONT_PX)
    margin = max(_CORNER_PX, 2 * _GAP_PX + int(max(map(font.getlength, names.values()))))
    beside = Image.new("RGB", (margin, L * cell), "white")
    draw = ImageDraw.Draw(beside)
    for i, name in names.items():
        middle = (i + 0.5) * cell
        draw.text((margin - _GAP_PX, middle), name, fill="black", font=font, anchor="rm")
        draw.line((margin - _GAP_PX / 2, middle, margin, middle), fill="grey")

    picture = Image.new("RGB", (margin + L * cell + _GAP_PX, margin + L * cell + _GAP_PX), "white")
    picture.paste(beside, (0, _GAP_PX))
    picture.paste(beside.rotate(90, expand=True), (margin, L * cell + _GAP_PX))  # the same names as columns
    picture.paste(Image.fromarray(pixels.repeat(cell, 0).repeat(cell, 1)), (margin, _GAP_PX))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((margin - 1, _GAP_PX - 1, margin + L * cell, L * cell + _GAP_PX), outline="grey")
    corner = (_GAP_PX, L * cell + 3 * _GAP_PX)
    draw.text(corner, "rows: true\ncolumns: predicted\nshade: share of row", fill="grey", font=font)
    if named:
        for row, column in np.argwhere(counts).tolist():
            count = counts[row, column]
            draw.text(
                (margin + (column + 0.5) * cell, _GAP_PX + (row + 0.5) * cell),
                str(count) if count < 100_000 else f"{count / 1000:.0f}k",
                fill="white" if shade[row, column] > 0.5 else "black",
                font=font,
                anchor="mm",
            )
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
