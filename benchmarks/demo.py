"""What pretraining is worth with few labels: Fashion-MNIST, end to end.

    python benchmarks/demo.py             # or: make demo
    python benchmarks/demo.py --smoke     # a few steps of everything, in a temporary folder

Pretrains on all 60,000 training images without labels, fine-tunes on few of them, trains the same network
from scratch in the same way, and fits logistic regression to the raw pixels of the same labelled images.
Prints one table. Started again, it goes on where it stopped; what is finished is kept. The numbers are also
in RUNS/demo.json.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpm import configfile
from mpm.config import FinetuneConfig
from mpm.data.datasets import ImageSource
from mpm.data.subsets import Subset, train_val_split
from mpm.evaluation.linear_probe import fit_logistic_regression
from mpm.labelled import open_labelled

ROOT = Path(__file__).parents[1]
FINETUNE = "configs/quickstart/finetune.yaml"
# its own best rate, and the same for all layers: see docs/log.md
FROM_SCRATCH = ["init=null", "optim.lr=1e-3", "optim.layer_decay=1"]
SMOKE = ["optim.steps=5", "optim.warmup_epochs=0"]
L2_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)


class Record:
    """Wall time and outcome of each part, kept in a file so that they survive a stop."""

    def __init__(self, file: Path):
        self.file = file
        self.parts: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def write(self, part: str, **facts: Any) -> None:
        self.parts[part] = self.parts.get(part, {"seconds": 0.0, "finished": False}) | facts
        self.file.write_text(json.dumps(self.parts, indent=1) + "\n", encoding="utf-8")

    def run(self, part: str, command: list[str]) -> None:
        """Run a command to its end; its time is added up over all attempts until one finished."""
        before = self.parts.get(part, {"seconds": 0.0, "finished": False})
        say = "finished before, looking" if before["finished"] else " ".join(["$", *command])
        print(f"\n--- {part}: {say}", flush=True)
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        alone = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            status = process.wait()
        except KeyboardInterrupt:
            status = process.wait() or 1  # the terminal told it too: it saves, then ends
        finally:
            signal.signal(signal.SIGTERM, alone)
        if not before["finished"]:
            seconds = before["seconds"] + time.perf_counter() - begin
            self.write(part, seconds=seconds, finished=status == 0)
        if status:
            sys.exit(f"{part} did not finish (exit status {status}); after a stop, the same command goes on")


def pixels(images: ImageSource) -> tuple[Tensor, Tensor]:
    """All pixels of a source, float64 [n,D] in [0,1], and its labels [n]."""
    flat = torch.stack([images.read(i).flatten() for i in range(len(images))])
    return flat.double() / 255, torch.tensor([images.label(i) for i in range(len(images))])


def logistic_regression(config: FinetuneConfig, strengths: Sequence[float]) -> dict[str, Any]:
    """Logistic regression on the raw pixels of the labelled images that fine-tuning gets.

    The penalty is chosen among `strengths` on a fifth of these labels, or on the validation images if the
    configuration has some; then all of them are fitted, and the test images are looked at once.
    """
    begin = time.perf_counter()
    torch.set_num_threads(1)  # so small a problem is slower on several
    data = open_labelled(config)
    assert data.test is not None
    if data.val is not None:
        train, val = data.train, data.val
    else:
        kept, held_out = train_val_split(data.train, 0.2, seed=config.seed)
        train, val = Subset(data.train, kept), Subset(data.train, held_out)
    (x, y), (x_val, y_val), (x_test, y_test) = pixels(train), pixels(val), pixels(data.test)
    num_classes = len(data.classes)

    def right(probe: Any, x: Tensor, y: Tensor) -> float:
        return float((probe.predict(x).argmax(1) == y).double().mean())

    def fit(x: Tensor, y: Tensor, l2: float) -> Any:
        return fit_logistic_regression(x, y, num_classes=num_classes, l2=l2, standardize=False)

    l2 = max(strengths, key=lambda l2: right(fit(x, y, l2), x_val, y_val))
    probe = fit(torch.cat([x, x_val]), torch.cat([y, y_val]), l2)
    return {
        "seconds": time.perf_counter() - begin,
        "finished": True,
        "top1": right(probe, x_test, y_test),
        "l2": l2,
        "labels": len(x) + len(x_val),
        "test_images": len(x_test),
    }


def demo(runs: Path, *, seed: int, processes: int, smoke: bool) -> None:
    """Run every part and print the table."""
    runs.mkdir(parents=True, exist_ok=True)
    record = Record(runs / "demo.json")
    record.run("data", [sys.executable, "scripts/fetch_fashion_mnist.py", "data"])

    common = [f"seed={seed}", *(SMOKE if smoke else [])]
    labels = [*common, f"labels.seed={seed}"]
    config = configfile.load(ROOT / FINETUNE, [*labels, "init=null"], FinetuneConfig).config
    print("\n--- logistic regression", flush=True)
    strengths = L2_STRENGTHS[2:3] if smoke else L2_STRENGTHS
    record.write("logistic regression", **logistic_regression(config, strengths))

    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    finetune = [*torchrun, "finetune.py", "--config", FINETUNE, *labels]
    pretrain = [*torchrun, "pretrain.py", "--config", "configs/quickstart/pretrain.yaml", *common]
    record.run("pretraining", [*pretrain, f"run.output_dir={runs / 'pretrain'}"])
    starts = {"fine-tuning": [f"init.checkpoint={runs / 'pretrain'}"], "from scratch": FROM_SCRATCH}
    for part, start in starts.items():
        folder = runs / part.replace(" ", "_")
        record.run(part, [*finetune, *start, f"run.output_dir={folder}"])
        result = json.loads((folder / "result.json").read_text())
        record.write(part, top1=result["test"]["top1"], weights=result["weights"], seed=seed)
    print(table(record.parts))
    if smoke:
        print("\na smoke run: everything works, the accuracies mean nothing, and nothing is kept")
        return
    print(f"\nreconstructions      {runs / 'pretrain' / 'reconstructions.png'}")
    print(f"mistakes by class    {runs / 'fine-tuning' / 'confusion.png'}")
    print(f"curves               {Path(sys.executable).parent / 'tensorboard'} --logdir {runs}")


def table(parts: dict[str, dict[str, Any]]) -> str:
    """What was found, and how long it took."""
    baseline = parts["logistic regression"]
    rows = [
        ("pretrained, then fine-tuned", "fine-tuning", ("pretraining", "fine-tuning")),
        ("same network from scratch", "from scratch", ("from scratch",)),
        ("logistic regression on pixels", "logistic regression", ("logistic regression",)),
    ]
    title = f"Fashion-MNIST, {baseline['labels']:,} labels"
    lines = ["", f"{title:<32} top-1 on {baseline['test_images']:,} test images    time"]
    for name, part, timed in rows:
        times = " + ".join(clock(parts[t]["seconds"]) for t in timed)
        lines.append(f"{name:<32} {parts[part]['top1']:>28.2%}    {times}")
    total = clock(sum(part["seconds"] for part in parts.values()))
    return "\n".join([*lines, f"{'all together, with the data':<64} {total}"])


def clock(seconds: float) -> str:
    """As minutes and seconds."""
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description="Pretraining against none, on Fashion-MNIST with few labels."
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and the choice of labels")
    parser.add_argument("--processes", type=int, default=1, help="of each training (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, nothing kept")
    options = parser.parse_args()
    settings = {"seed": options.seed, "processes": options.processes, "smoke": options.smoke}
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            demo(Path(folder), **settings)
    else:
        demo(options.runs, **settings)


if __name__ == "__main__":
    main()
