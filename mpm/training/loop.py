"""The loop: a generator that takes one optimizer step per report."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class StepReport(NamedTuple):
    """What one optimizer step was, on this process. Tensors are on the device: reading them waits for it."""

    step: int  # finished steps, this one included
    lr: float  # before layer-wise scaling
    loss: Tensor  # [], mean over the micro-batches
    grad_norm: Tensor | None  # [], before clipping; None: without an optimizer
    metrics: dict[str, Tensor]  # [] each, means over the micro-batches
    wait_s: float  # waited for data
    images: int
    settings: Mapping[str, Tensor] = MappingProxyType({})  # [] each, that the step was made with


class Average(Protocol):
    """A moving average of the module that is trained (`create_ema`)."""

    def update(self, module: nn.Module) -> object:
        """Takes the module after a step into the average."""


def train_steps(
    objective: nn.Module,
    batches: Iterable[Any],
    *,
    prepare: Callable[[Any], Any],
    optimizer: torch.optim.Optimizer | None,
    lr_at: Callable[[int], float],
    start: int,
    stop: int,
    total: int | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    dtype: torch.dtype = torch.float32,
    ema: Average | None = None,
) -> Iterator[StepReport]:
    """Trains from step `start` to `stop`; never waits for the device.

    One step is `accumulate` micro-batches: forward (autocast to `dtype`), backward, mean of the gradients;
    then clip, optimizer step, `objective.after_step(finished steps)`, EMA. Without an optimizer there are no
    gradients: `after_step` is all that learns.

    Args:
        objective: called as `objective(inputs, progress)`, gives `.loss` [] and dicts of detached [] tensors,
            `.metrics` of the batch and `.settings` of the step; may be wrapped in DDP. `progress` [] is the
            share of the run done, in [0, 1).
        batches: micro-batches with `.images` [B,...]; at least `accumulate * (stop - start)`.
        prepare: from a batch to the objective's inputs, on the device; run without gradients.
        optimizer: its groups have `lr_scale` (`parameter_groups`); None: of an objective that learns
            without gradients, and so is not wrapped in DDP.
        lr_at: rate of a step, counted from 0.
        start: finished steps.
        stop: finished steps at which to end.
        total: finished steps at the end of the schedule, for `progress`; None: `stop`.
        accumulate: micro-batches of a step.
        clip_norm: largest gradient norm; None does not clip.
        dtype: of the forward's matrix products, float32 or bfloat16.
        ema: updated last in each step.
    """
    wrapped = objective if isinstance(objective, DistributedDataParallel) else None
    module: Any = wrapped.module if wrapped else objective
    groups = [] if optimizer is None else optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    device = (parameters[0] if parameters else next(objective.buffers())).device
    micro_batches = iter(batches)
    for step in range(start, stop):
        lr = lr_at(step)
        for group in groups:
            group["lr"] = lr * group["lr_scale"]
        progress = torch.full((), step / (total or stop), device=device)  # a fill, where a copy would wait
        losses: list[Tensor] = []
        metrics: dict[str, list[Tensor]] = {}
        wait_s, images = 0.0, 0
        for remaining in reversed(range(accumulate)):
            begin = time.perf_counter()
            batch = next(micro_batches)
            wait_s += time.perf_counter() - begin
            images += len(batch.images)
            with torch.no_grad():
                inputs = prepare(batch)
            # processes exchange gradients once a step, in the last backward
            with wrapped.no_sync() if wrapped and remaining else contextlib.nullcontext():
                with (
                    torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
                    torch.no_grad() if optimizer is None else contextlib.nullcontext(),
                ):
                    output = objective(inputs, progress)
                if optimizer is not None:
                    (output.loss / accumulate).backward()
            losses.append(output.loss.detach())
            for name, value in output.metrics.items():
                metrics.setdefault(name, []).append(value)
        grad_norm = None
        if optimizer is not None:
            grad_norm = _gradient_norm(parameters, clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        module.after_step(step + 1)
        if ema is not None:
            ema.update(module)
        means = {name: torch.stack(values).mean() for name, values in metrics.items()}
        loss = torch.stack(losses).mean()
        yield StepReport(step + 1, lr, loss, grad_norm, means, wait_s, images, output.settings)


def _gradient_norm(parameters: list[Tensor], clip_norm: float | None) -> Tensor:
    if clip_norm is not None:
        return torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag while it is open, so that a run saves before it ends.

    A second SIGINT raises KeyboardInterrupt: who presses Ctrl-C twice does not want to wait.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
