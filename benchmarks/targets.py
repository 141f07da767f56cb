"""What masked pretraining is worth by its target, and what the stem adds: grids of whole small runs.

    python -m benchmarks.targets tokenizers --out FILE    # k-means, dVAE, VQ-KD on both data sets
    python -m benchmarks.targets rates --out FILE         # the rates, on held-out training images
    python -m benchmarks.targets targets --out FILE       # scratch, MAE, SimMIM, BEiT, BEiT random, HOG
    python -m benchmarks.targets stems --out FILE         # hMLP, linear, conv under BEiT and supervision
    python -m benchmarks.targets long --out FILE          # the same, three or four times as long
    python -m benchmarks.targets length --out FILE        # MAE and BEiT, four and eight times as long
    python -m benchmarks.targets targets --out FILE --table    # what is finished

A cell is one data set, method and seed: it pretrains, fine-tunes, looks at the test images once, and appends
one JSON line to FILE. Finished cells are passed over and stopped ones continue, so the same command goes on
after any stop. Cells run on one thread each. Needs data/FashionMNIST (scripts/fetch_fashion_mnist.py) and
data/clipart (scripts/shrink_images.py).
"""

import statistics
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import Results
from benchmarks.runs import Job, grid_parser, known, mean_and_deviation, run_grid, top1, train
from benchmarks.small_images import labelled, unlabelled


class Data(NamedTuple):
    """What differs between the data sets, and how long is trained."""

    image_size: int
    patch_size: int
    mae_ratio: float  # a grid of 4x4 leaves four patches at 0.75
    dvae_view: int  # pixels a side: a dVAE of three layers has a code for 8, whatever a patch is
    labels: int
    pretrain_steps: int
    finetune_steps: int


DATA = {
    "fashion_mnist": Data(28, 7, 0.6, 32, labels=1000, pretrain_steps=1500, finetune_steps=800),
    "clipart": Data(64, 16, 0.6, 32, labels=1000, pretrain_steps=2000, finetune_steps=800),
}
SMALL = {"dim": 64, "depth": 4, "heads": 2}
BLOCKS = {"kind": "block", "ratio": 0.4, "min_area": 2}
LINEAR = {"kind": "linear"}
DECODER = {"kind": "decoder", "dim": 32, "depth": 2, "heads": 2}
TOKENIZER_BATCH, PRETRAIN_BATCH, FINETUNE_BATCH = 128, 64, 64
# the last of each in metrics.jsonl
KEPT = (
    "train/loss",
    "train/code_accuracy",
    "train/images_per_s",
    "probe/rank_me",
    "probe/perplexity",
    "probe/live_codes",
    "probe/frequent_code",
    "val/model_top1",
)
SEARCH_SEED = 100
STEMS = {
    "hmlp": {"kind": "hmlp", "norm": "batch", "statistics": "all"},
    "linear": {"kind": "linear"},
    "conv": {"kind": "conv", "norm": "batch"},
}


def hog(data: Data) -> dict[str, Any]:
    """Histograms of oriented gradients in cells that divide a patch."""
    return {"kind": "hog", "cells": 1 if data.patch_size % 2 else 2}


def objective(method: str, tokenizers: Path, data: str) -> dict[str, Any]:
    """Mask and objective of a method."""
    name, _, codes = method.partition(":")
    if name in ("beit", "beit_decoder", "beitv2"):
        predictor = {
            "beit": LINEAR,
            "beit_decoder": DECODER,
            "beitv2": {"kind": "class_pretraining", "early_layer": 3, "depth": 2},
        }[name]
        target = {
            "kind": "codes",
            "tokenizer": str(tokenizers / f"{data}_{codes}"),
            "min_live": 0.0 if codes == "random" else 0.2,
        }
        mask = {"kind": "random", "ratio": 0.75} if name == "beit_decoder" else BLOCKS
        return {"mask": mask, "objective": {"kind": "masked", "predictor": predictor, "target": target}}
    pixels = {"kind": "pixels", "normalize_patches": True}
    chosen: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str | None]] = {
        "mae": ({"kind": "random", "ratio": DATA[data].mae_ratio}, DECODER, pixels, "l2"),
        "simmim": ({"kind": "random", "ratio": 0.6}, LINEAR, {"kind": "pixels"}, "l1"),
        "pixels": (BLOCKS, LINEAR, pixels, "l2"),
        "hog": (BLOCKS, LINEAR, hog(DATA[data]), "l2"),
        "latent": (BLOCKS, LINEAR, {"kind": "latent", "prototypes": 256, "momentum": 0.99}, None),
    }
    mask, predictor, target, loss = chosen[name]
    return {
        "mask": mask,
        "objective": {"kind": "masked", "predictor": predictor, "target": target, "loss": loss},
    }


def tokenizer_config(data: str, codes: str) -> dict[str, Any]:
    """A tokenizer of a data set: trained, or `random`, a dVAE that took one step at no rate."""
    chosen = DATA[data]
    dvae = {"kind": "dvae", "codes": 256, "code_dim": 64, "hidden": 48, "layers": 3, "blocks": 0}
    dvae["kl_weight"] = {"start": 0.02, "end": 0.02}
    vqkd = {"kind": "vqkd", "codes": 256, "code_dim": 16, "decoder_depth": 1, "teacher": hog(chosen)}
    raw = {"kind": "pixels", "patch_size": chosen.patch_size, "normalize_patches": False}
    learned: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "kmeans": ({"kind": "kmeans", "codes": 256, "input": raw}, {"steps": 300}),
        "dvae": (dvae, {"steps": 500, "lr": 6e-3, "warmup_steps": 50, "clip_norm": 1.0}),
        "random": (dvae, {"steps": 1, "lr": 1e-12}),
        "vqkd": (vqkd, {"steps": 600, "lr": 1e-3, "warmup_steps": 50, "clip_norm": 3.0}),
    }
    what, optim = learned[codes]
    config = {
        "data": unlabelled(data, chosen.dvae_view if what["kind"] == "dvae" else chosen.image_size),
        "objective": what,
        "optim": {"batch_size": TOKENIZER_BATCH, "dtype": "fp32" if codes == "kmeans" else "bf16"} | optim,
        "monitor": {"every": 100},
    }
    if codes == "vqkd":
        config["backbone"] = SMALL | {"patch_size": chosen.patch_size}
    return config


class Cell(NamedTuple):
    """One run of a grid, and what distinguishes it."""

    grid: str
    data: str
    method: str
    stem: str
    seed: int
    pretrain_lr: float
    finetune_lr: float
    layer_decay: float
    length: int = 1  # of pretraining, in steps of the data set

    @property
    def name(self) -> str:
        """Unique, for folders and the file of results."""
        parts = self if self.length > 1 else self[:-1]
        return "_".join(str(part).replace(":", "-") for part in parts)


def run_cell(cell: Cell, folder: Path, tokenizers: Path, *, search: bool) -> dict[str, Any]:
    """Pretrain, fine-tune; the outcome. A search looks at held-out training images, never at the test's."""
    data = DATA[cell.data]
    network = SMALL | {"patch_size": data.patch_size, "stem": STEMS[cell.stem]}
    outcome: dict[str, Any] = {}
    pretrained = None
    if cell.method != "scratch":
        pretrained = folder / cell.name / "pretrain"
        steps = data.pretrain_steps * cell.length
        config = {
            "data": unlabelled(cell.data, data.image_size),
            "backbone": network,
            "optim": {
                "steps": steps,
                "batch_size": PRETRAIN_BATCH,
                "lr": cell.pretrain_lr,
                "warmup_steps": steps // 10,
                "clip_norm": 3.0,
            },
            "monitor": {"every": 100_000},
            **objective(cell.method, tokenizers, cell.data),
        }
        outcome["pretrain"] = train("pretrain", config, pretrained, cell.seed, metrics=KEPT)
    config = {
        "data": labelled(
            cell.data, image_size=data.image_size, held_out=0.25 if search else 0.0, search=search
        ),
        "backbone": network | {"drop_path": 0.1},
        "readout": {"kind": "mean"},
        "optim": {
            "steps": data.finetune_steps,
            "batch_size": FINETUNE_BATCH,
            "lr": cell.finetune_lr,
            "warmup_steps": data.finetune_steps // 10,
            "layer_decay": cell.layer_decay,
            "clip_norm": 3.0,
        },
        "evaluate_every": data.finetune_steps if search else 100_000,
        "labels": {"count": data.labels, "seed": cell.seed},
        **({} if pretrained is None else {"init": {"checkpoint": str(pretrained)}}),
    }
    outcome["finetune"] = train("finetune", config, folder / cell.name / "finetune", cell.seed, metrics=KEPT)
    return outcome


# Grids

# found with `rates`: see docs/log.md
RATES: dict[str, float] = {"mae": 2e-3, "simmim": 2e-3, "beit": 2e-3, "hog": 2e-3}
TUNED = {"finetune_lr": 2e-3, "layer_decay": 0.8}
SCRATCH = {"pretrain_lr": 0.0, "finetune_lr": 2e-3, "layer_decay": 1.0}
METHODS = ("scratch", "beit:vqkd", "mae", "simmim", "beit:random", "hog")


def settings(method: str) -> dict[str, Any]:
    if method == "scratch":
        return SCRATCH
    return {"pretrain_lr": RATES.get(method.partition(":")[0], 2e-3), **TUNED}


def grid_targets(seeds: int) -> Iterator[Cell]:
    for seed in range(seeds):
        for method in METHODS:
            for data in DATA:
                yield Cell("runs", data, method, "hmlp", seed, **settings(method))


def grid_more(seeds: int) -> Iterator[Cell]:
    """Ablations of both papers (pixels under BEiT's masks, codes under MAE's decoder), BEiT v2, latent."""
    for seed in range(seeds):
        for method in ("beit:dvae", "beit:kmeans", "pixels", "beit_decoder:vqkd", "beitv2:vqkd", "latent"):
            for data in DATA:
                yield Cell("runs", data, method, "hmlp", seed, **settings(method))


def grid_stems(seeds: int) -> Iterator[Cell]:
    """In colour, a patch of 16 having the hierarchy of the paper; those with hMLP are cells of `targets`."""
    for seed in range(seeds):
        for method in ("scratch", "beit:vqkd"):
            for stem in STEMS:
                yield Cell("runs", "clipart", method, stem, seed, **settings(method))


# pretraining long enough to pay, in steps of the data set: see docs/evidence.md
LENGTHS = {"fashion_mnist": 4, "clipart": 3}


def grid_long(seeds: int) -> Iterator[Cell]:
    """The targets where pretraining has time; from scratch as in `targets`."""
    for seed in range(seeds):
        for method in METHODS[1:]:
            for data, length in LENGTHS.items():
                yield Cell("runs", data, method, "hmlp", seed, **settings(method), length=length)


def grid_length(seeds: int) -> Iterator[Cell]:
    """How MAE and BEiT gain with length."""
    for seed in range(seeds):
        for length in (4, 8):
            for method in ("beit:vqkd", "mae"):
                yield Cell("runs", "fashion_mnist", method, "hmlp", seed, **settings(method), length=length)


def grid_rates(seeds: int) -> Iterator[Cell]:
    """On a seed that is not reported, and on held-out training images."""
    for data in DATA:
        for lr in (1e-3, 2e-3, 4e-3):
            yield Cell("rates", data, "scratch", "hmlp", SEARCH_SEED, 0.0, lr, 1.0)
        for lr in (2e-3, 4e-3):
            yield Cell("rates", data, "beit:vqkd", "hmlp", SEARCH_SEED, 2e-3, lr, 0.8)
    for method in ("beit:vqkd", "mae"):
        for lr in (1e-3, 4e-3):
            yield Cell("rates", "fashion_mnist", method, "hmlp", SEARCH_SEED, lr, **TUNED)


GRIDS = {
    "targets": grid_targets,
    "more": grid_more,
    "stems": grid_stems,
    "long": grid_long,
    "length": grid_length,
    "rates": grid_rates,
}


def table(records: list[dict[str, Any]]) -> str:
    """Mean and deviation of each method over its seeds, best first."""
    scores: dict[tuple[str, ...], list[float]] = {}
    for record in records:
        outcome = record["outcome"]["finetune"]
        key = tuple(str(record["cell"][part]) for part in ("grid", "data", "stem", "method"))
        if record["cell"].get("length", 1) > 1:
            key += (f"x{record['cell']['length']}",)
        if record["cell"]["grid"] == "rates":
            key += tuple(str(record["cell"][part]) for part in ("pretrain_lr", "finetune_lr", "layer_decay"))
        scores.setdefault(key, []).append(top1(outcome))
    lines = []
    for key, values in sorted(scores.items(), key=lambda item: (item[0][:2], -statistics.mean(item[1]))):
        lines.append(f"{' '.join(key):<60} {mean_and_deviation(values)}")
    return "\n".join(lines)


def main() -> None:
    parser = grid_parser(
        "Masked targets and stems on small networks.", ["tokenizers", *GRIDS], runs="runs/targets"
    )
    options = parser.parse_args()
    tokenizers = (options.runs / "tokenizers").absolute()
    records = known(options.out)
    if options.table:
        if options.grid not in GRIDS:
            parser.error(f"no table of {options.grid}; its lines in {options.out} tell all")
        names = {cell.name for cell in GRIDS[options.grid](options.seeds)}
        print(table([record for record in records if record["name"] in names]))
        return
    if options.grid == "tokenizers":
        jobs = tokenizer_jobs(tokenizers)
    else:
        jobs = cell_jobs(GRIDS[options.grid](options.seeds), options.runs.absolute(), tokenizers)
    jobs = (job for job in jobs if (options.only or "") in job.record["name"])
    results = Results("targets", torch.device("cpu"), out=options.out, packages=["timm"])
    finished = {record["name"] for record in records}
    run_grid(jobs, results, finished=finished, parallel=options.parallel)


def cell_jobs(cells: Iterable[Cell], folder: Path, tokenizers: Path) -> Iterator[Job]:
    for cell in cells:
        run = partial(run_cell, cell, folder, tokenizers, search=cell.grid == "rates")
        yield Job({"name": cell.name, "cell": cell._asdict()}, run)


def tokenizer_jobs(folder: Path) -> Iterator[Job]:
    for data in DATA:
        for codes in ("kmeans", "dvae", "vqkd", "random"):
            name = f"{data}_{codes}"
            config = tokenizer_config(data, codes)
            yield Job(
                {"name": f"tokenizer_{name}"},
                partial(train, "pretrain", config, folder / name, 0, metrics=KEPT),
            )


if __name__ == "__main__":
    main()
