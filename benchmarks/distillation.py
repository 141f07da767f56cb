"""What a teacher is worth to small transformers, and through which token: a grid of whole small runs.

    python -m benchmarks.distillation teachers --out FILE    # a convnet of timm for each data set and seed
    python -m benchmarks.distillation answers --out FILE     # what these say of all crops of their students
    python -m benchmarks.distillation rates --out FILE       # students' rates, on held-out training images
    python -m benchmarks.distillation students --out FILE    # none, soft, hard, with a token; ViT and CaiT
    python -m benchmarks.distillation long --out FILE --parallel 1   # some of these, four times as long
    python -m benchmarks.distillation students --out FILE --table    # what is finished

A cell is one data set, architecture, method and seed. Teacher and student of a seed learn from the same
labels, so that a teacher adds no label, only its own bias. Finished cells are passed over and stopped ones
continue, so the same command goes on after any stop; students come after the teachers and their answers.
Cells run on one thread each. Needs data/FashionMNIST (scripts/fetch_fashion_mnist.py) and data/clipart
(scripts/shrink_images.py).
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import Results
from benchmarks.runs import Job, grid_parser, known, mean_and_deviation, python, run_grid, state, top1, train
from benchmarks.small_images import labelled


class Data(NamedTuple):
    """What differs between the data sets, and how long is trained."""

    image_size: int
    patch_size: int
    labels: int
    steps: int
    teacher_steps: int


DATA = {
    "fashion_mnist": Data(28, 7, labels=5000, steps=1500, teacher_steps=1500),
    "clipart": Data(64, 16, labels=2000, steps=1000, teacher_steps=800),
}
BATCH, SEARCH_SEED = 64, 100
TEACHER, TEACHER_LR = "test_resnet", 4e-3  # 0.4 M parameters
# found with `rates`
RATES = {
    ("fashion_mnist", "vit"): 1e-3,
    ("fashion_mnist", "cait"): 4e-3,
    ("clipart", "vit"): 2e-3,
    ("clipart", "cait"): 1e-3,
}
METHODS = ("none", "soft", "hard", "hard_token")
# the last of each in metrics.jsonl
KEPT = (
    "train/loss",
    "train/teacher_accuracy",
    "train/teacher_agreement",
    "train/images_per_s",
    "val/model_top1",
)


class Cell(NamedTuple):
    """One run of a grid, and what distinguishes it."""

    grid: str
    data: str
    architecture: str
    method: str
    seed: int
    lr: float
    length: int = 1  # of training, in steps of the data set

    @property
    def name(self) -> str:
        """Unique, for folders and the file of results."""
        parts = self if self.length > 1 else self[:-1]
        return "_".join(str(part) for part in parts)


def student(architecture: str, patch_size: int, *, with_token: bool) -> dict[str, Any]:
    """Backbone and readout, 64 wide: a ViT of four blocks, or a CaiT of four and one of class attention."""
    sizes = {"patch_size": patch_size, "dim": 64, "depth": 4, "heads": 2}
    if architecture == "vit":
        return {"backbone": sizes | {"distillation_token": with_token}, "readout": {"kind": "token"}}
    trunk = {"attention": "talking_heads", "layer_scale": 0.1, "class_token": False}
    readout = {"kind": "class_attention", "depth": 1, "queries": 2 if with_token else 1}
    return {"backbone": sizes | trunk, "readout": readout}


def common(cell: Cell, steps: int) -> dict[str, Any]:
    """What teacher and student share. A search looks at held-out training images, never at the test's."""
    data = DATA[cell.data]
    search = cell.grid == "rates"
    return {
        "data": labelled(
            cell.data, image_size=data.image_size, held_out=0.25 if search else 0.0, search=search
        ),
        "labels": {"count": data.labels, "seed": cell.seed},
        "optim": {
            "steps": steps,
            "batch_size": BATCH,
            "lr": cell.lr,
            "warmup_steps": steps // 10,
            "clip_norm": 3.0,
        },
        "evaluate_every": steps if search else 100_000,
    }


def teacher_folder(runs: Path, data: str, seed: int) -> Path:
    return runs / f"teacher_{data}_{seed}"


def crops(cell: Cell) -> int:
    """As many as epochs: none is shown twice, so that caching their answers changes nothing."""
    data = DATA[cell.data]
    return -(-data.steps * cell.length // (data.labels // BATCH))


def answers_file(runs: Path, cell: Cell) -> Path:
    longer = f"_{cell.length}" if cell.length > 1 else ""
    return runs / f"answers_{cell.data}_{cell.seed}{longer}.bin"


def teach(cell: Cell, runs: Path) -> dict[str, Any]:
    """Ask a teacher about all crops that its students will see."""
    asking = cell._replace(architecture="vit", method="soft", lr=RATES[cell.data, "vit"])
    begin = time.perf_counter()
    file = state(student_config(asking, runs), runs / f"teach_{answers_file(runs, cell).stem}", cell.seed)
    python("-m", "mpm", "teach", str(file))
    return {
        "crops": crops(cell),
        "bytes": answers_file(runs, cell).stat().st_size,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def student_config(cell: Cell, runs: Path) -> dict[str, Any]:
    data = DATA[cell.data]
    kind, _, token = cell.method.partition("_")
    config = common(cell, data.steps * cell.length) | student(
        cell.architecture, data.patch_size, with_token=bool(token)
    )
    if kind != "none":
        config["distillation"] = {
            "kind": kind,
            "through": token or "class",
            "teacher": {"kind": "checkpoint", "checkpoint": str(teacher_folder(runs, cell.data, cell.seed))},
            "crops": crops(cell),
            "cache": str(answers_file(runs, cell)),
        }
    return config


def run_cell(cell: Cell, runs: Path) -> dict[str, Any]:
    """Train a teacher, keep its answers, or train a student; the outcome."""
    data = DATA[cell.data]
    if cell.method == "answers":
        return teach(cell, runs)
    if cell.method == "teacher":
        config = common(cell, data.teacher_steps) | {"network": {"model": TEACHER}}
        return train("finetune", config, teacher_folder(runs, cell.data, cell.seed), cell.seed, metrics=KEPT)
    return train("finetune", student_config(cell, runs), runs / cell.name, cell.seed, metrics=KEPT)


def grid_teachers(seeds: int) -> Iterator[Cell]:
    for seed in range(seeds):
        for data in DATA:
            yield Cell("runs", data, TEACHER, "teacher", seed, TEACHER_LR)


def grid_answers(seeds: int) -> Iterator[Cell]:
    for seed in range(seeds):
        for data in DATA:
            yield Cell("runs", data, TEACHER, "answers", seed, TEACHER_LR)


def grid_students(seeds: int) -> Iterator[Cell]:
    for seed in range(seeds):
        for method in METHODS:
            for (data, architecture), lr in RATES.items():
                yield Cell("runs", data, architecture, method, seed, lr)


def grid_long(seeds: int) -> Iterator[Cell]:
    """Where a student has four times as long, each seed after the answers to its crops."""
    for seed in range(seeds):
        yield Cell("runs", "fashion_mnist", TEACHER, "answers", seed, TEACHER_LR, 4)
        for method in ("none", "hard_token", "hard"):
            yield Cell("runs", "fashion_mnist", "vit", method, seed, RATES["fashion_mnist", "vit"], 4)


def grid_rates(seeds: int) -> Iterator[Cell]:
    """Without a teacher, on a seed that is not reported and held-out training images."""
    for data, architecture in RATES:
        for lr in (1e-3, 2e-3, 4e-3):
            yield Cell("rates", data, architecture, "none", SEARCH_SEED, lr)


GRIDS = {
    "teachers": grid_teachers,
    "answers": grid_answers,
    "rates": grid_rates,
    "students": grid_students,
    "long": grid_long,
}


def table(records: list[dict[str, Any]]) -> str:
    """Means and deviations over seeds, in percent, best first; cosines of the two tokens."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        cell = record["cell"]
        if cell["method"] == "answers":
            continue
        key = (cell["grid"], cell["data"], cell["architecture"], cell["method"])
        if cell["grid"] == "rates":
            key += (str(cell["lr"]),)
        if cell.get("length", 1) > 1:
            key += (f"x{cell['length']}",)
        groups.setdefault(key, []).append(record["outcome"])
    lines = []
    for key, outcomes in sorted(groups.items(), key=lambda item: (item[0][:2], -sum(map(top1, item[1])))):
        line = f"{' '.join(key):<50} {mean_and_deviation([top1(o) for o in outcomes])}"
        heads = [outcome["heads"] for outcome in outcomes if "heads" in outcome]
        for head in ("class", "distillation") if heads else ():
            line += f"  {head} {mean_and_deviation([h['top1'][head] for h in heads])}"
        if heads:
            cosines = {name: [h["cosine"][name] for h in heads] for name in heads[0]["cosine"]}
            shown = ", ".join(
                f"{name} {mean_and_deviation(values, unit=1.0)}" for name, values in cosines.items()
            )
            line += f"  cosine: {shown}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = grid_parser("Distillation on small networks.", GRIDS, runs="runs/distillation")
    options = parser.parse_args()
    cells = [cell for cell in GRIDS[options.grid](options.seeds) if (options.only or "") in cell.name]
    records = known(options.out)
    if options.table:
        names = {cell.name for cell in cells}
        print(table([record for record in records if record["name"] in names]))
        return
    runs = options.runs.absolute()
    jobs = [Job({"name": cell.name, "cell": cell._asdict()}, partial(run_cell, cell, runs)) for cell in cells]
    results = Results("distillation", torch.device("cpu"), out=options.out, packages=["timm"])
    finished = {record["name"] for record in records}
    run_grid(jobs, results, finished=finished, parallel=options.parallel)


if __name__ == "__main__":
    main()
