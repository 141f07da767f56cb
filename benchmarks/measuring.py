"""What the benchmarks share: interleaved rounds, memory, and one JSON line per case.

A round times ours, theirs, theirs, ours, so that a machine that slows down steadily slows down both. Its
ratio is theirs / ours: above 1, ours is faster. A comparison is the median of the ratios with their range.
"""

import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

_FEWEST_ROUNDS = 5
_NO_DIFFERENCE = 0.05


class Comparison(NamedTuple):
    """Seconds of a unit of work (a step, an image), by each, and the ratio of each round."""

    ours_s: list[float]
    theirs_s: list[float]
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """What may be said; nothing where the range is wider than the effect."""
        if len(self.ratios) < _FEWEST_ROUNDS:
            return f"none: fewer than {_FEWEST_ROUNDS} rounds"
        if max(self.ratios) - min(self.ratios) > abs(self.ratio - 1):
            return "none: the range is wider than the effect"
        if abs(self.ratio - 1) < _NO_DIFFERENCE:
            return "no difference"
        return f"{'faster' if self.ratio > 1 else 'slower'}, {self.ratio:.2f}x"

    def record(self, ours: str, theirs: str) -> dict[str, Any]:
        """For the JSON line."""
        return {
            "seconds": {ours: spread(self.ours_s), theirs: spread(self.theirs_s)},
            "ratio": {
                "median": significant(self.ratio),
                "min": significant(min(self.ratios)),
                "max": significant(max(self.ratios)),
                "rounds": [significant(ratio) for ratio in self.ratios],
            },
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        low, high = min(self.ratios), max(self.ratios)
        return f"{self.ratio:.2f}x ({low:.2f} to {high:.2f}), verdict: {self.verdict}"


def interleaved(
    ours: Callable[[], list[float]],
    theirs: Callable[[], list[float]],
    *,
    rounds: int,
    before_round: Callable[[], object] = lambda: None,
) -> Comparison:
    """Time two contenders in turns; each call is one turn and gives the seconds of its units of work."""
    comparison = Comparison([], [], [])
    for _ in range(rounds):
        before_round()
        first, *middle, last = ours(), theirs(), theirs(), ours()
        mine, others = first + last, middle[0] + middle[1]
        comparison.ours_s.extend(mine)
        comparison.theirs_s.extend(others)
        comparison.ratios.append(statistics.mean(others) / statistics.mean(mine))
    return comparison


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 10 % and 90 % quantiles."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    names = {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}
    return {name: significant(value) for name, value in names.items()}


def significant(value: float) -> float:
    """Rounded to five significant digits: more is noise."""
    return float(f"{value:.5g}")


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process ever held: on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before it started this program
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Results:
    """Prints each case as a JSON line at once, appends it to a file, and ends with one readable line each.

    Args:
        benchmark: its name.
        device: that was measured.
        out: the file; None: only print.
        packages: whose versions matter, beside torch.
    """

    def __init__(self, benchmark: str, device: torch.device, *, out: Path | None, packages: Sequence[str]):
        self._out = out
        self._summaries: list[str] = []
        self._facts = {
            "benchmark": benchmark,
            "command": " ".join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: metadata.version(package) for package in packages},
            "mpm_commit": _commit(),
        }

    def add(self, record: dict[str, Any], summary: str) -> None:
        """One case."""
        line = json.dumps({**self._facts, **record})
        print(line, flush=True)
        self._summaries.append(summary)
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            with self._out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def finish(self) -> None:
        """The readable lines."""
        print("\n".join(self._summaries))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    """Of the working tree, marked where the package has uncommitted changes."""
    commit, changed = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "--", "mpm")
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    try:
        finished = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return finished.stdout.strip()
