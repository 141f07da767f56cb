"""Grids of whole runs by `pretrain.py` and `finetune.py`.

A cell is one line of the results. Finished cells are passed over and stopped ones continue, so the same
command goes on after any stop.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import Results

ROOT = Path(__file__).parents[1]


class Job(NamedTuple):
    """A cell: `record` (with its `name`) opens its line, what `run` gives ends it as `outcome`."""

    record: dict[str, Any]
    run: Callable[[], dict[str, Any]]


def grid_parser(description: str, grids: Iterable[str], *, runs: str) -> argparse.ArgumentParser:
    """Options of a script of grids, whose runs lie in the folder `runs`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("grid", choices=list(grids))
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument("--out", type=Path, required=True, help="file of results, a JSON line a cell")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--only", help="cells whose name holds this")
    parser.add_argument("--table", action="store_true", help="say what is finished, run nothing")
    return parser


def known(out: Path) -> list[dict[str, Any]]:
    """The finished cells of a file of results."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def run_grid(jobs: Iterable[Job], results: Results, *, finished: set[str], parallel: int) -> None:
    """Run the cells that are not finished, `parallel` at a time; one that fails is told and passed over."""
    with ThreadPoolExecutor(parallel) as pool:
        pending = {pool.submit(job.run): job for job in jobs if job.record["name"] not in finished}
        for done in as_completed(pending):
            record = pending[done].record
            if (error := done.exception()) is not None:
                print(f"{record['name']} failed: {error}", file=sys.stderr)
                continue
            results.add(record | {"outcome": done.result()}, f"{record['name']} finished")


def curve(folder: Path, name: str) -> dict[int, float]:
    """A metric of a run by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def top1(outcome: dict[str, Any]) -> float:
    """Of fine-tuning: on the test images, or on held-out ones where a search did not look at these."""
    value = outcome["test"]["top1"] if "test" in outcome else outcome["val/model_top1"]
    return float(value)


def mean_and_deviation(values: list[float], *, unit: float = 100.0) -> str:
    """Of a sample, with its size; in per cent, or in another unit."""
    deviation = f"{unit * statistics.stdev(values):.2f}" if len(values) > 1 else "-"
    return f"{unit * statistics.mean(values):6.2f} +- {deviation:>5} ({len(values)})"


def state(config: dict[str, Any], folder: Path, seed: int) -> Path:
    """The file of a configuration, of a run on one thread."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "output_dir": str(folder),
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "keep": 1,
        "save_every": 200,
    }
    file = folder / "stated.json"  # JSON is YAML
    file.write_text(json.dumps({"seed": seed, "run": run, **config}, indent=1))
    return file


def python(*words: str) -> None:
    """Run a program of this repository.

    Raises:
        RuntimeError: with the end of what it wrote, if it failed.
    """
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{ended.stderr[-2000:]}")


def train(
    script: str, config: dict[str, Any], folder: Path, seed: int, *, metrics: Iterable[str] = ()
) -> dict[str, Any]:
    """Run a script to its end, or further, on one thread.

    Args:
        script: `pretrain` or `finetune`.
        config: all but `seed` and `run`.
        folder: of the run.
        seed: of the run.
        metrics: whose last value is kept.

    Returns:
        Those metrics, fine-tuning's `result.json`, and the `seconds` of this call.

    Raises:
        RuntimeError: with the end of what it wrote, if it failed.
    """
    begin = time.perf_counter()
    python(f"{script}.py", "--config", str(state(config, folder, seed)))
    last: dict[str, Any] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    outcome = {key: last[key] for key in metrics if key in last}
    result = folder / "result.json"
    if result.exists():
        outcome |= json.loads(result.read_text())
    return outcome | {"seconds": round(time.perf_counter() - begin, 1)}
