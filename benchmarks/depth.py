"""What LayerScale, class attention and parallel branches are worth in deep, thin networks.

    python -m benchmarks.depth rates --out FILE           # the rates, on held-out training images
    python -m benchmarks.depth depth --out FILE           # 24 and 36 blocks, with LayerScale and without
    python -m benchmarks.depth parallel --out FILE        # 24x1 against 12x2, 36x1 against 18x2
    python -m benchmarks.depth depth --out FILE --table   # what is finished

A cell is one network and seed, trained from scratch on Fashion-MNIST for 700 steps: one JSON line in FILE
with the loss by step (the mean of the steps before it), the accuracy on held-out training images by step, and
the test's at the end. Finished cells are passed over and stopped ones continue, so the same command goes on
after any stop; cells that two grids share run once.

LayerScale starts at CaiT's values (arXiv:2103.17239): 1e-5 for 24 blocks, 1e-6 for 36. `class` of N blocks
is N - 2 blocks without a class token and two of class attention, which have as many parameters each. An N x P
trunk ("Three things", arXiv:2203.09795, section 3) has as many parameters as N P blocks. Nothing but these
differs between two networks, and the rate: each kind, LayerScale and not, has the best of three.

Needs data/FashionMNIST (scripts/fetch_fashion_mnist.py).
"""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import Results
from benchmarks.runs import Job, curve, grid_parser, known, mean_and_deviation, run_grid, top1, train
from benchmarks.small_images import labelled

IMAGE_SIZE, PATCH_SIZE, STEPS, SEARCH_STEPS = 28, 7, 700, 350
DIM, HEADS, BATCH = 48, 4, 32
LAYER_SCALE = {24: 1e-5, 36: 1e-6}
CLASS_BLOCKS = 2
SEARCH_SEED = 100
SEARCHED = {True: (1e-3, 2e-3, 4e-3), False: (5e-4, 1e-3, 2e-3)}
# with LayerScale and without, found with `rates`
RATES = {True: 2e-3, False: 2e-3}
LOOKS = 4  # at held-out images, evenly spread


class Cell(NamedTuple):
    """One network, and what distinguishes it."""

    grid: str
    depth: int  # blocks, one after the other or side by side
    branches: int
    layer_scale: bool
    reader: str  # "token" or "class"
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """Unique, for folders and the file of results."""
        scale = "scaled" if self.layer_scale else "plain"
        shape = f"{self.depth // self.branches}x{self.branches}"
        return "_".join(map(str, (self.grid, shape, scale, self.reader, self.seed, self.lr)))


def network(cell: Cell) -> dict[str, Any]:
    """Backbone and readout."""
    in_readout = CLASS_BLOCKS if cell.reader == "class" else 0
    backbone = {
        "patch_size": PATCH_SIZE,
        "dim": DIM,
        "depth": (cell.depth - in_readout) // cell.branches,
        "branches": cell.branches,
        "heads": HEADS,
        "class_token": cell.reader == "token",
        "layer_scale": LAYER_SCALE[cell.depth] if cell.layer_scale else "none",
    }
    readout: dict[str, Any] = {"kind": "token"}
    if cell.reader == "class":
        readout = {"kind": "class_attention", "depth": CLASS_BLOCKS}
    return {"backbone": backbone, "readout": readout}


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train from scratch. A search looks at held-out training images, never at the test's."""
    steps = SEARCH_STEPS if cell.grid == "rates" else STEPS
    config = {
        **network(cell),
        "data": labelled("fashion_mnist", image_size=IMAGE_SIZE, held_out=0.02, search=cell.grid == "rates"),
        "optim": {
            "steps": steps,
            "batch_size": BATCH,
            "lr": cell.lr,
            "warmup_steps": steps // 10,
            "clip_norm": 3.0,
        },
        "evaluate_every": steps // LOOKS,
    }
    run = folder / cell.name
    outcome = train("finetune", config, run, cell.seed, metrics=("train/loss", "val/model_top1"))
    curves = {name: curve(run, name) for name in ("train/loss", "train/grad_norm", "val/model_top1")}
    return outcome | {"curves": curves}


# Grids


def grid_depth(seeds: int) -> Iterator[Cell]:
    for seed, depth in itertools.product(range(seeds), LAYER_SCALE):
        for scaled, reader in itertools.product((True, False), ("token", "class")):
            yield Cell("runs", depth, 1, scaled, reader, seed, RATES[scaled])


def grid_parallel(seeds: int) -> Iterator[Cell]:
    """With LayerScale; the sequential ones are cells of `depth`."""
    for seed, depth, branches in itertools.product(range(seeds), LAYER_SCALE, (1, 2)):
        yield Cell("runs", depth, branches, True, "token", seed, RATES[True])


def grid_rates(seeds: int) -> Iterator[Cell]:
    """On a seed that is not reported, for both kinds of 24 blocks."""
    for scaled, rates in SEARCHED.items():
        for lr in rates:
            yield Cell("rates", 24, 1, scaled, "token", SEARCH_SEED, lr)


GRIDS = {"depth": grid_depth, "parallel": grid_parallel, "rates": grid_rates}


def table(records: list[dict[str, Any]]) -> str:
    """Top-1 and the loss on the way, each over the seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        cell = Cell(**record["cell"])
        key = cell._replace(seed=0).name.replace("_0_", "_")
        groups.setdefault(key, []).append(record["outcome"])
    lines = []
    for key, outcomes in sorted(groups.items()):
        scores = [top1(outcome) for outcome in outcomes]
        losses = [o["curves"]["train/loss"] for o in outcomes]
        way = "  ".join(
            f"{step}: {sum(loss[step] for loss in losses) / len(losses):.3f}" for step in losses[0]
        )
        lines.append(f"{key:<50} {mean_and_deviation(scores)}  loss {way}")
    return "\n".join(lines)


def main() -> None:
    parser = grid_parser("Deep, thin networks from scratch.", GRIDS, runs="runs/depth")
    options = parser.parse_args()
    records = known(options.out)
    cells = [cell for cell in GRIDS[options.grid](options.seeds) if (options.only or "") in cell.name]
    if options.table:
        names = {cell.name for cell in cells}
        print(table([record for record in records if record["name"] in names]))
        return
    folder = options.runs.absolute()
    jobs = [Job({"name": c.name, "cell": c._asdict()}, partial(run_cell, c, folder)) for c in cells]
    results = Results("depth", torch.device("cpu"), out=options.out, packages=["timm"])
    run_grid(jobs, results, finished={r["name"] for r in records}, parallel=options.parallel)


if __name__ == "__main__":
    main()
