"""What tuning a part of a network costs and keeps: attention, MLPs, norms or the head, against all of it.

    python -m benchmarks.tuning bases --out FILE          # the networks that are tuned
    python -m benchmarks.tuning rates --out FILE          # the rates, on held-out training images
    python -m benchmarks.tuning tuning --out FILE         # accuracy, seconds and bytes, three seeds each
    python -m benchmarks.tuning tuning --out FILE --table # what is finished
    python -m benchmarks.tuning cost --out FILE           # memory and seconds of a step, without training

Settings: `resolution` trains on clip art at 48 px and tunes at 64 px (patch 8); `transfer` trains on
Fashion-MNIST and tunes on 1,000 images of clip art in colour (patch 7, 42 px). A base is supervised, one a
seed. A cell is one setting, part and seed: one JSON line in FILE. Finished cells are passed over and stopped
ones continue, so the same command goes on after any stop.

`cost` takes training steps of random images with the mpm loop, each part in a process of its own that waits
while the other is timed, and gives the ratio of seconds all / part (above 1: the part is faster), the peak
memory of each process, `bare` being one that has built nothing, the ratio of what is above that, part / all,
and the share of the weights that a checkpoint stores. "Three things" (arXiv:2203.09795, section 4) says 10 %
less memory, about 10 % faster, 66 % less storage.

Needs data/FashionMNIST (scripts/fetch_fashion_mnist.py) and data/clipart (scripts/shrink_images.py).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import Results, interleaved, significant
from benchmarks.processes import StepProcess
from benchmarks.runs import Job, grid_parser, known, mean_and_deviation, run_grid, top1, train
from benchmarks.small_images import labelled

PARTS = ("all", "attention", "mlp", "norm", "head")
NETWORK = {
    "dim": 64,
    "depth": 6,
    "heads": 2,
    "layer_scale": 0.1,
    "stem": {"kind": "hmlp", "norm": "batch"},
}
BATCH = 64
SEARCH_SEED = 100


class Stage(NamedTuple):
    """One training of two: data, image side in pixels, optimizer steps, labelled images (None: all)."""

    data: str
    image_size: int
    steps: int
    labels: int | None = None


class Setting(NamedTuple):
    """A base and what it is tuned to."""

    patch_size: int
    base: Stage
    tuned: Stage


SETTINGS = {
    "resolution": Setting(8, Stage("clipart", 48, 800), Stage("clipart", 64, 200)),
    "transfer": Setting(7, Stage("fashion_mnist", 28, 1000), Stage("clipart", 42, 300, 1000)),
}
BASE_LR = 2e-3
_FEW = {"norm": (1e-3, 3e-3, 1e-2), "head": (3e-3, 1e-2, 3e-2)}
_MORE = {"norm": (1e-3, 3e-3, 1e-2, 3e-2), "head": (3e-3, 1e-2, 3e-2, 0.1)}
SEARCHED = {
    "resolution": dict.fromkeys(PARTS, (3e-4, 1e-3, 3e-3)) | _FEW,
    "transfer": dict.fromkeys(PARTS, (3e-4, 1e-3, 3e-3, 1e-2)) | _MORE,
}
# found with `rates`
RATES = {
    "resolution": {"all": 1e-3, "attention": 3e-3, "mlp": 3e-3, "norm": 3e-3, "head": 3e-3},
    "transfer": {"all": 3e-3, "attention": 3e-3, "mlp": 3e-3, "norm": 1e-2, "head": 3e-2},
}


class Cell(NamedTuple):
    """One tuning, and what distinguishes it."""

    grid: str
    setting: str
    part: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """Unique, for folders and the file of results."""
        return "_".join(map(str, self))


def config(stage: Stage, *, lr: float, seed: int, search: bool) -> dict[str, Any]:
    """Fine-tuning of a stage, without network and start."""
    return {
        "data": labelled(
            stage.data, image_size=stage.image_size, held_out=0.25 if search else 0.0, search=search
        ),
        "readout": {"kind": "token"},
        "optim": {
            "steps": stage.steps,
            "batch_size": BATCH,
            "lr": lr,
            "warmup_steps": stage.steps // 10,
            "clip_norm": 3.0,
        },
        "evaluate_every": stage.steps if search else 100_000,
        **({} if stage.labels is None else {"labels": {"count": stage.labels, "seed": seed}}),
    }


def base_of(folder: Path, setting: str, seed: int) -> Path:
    return folder / f"base_{setting}_{seed}"


def train_base(folder: Path, setting: str, seed: int) -> dict[str, Any]:
    chosen = SETTINGS[setting]
    network = {"backbone": NETWORK | {"patch_size": chosen.patch_size, "drop_path": 0.1}}
    stated = config(chosen.base, lr=BASE_LR, seed=seed, search=False) | network
    return train("finetune", stated, base_of(folder, setting, seed), seed)


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Tune a base; a search looks at held-out training images, never at the test's."""
    base = base_of(folder, cell.setting, cell.seed)
    if not (base / "result.json").exists():
        raise FileNotFoundError(f"{base} is not finished; run `bases` first")
    stage = SETTINGS[cell.setting].tuned
    stated = config(stage, lr=cell.lr, seed=cell.seed, search=cell.grid == "rates")
    stated |= {"init": {"checkpoint": str(base)}, "tune": cell.part}
    run = folder / cell.name
    outcome = train("finetune", stated, run, cell.seed, metrics=("train/loss", "val/model_top1"))
    (weights,) = run.glob("checkpoints/step_*/model.safetensors")
    return outcome | {"stored_bytes": weights.stat().st_size}


# Grids


def grid_tuning(seeds: int) -> Iterator[Cell]:
    for seed, setting, part in itertools.product(range(seeds), SETTINGS, PARTS):
        yield Cell("runs", setting, part, seed, RATES[setting][part])


def grid_rates(seeds: int) -> Iterator[Cell]:
    """On a seed that is not reported, and on held-out training images."""
    for setting, part in itertools.product(SETTINGS, PARTS):
        for lr in SEARCHED[setting][part]:
            yield Cell("rates", setting, part, SEARCH_SEED, lr)


GRIDS = {"tuning": grid_tuning, "rates": grid_rates}


def base_jobs(folder: Path, seeds: int) -> Iterator[Job]:
    for seed, setting in itertools.product((*range(seeds), SEARCH_SEED), SETTINGS):
        yield Job({"name": f"base_{setting}_{seed}"}, partial(train_base, folder, setting, seed))


def table(records: list[dict[str, Any]]) -> str:
    """Top-1, mean seconds and bytes of each setting and part."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        cell = record["cell"]
        rate = (f"{cell['lr']:g}",) if cell["grid"] == "rates" else ()
        groups.setdefault((cell["setting"], cell["part"], *rate), []).append(record["outcome"])
    lines = []
    for key, outcomes in sorted(groups.items(), key=lambda item: (item[0][0], PARTS.index(item[0][1]))):
        scores = [top1(outcome) for outcome in outcomes]
        seconds = sum(o["seconds"] for o in outcomes) / len(outcomes)
        stored = outcomes[0]["stored_bytes"]
        lines.append(
            f"{' '.join(key):<30} {mean_and_deviation(scores)}  {seconds:6.1f} s  {stored:>9,} bytes"
        )
    return "\n".join(lines)


# Cost of a step


class Case(NamedTuple):
    """A network whose parts are compared."""

    variant: str
    image_size: int
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.variant} at {self.image_size}, batch {self.batch}, {self.dtype}"


def network_of(case: Case, part: str) -> Any:
    from mpm.backbones import create_classifier
    from mpm.backbones.tuning import tune

    network = create_classifier(case.variant, image_size=case.image_size)
    tune(network, part)  # type: ignore[arg-type]
    return network


def start(case: Case, part: str, device: torch.device) -> Callable[[], object]:
    """One step of fine-tuning as a function, with this process set up for it; `bare` builds nothing."""
    import torch._dynamo  # which an optimizer imports; `bare` has none

    from mpm.objectives.supervised import Classification, LabelledInputs, cross_entropy
    from mpm.training.allocator import keep_freed_memory
    from mpm.training.loop import train_steps
    from mpm.training.optimizer import create_adamw, parameter_groups

    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    torch.manual_seed(0)
    inputs = LabelledInputs(
        torch.randn(case.batch, 3, case.image_size, case.image_size, device=device),
        torch.randn(case.batch, 1000, device=device).softmax(1),
    )
    if part == "bare":
        return lambda: None
    objective = Classification(network_of(case, part).to(device), loss=cross_entropy)
    steps = train_steps(
        objective,
        itertools.repeat(inputs),
        prepare=lambda batch: batch,
        optimizer=create_adamw(
            parameter_groups(objective, lr=1e-5, weight_decay=0.1), lr=1e-5, betas=(0.9, 0.999)
        ),
        lr_at=lambda step: 1e-5,
        start=0,
        stop=10**6,
        dtype=torch.bfloat16 if case.dtype == "bf16" else torch.float32,
    )
    return lambda: next(steps)


def compare(case: Case, part: str, device: torch.device, *, rounds: int, steps: int) -> dict[str, Any]:
    with StepProcess(start, case, part, device) as ours, StepProcess(start, case, "all", device) as theirs:
        for contender in (ours, theirs):
            contender.run(2)
        comparison = interleaved(lambda: ours.run(steps), lambda: theirs.run(steps), rounds=rounds)
        peaks = {part: ours.peak_memory_bytes(), "all": theirs.peak_memory_bytes()}
    with StepProcess(start, case, "bare", device) as bare:
        peaks["bare"] = bare.peak_memory_bytes()
    with torch.device("meta"):
        network = network_of(case, part)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in network.parameters())
    return {
        **comparison.record(part, "all"),
        "peak_memory_bytes": peaks,
        "memory_ratio": significant((peaks[part] - peaks["bare"]) / (peaks["all"] - peaks["bare"])),
        "stored_share": significant(trained / everything),
    }


def main() -> None:
    parser = grid_parser("Tuning a part of a network.", ["bases", *GRIDS, "cost"], runs="runs/tuning")
    parser.add_argument("--device", default="cpu", help="of `cost`")
    parser.add_argument("--variant", default="deit3_s", help="of `cost`")
    parser.add_argument("--image-size", type=int, default=224, help="of `cost`")
    parser.add_argument("--batch", type=int, default=8, help="of `cost`")
    parser.add_argument("--rounds", type=int, default=7, help="of `cost`")
    parser.add_argument("--steps", type=int, default=2, help="of `cost`, in each of a round's turns")
    options = parser.parse_args()
    device = torch.device(options.device)
    records = known(options.out)
    if options.table:
        if options.grid not in GRIDS:
            parser.error(f"no table of {options.grid}; its lines in {options.out} tell all")
        names = {cell.name for cell in GRIDS[options.grid](options.seeds)}
        print(table([record for record in records if record["name"] in names]))
        return
    folder = options.runs.absolute()
    jobs: list[Job] = []
    if options.grid == "bases":
        jobs = list(base_jobs(folder, options.seeds))
    elif options.grid == "cost":
        options.parallel = 1  # timings
        for dtype, part in itertools.product(("fp32", "bf16"), ("attention", "mlp", "norm", "head")):
            case = Case(options.variant, options.image_size, options.batch, dtype)
            record = {"name": f"{case.name}, {part} on {device}", "case": case._asdict(), "part": part}
            run = partial(compare, case, part, device, rounds=options.rounds, steps=options.steps)
            jobs.append(Job(record, run))
    else:
        jobs = [
            Job({"name": cell.name, "cell": cell._asdict()}, partial(run_cell, cell, folder))
            for cell in GRIDS[options.grid](options.seeds)
        ]
    jobs = [job for job in jobs if (options.only or "") in job.record["name"]]
    results = Results("tuning", device, out=options.out, packages=["timm"])
    run_grid(jobs, results, finished={r["name"] for r in records}, parallel=options.parallel)


if __name__ == "__main__":
    main()
