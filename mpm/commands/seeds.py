"""`mpm finetune --seeds --fractions`: one configuration several times, and how much the results differ."""

import json
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpm import configfile
from mpm.config import FinetuneConfig
from mpm.launch import is_first_process

__all__ = ["Member", "members", "repeat", "table"]

log = logging.getLogger(__name__)


class Member(NamedTuple):
    """One run of several.

    Attributes:
        config: of it, with its own folder.
        fraction: of the labels, where fractions were asked for.
    """

    config: FinetuneConfig
    fraction: float | None


def members(
    file: str | Path, words: Sequence[str], *, seeds: Sequence[int], fractions: Sequence[float]
) -> list[Member]:
    """The runs, the seeds of one fraction after another.

    Each has a folder of its own in `run.output_dir`: `seed_0`, or `labels_0.01/seed_0` with fractions. The
    draw of the labels follows the seed where `labels.seed` is not stated, so that the deviation is over draws
    too.

    Args:
        file: of the configuration.
        words: `key=value`, as for one run.
        seeds: none: the configuration's.
        fractions: of the labels; none: what the configuration says of labels.

    Raises:
        ConfigError: if the configuration is wrong, names no test images, or states what is varied.
    """
    loaded = configfile.load(file, words, FinetuneConfig)
    varied = {"--seeds": (seeds, ("seed",)), "--fractions": (fractions, ("labels.fraction", "labels.count"))}
    for option, (values, keys) in varied.items():
        for key in keys:
            if values and loaded.origins.get(key) == "override":
                raise configfile.ConfigError(f"{key} is given as a word and varied by {option}; drop one")
    if loaded.config.data.test is None:
        raise configfile.ConfigError(
            "data.test is null, and several runs are compared by their test images; "
            "add data.test.kind=folder data.test.root=FOLDER"
        )
    if len({*seeds}) < len(seeds) or len({*fractions}) < len(fractions):
        raise configfile.ConfigError("a seed or a fraction is given twice; give each once")
    follows = loaded.origins.get("labels.seed", "default") == "default"
    return [
        Member(
            _member(file, words, loaded.config, seed=seed, fraction=fraction, draws=follows),
            fraction,
        )
        for fraction in (fractions or (None,))
        for seed in (seeds or (loaded.config.seed,))
    ]


def _member(
    file: str | Path,
    words: Sequence[str],
    config: FinetuneConfig,
    *,
    seed: int,
    fraction: float | None,
    draws: bool,
) -> FinetuneConfig:
    folder = config.run.output_dir
    own = [f"seed={seed}"]
    if fraction is not None:
        own.append(f"labels.fraction={fraction}")
        folder /= f"labels_{fraction:g}"
    if draws and (fraction is not None or config.labels is not None):
        own.append(f"labels.seed={seed}")
    changed = configfile.load(file, [*words, *own], FinetuneConfig).config
    return changed.model_copy(
        update={"run": changed.run.model_copy(update={"output_dir": folder / f"seed_{seed}"})}
    )


def repeat(train: Callable[[FinetuneConfig], bool], runs: Sequence[Member], folder: Path) -> str | None:
    """Train one after another; the table of their results, or None where one was stopped on request.

    Finished runs are passed through and a stopped one continues, so the same command goes on after any stop.
    `folder/seeds.json` is written anew after each.

    Args:
        train: gives whether the run is finished.
        runs: of `members`.
        folder: `run.output_dir` of the configuration.
    """
    import torch  # here, so that a mistake in the words is told before it is loaded

    if others := _others(runs, folder):
        log.info(
            "%s told of %s too; name those seeds and fractions as well, and all are compared: finished runs "
            "are passed through",
            folder / "seeds.json",
            ", ".join(others),
        )
    rows: list[dict[str, Any]] = []
    for run in runs:
        if not train(run.config):
            return None
        torch.compiler.reset()  # the next network's blocks are compiled anew, and count anew
        if is_first_process():
            rows.append(_result(run))
            new = folder / "seeds.json.partial"
            new.write_text(json.dumps({"runs": rows, "groups": list(_groups(rows))}, indent=1) + "\n")
            new.replace(folder / "seeds.json")
    return table(rows)


def _others(runs: Sequence[Member], folder: Path) -> list[str]:
    """Folders of runs that an earlier command compared, and this one does not."""
    file = folder / "seeds.json"
    told = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
    named = {str(run.config.run.output_dir) for run in runs}
    return [row["folder"] for row in told if row["folder"] not in named]


def _result(run: Member) -> dict[str, Any]:
    folder = run.config.run.output_dir
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {
        "fraction": run.fraction,
        "seed": run.config.seed,
        "train_images": result["train_images"],
        "top1": result["test"]["top1"],
        "folder": str(folder),
    }


def _groups(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean and deviation over the seeds of each fraction."""
    for fraction in dict.fromkeys(row["fraction"] for row in rows):
        group = [row for row in rows if row["fraction"] == fraction]
        scores = [row["top1"] for row in group]
        yield {
            "fraction": fraction,
            "train_images": statistics.mean(row["train_images"] for row in group),
            "seeds": [row["seed"] for row in group],
            "mean": statistics.mean(scores),
            "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Top-1 on the test images in per cent: mean, deviation (of a sample, n - 1), and each seed's."""
    header = ("labels", "train images", "mean top-1", "deviation", "seeds")
    lines = [header]
    for group in _groups(rows):
        fraction, deviation = group["fraction"], group["deviation"]
        each = [f"{row['seed']}: {row['top1']:.2%}" for row in rows if row["fraction"] == fraction]
        lines.append(
            (
                "-" if fraction is None else f"{fraction:g}",
                f"{group['train_images']:,.0f}",
                f"{group['mean']:.2%}",
                "-" if deviation is None else f"{deviation:.2%}",
                ", ".join(each),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
