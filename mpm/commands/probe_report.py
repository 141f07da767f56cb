"""The report of `mpm probe`: a table for each number of labels, or JSON."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mpm.evaluation.probes import Score

__all__ = ["Draw", "Row", "Scored", "Sizes", "draws_of", "report"]


class Draw(NamedTuple):
    """Some of the training labels.

    Attributes:
        number: of images; None: by share.
        fraction: of each class, in (0, 1]; None: by number.
        seed: of the draw, of what is held out of it, and of the attentive probe.
    """

    number: int | None
    fraction: float | None
    seed: int

    @property
    def size(self) -> str:
        """How many, in words."""
        if self.fraction is None:
            return f"{self.number:,} labels"
        return "all labels" if self.fraction == 1 else f"{100 * self.fraction:g} % of the labels"

    def __str__(self) -> str:
        return f"{self.size}, seed {self.seed}"


def draws_of(counts: Sequence[int], fractions: Sequence[float], seeds: Sequence[int]) -> list[Draw]:
    """Each number and share with each seed; all labels where neither is given."""
    if not counts and not fractions:
        fractions = (1.0,)
    seeds = list(dict.fromkeys(seeds))
    by_number = [Draw(count, None, seed) for count in counts for seed in seeds]
    return by_number + [Draw(None, fraction, seed) for fraction in fractions for seed in seeds]


class Row(NamedTuple):
    """Some features of a network.

    Attributes:
        layer: after which block, from 1 on; None: after all of it.
        features: "patches" (their mean), "class token", or "output" (what `mpm features` writes).
    """

    layer: int | None
    features: str

    def __str__(self) -> str:
        return self.features if self.layer is None else f"block {self.layer} {self.features}"


class Scored(NamedTuple):
    """The score of a probe on some features, with some labels."""

    draw: Draw
    row: Row
    probe: str
    score: Score


class Sizes(NamedTuple):
    """How many images could be read, and of how many classes.

    Attributes:
        drawn: training images of each draw.
        train: training images of all draws together.
        test: test images.
        classes: of both.
    """

    drawn: tuple[int, ...]
    train: int
    test: int
    classes: int

    def __str__(self) -> str:
        train = f"{self.train:,} training"
        if set(self.drawn) != {self.train}:
            each = " or ".join(f"{size:,}" for size in dict.fromkeys(self.drawn))
            train = f"{each} training images of each draw, {self.train:,} in all,"
        return f"{train} and {self.test:,} test images, {self.classes} classes"


class _Best(NamedTuple):
    """What held-out features chose in the draws of one size.

    Attributes:
        rows: in each draw.
        tests: accuracy on the test images, likewise.
    """

    rows: list[Row]
    tests: list[float]


def report(scored: Sequence[Scored], *, sizes: Sizes, checkpoint: Path, step: int, as_json: bool) -> str:
    """Text or JSON.

    Args:
        scored: every draw, row and probe.
        sizes: of the images.
        checkpoint: of the network.
        step: likewise.
        as_json: for machines.
    """
    by_size: dict[str, list[Scored]] = {}
    for one in scored:
        by_size.setdefault(one.draw.size, []).append(one)
    if as_json:
        return json.dumps(
            {
                "checkpoint": str(checkpoint),
                "step": step,
                "train_images": sizes.train,
                "test_images": sizes.test,
                "classes": sizes.classes,
                "scores": [_plain(one) for one in scored],
                "best": [
                    {"labels": size, "probe": probe, **_plain_best(_best(own, probe))}
                    for size, own in by_size.items()
                    for probe in _probes(own)
                ],
            }
        )
    return "\n\n".join([f"{sizes}; top-1 in %", *(_table(size, own) for size, own in by_size.items())])


def _table(size: str, scored: Sequence[Scored]) -> str:
    """Rows of features against probes; of several draws mean and deviation, and the best by held-out."""
    draws, rows, probes = _draws(scored), list(dict.fromkeys(s.row for s in scored)), _probes(scored)
    best = {probe: _best(scored, probe) for probe in probes}
    title = [size, *([f"{len(draws)} draws, mean ± deviation"] if len(draws) > 1 else [])]
    lines = [["layer", "features"], ["", ""]]
    for probe in probes:
        lines[0] += [probe, ""]
        lines[1] += ["held out", "test"]
    for row in rows:
        line = ["" if row.layer is None else str(row.layer), row.features]
        for probe in probes:
            own = [one.score for one in scored if (one.row, one.probe) == (row, probe)]
            held_out = [score.held_out for score in own if score.held_out is not None]
            mark = "*" if {row} == set(best[probe].rows) else " "
            tests = [score.test for score in own]
            line += [_percent(held_out), _percent(tests) + mark] if own else ["", ""]
        lines.append(line)
    width = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(
            cell.ljust(w) if column == 1 else cell.rjust(w)
            for column, (cell, w) in enumerate(zip(line, width, strict=True))
        ).rstrip()
        for line in lines
    ]
    chosen = [f"{probe}: {_percent(best[probe].tests)} ({_counted(best[probe].rows)})" for probe in probes]
    why = "best by held out" if any(s.score.held_out is not None for s in scored) else "nothing to hold out"
    return "\n".join([", ".join(title), *table, f"{why}, on test:  " + ";  ".join(chosen)])


def _best(scored: Sequence[Scored], probe: str) -> _Best:
    """The row with the best held-out score in each draw; the last row where there is none."""
    rows, tests = [], []
    for draw in _draws(scored):
        own = [one for one in scored if (one.draw, one.probe) == (draw, probe)]
        known = [one for one in own if one.score.held_out is not None]
        # the first of equal ones: the earlier layer
        best = max(known, key=lambda one: one.score.held_out or 0.0) if known else own[-1]
        rows.append(best.row)
        tests.append(best.score.test)
    return _Best(rows, tests)


def _draws(scored: Sequence[Scored]) -> list[Draw]:
    return list(dict.fromkeys(one.draw for one in scored))


def _probes(scored: Sequence[Scored]) -> list[str]:
    return list(dict.fromkeys(one.probe for one in scored))


def _percent(shares: Sequence[float]) -> str:
    if not shares:
        return "-"
    mean = f"{100 * statistics.fmean(shares):.2f}"
    return mean if len(shares) == 1 else f"{mean} ± {100 * statistics.stdev(shares):.2f}"


def _counted(rows: Sequence[Row]) -> str:
    counts = Counter(map(str, rows))
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{row} in {count}" for row, count in counts.items())


def _plain(one: Scored) -> dict[str, object]:
    draw, row, score = one.draw, one.row, one.score
    return {
        "labels": draw.size,
        "seed": draw.seed,
        "layer": row.layer,
        "features": row.features,
        "probe": one.probe,
        **score._asdict(),
    }


def _plain_best(best: _Best) -> dict[str, object]:
    return {
        "test": statistics.fmean(best.tests),
        "deviation": statistics.stdev(best.tests) if len(best.tests) > 1 else None,
        "rows": [{"layer": row.layer, "features": row.features} for row in best.rows],
    }
