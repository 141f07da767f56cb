"""What a run tells: metrics.jsonl, TensorBoard, a progress bar."""

import contextlib
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpm import distributed
from mpm.training.loop import StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Reporter:
    """Averages steps over a window and writes them down.

    Every process adds its steps and takes part in `log` and `check_finite`; the main one writes. Values stay
    on the device until then. Files: <run_dir>/metrics.jsonl, one JSON object a line with its "step", and
    <run_dir>/tensorboard.

    Args:
        run_dir: the run's folder.
        total_steps: for the progress bar.
        global_batch: images of a step, over all processes.
        flops_per_image: of forward and backward; None leaves MFU out.
        ceiling: FLOP/s that one process could reach (`matmul_flops_per_s`); None leaves MFU out.
        progress_bar: whether to show one, where there is a terminal.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        global_batch: int,
        flops_per_image: float | None = None,
        ceiling: float | None = None,
        progress_bar: bool = True,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.global_batch = global_batch
        self.flops_per_step = flops_per_image * global_batch if flops_per_image and ceiling else None
        self.ceiling = ceiling
        self.progress_bar = progress_bar
        self._start_step = 0
        self._sums: dict[str, Tensor] = {}
        self._lr = 0.0
        self._settings: Mapping[str, Tensor] = {}
        self._begin_window()

    def resume(self, step: int) -> None:
        """Forgets what an earlier process wrote after `step`; call it before the first step, with 0 as well.

        metrics.jsonl is cut back, TensorBoard is told to drop later events.
        """
        self._start_step = step
        file = self.run_dir / "metrics.jsonl"
        if distributed.is_main() and file.exists():
            kept = [line for line in file.read_bytes().splitlines(keepends=True) if _is_before(line, step)]
            temporary = file.with_name("metrics.jsonl.partial")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(file)
        self._mark = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Takes a step into the window."""
        values = {"loss": report.loss, **report.metrics}
        if report.grad_norm is not None:
            values["grad_norm"] = report.grad_norm
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._wait_s += report.wait_s
        self._lr, self._settings = report.lr, report.settings
        if distributed.is_main():
            self._bar.update(report.step - self._bar.n)

    def log(self, step: int) -> None:
        """Writes the means of the window that ends with `step`, its rate and settings; begins the next.

        Raises:
            FloatingPointError: on every process, if the mean loss is not finite on any.
        """
        means = self.check_finite(step)
        seconds = self._seconds + time.perf_counter() - self._mark
        slowest = distributed.gather_rows(torch.tensor([[self._wait_s / seconds, _memory_gib()]])).amax(0)
        record = {
            "loss": means.pop("loss"),
            "lr": self._lr,
            **({"grad_norm": means.pop("grad_norm")} if "grad_norm" in means else {}),
            **means,
            **{name: value.item() for name, value in self._settings.items()},
            "images_per_s": self._steps * self.global_batch / seconds,
            "data_wait": slowest[0].item(),
            "memory_gib": slowest[1].item(),
        }
        if self.flops_per_step and self.ceiling:
            reached = self._steps * self.flops_per_step / seconds
            record["mfu"] = reached / (self.ceiling * distributed.world_size())
        self.scalars(step, record, prefix="train/")
        if distributed.is_main():
            shown = {"loss": f"{record['loss']:.4g}", "images/s": f"{record['images_per_s']:.0f}"}
            self._bar.set_postfix(shown)
            if self._bar.disable:
                rest = ", ".join(f"{name} {value}" for name, value in shown.items())
                log.info("step %d of %d: %s", step, self.total_steps, rest)
        self._begin_window()

    def check_finite(self, step: int) -> dict[str, float]:
        """The means of the window so far, over processes; every process calls it, also before a save.

        Raises:
            FloatingPointError: as `log`.
        """
        if not self._steps:
            return {}
        names = list(self._sums)
        means = (torch.stack([self._sums[name] for name in names]) / self._steps).cpu()
        by_rank = distributed.gather_rows(means[None])
        # a finite loss with a gradient that is not has already spoilt the weights
        watched = [names.index(name) for name in ("loss", "grad_norm") if name in names]
        broken = [rank for rank, row in enumerate(by_rank) if not row[watched].isfinite().all()]
        if broken:
            raise FloatingPointError(
                f"the loss or its gradient is not finite in steps {step - self._steps + 1} to {step} on rank "
                f"{', '.join(map(str, broken))}, lr {self._lr:.3g}; the last checkpoint is good: try "
                "a smaller optim.lr, a longer warm-up or a smaller optim.clip_norm"
            )
        return dict(zip(names, by_rank.mean(0).tolist(), strict=True))

    def scalars(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Writes numbers of a step, each under `prefix` + its name; null where one is not finite."""
        if not distributed.is_main():
            return
        named = {prefix + name: float(value) for name, value in values.items()}
        line = {"step": step} | {name: v if math.isfinite(v) else None for name, v in named.items()}
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in named.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Shows a picture, uint8 [3,H,W], in TensorBoard."""
        if distributed.is_main():
            self._tensorboard.add_image(tag, image.cpu(), step)

    def code_histogram(self, tag: str, counts: Tensor, step: int) -> None:
        """Shows how often each code [V] is used in TensorBoard, the most frequent first: flat is healthy."""
        if not distributed.is_main():
            return
        V = len(counts)
        bins = counts.sort(descending=True).values.cpu().double().tensor_split(min(V, 64))
        edges = torch.tensor([len(part) for part in bins]).cumsum(0).tolist()
        self._tensorboard.add_histogram_raw(
            tag,
            min=0,
            max=V,
            num=int(counts.sum()),
            sum=float(counts.sum()),
            sum_squares=float(counts.double().square().sum()),
            bucket_limits=edges,
            bucket_counts=[float(part.sum()) for part in bins],
            global_step=step,
        )

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Shows a text, Markdown, in TensorBoard."""
        if distributed.is_main():
            self._tensorboard.add_text(tag, text, step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside (a save, an evaluation) out of the images per second."""
        self._seconds += time.perf_counter() - self._mark
        yield
        self._mark = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The window of this process; a resumed run logs the same means to the last bit."""
        return {
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "steps": self._steps,
            "wait_s": self._wait_s,
            "seconds": self._seconds + time.perf_counter() - self._mark,
            "lr": self._lr,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, device: torch.device) -> None:
        """Continues the window of a checkpoint, its sums on `device`."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._steps, self._wait_s = state["steps"], state["wait_s"]
        self._seconds, self._lr = state["seconds"], state["lr"]
        self._mark = time.perf_counter()

    def close(self) -> None:
        """Ends the progress bar and the TensorBoard file."""
        for name in ("_bar", "_tensorboard"):
            if name in self.__dict__:
                self.__dict__.pop(name).close()

    def _begin_window(self) -> None:
        self._sums = {}
        self._steps = 0
        self._wait_s = 0.0
        self._seconds = 0.0  # before _mark
        self._mark = time.perf_counter()

    @functools.cached_property
    def _bar(self) -> "tqdm[Any]":
        hidden = None if self.progress_bar else True  # None: hidden where stderr is not a terminal
        return tqdm(
            total=self.total_steps, initial=self._start_step, unit="step", disable=hidden, dynamic_ncols=True
        )

    @functools.cached_property
    def _tensorboard(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.run_dir / "tensorboard", purge_step=self._start_step + 1)


def _is_before(line: bytes, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole and not after `step`."""
    if not line.endswith(b"\n"):
        return False
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def _memory_gib() -> float:
    """Most memory held so far: by tensors on the GPU, else by the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
