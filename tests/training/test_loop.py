import copy
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mpm import checkpoint
from mpm.training.ema import create_ema
from mpm.training.loop import StepReport, StopRequest, train_steps
from mpm.training.optimizer import create_adamw, parameter_groups
from mpm.training.schedule import cosine


class Batch(NamedTuple):
    images: Tensor


class Output(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]
    settings: dict[str, Tensor]


class Regression(nn.Module):
    """Predicts the mean of its inputs; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1))
        self.calls: list[tuple[float, torch.dtype]] = []
        self.finished: list[int] = []

    def forward(self, inputs: Tensor, progress: Tensor) -> Output:
        predictions = self.layers(inputs)
        self.calls.append((float(progress), predictions.dtype))
        errors = (predictions.float().squeeze(1) - inputs.mean(1)).square()
        return Output(errors.mean(), {"error": errors.detach().sqrt().mean()}, {})

    def after_step(self, step: int) -> None:
        self.finished.append(step)


def steps_of(
    module: nn.Module, images: Tensor, *, stop: int, accumulate: int = 1, batch_size: int = 8, **options: Any
) -> Iterator[StepReport]:
    groups = parameter_groups(module, lr=1.0, weight_decay=0.1)
    return train_steps(
        module,
        (Batch(rows) for rows in images.split(batch_size // accumulate)),
        prepare=lambda batch: batch.images - 0.5,
        optimizer=create_adamw(groups, lr=1.0, betas=(0.9, 0.95)),
        lr_at=cosine(peak=0.05, steps=stop, warmup_steps=2, final=0.0, start=0.01),
        start=0,
        stop=stop,
        accumulate=accumulate,
        **options,
    )


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_four_micro_batches_equal_one_batch(clip_norm: float | None) -> None:
    images = torch.rand(5 * 8, 6)
    whole = Regression()
    parts = copy.deepcopy(whole)
    reports = zip(
        steps_of(whole, images, stop=5, clip_norm=clip_norm),
        steps_of(parts, images, stop=5, clip_norm=clip_norm, accumulate=4),
        strict=True,
    )
    for one, four in reports:
        torch.testing.assert_close(four.loss, one.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(four.grad_norm, one.grad_norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(four.metrics, one.metrics, rtol=1e-5, atol=0)
        assert (one.images, four.images) == (8, 8)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-7)


def test_steps_equal_a_plain_loop() -> None:
    images = torch.rand(4 * 8, 6)
    module = Regression()
    plain = copy.deepcopy(module)
    reports = list(steps_of(module, images, stop=4, clip_norm=0.1))

    decayed = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    rates = [0.01, 0.05, 0.05, 0.025]  # warm-up, warm-up, start and middle of the cosine
    for report, rate, rows in zip(reports, rates, images.split(8), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = plain(rows - 0.5, torch.zeros(())).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        assert report.lr == pytest.approx(rate)
        torch.testing.assert_close(report.loss, loss.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(report.grad_norm, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_is_equal_to_the_last_bit(tmp_path: Path) -> None:
    images = torch.rand(6 * 8, 6)

    def run(module: Regression, start: int, stop: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
        optimizer = create_adamw(
            parameter_groups(module, lr=1.0, weight_decay=0.1), lr=1.0, betas=(0.9, 0.95)
        )
        ema = create_ema(module, decay=0.9)
        if state:
            module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            ema.module.load_state_dict(state["ema"])
        steps = train_steps(
            module,
            [Batch(rows) for rows in images.split(4)[2 * start :]],
            prepare=lambda batch: batch.images,
            optimizer=optimizer,
            lr_at=cosine(peak=0.05, steps=6, warmup_steps=2, final=0.0),
            start=start,
            stop=6,
            accumulate=2,
            ema=ema,
        )
        for _ in itertools.islice(steps, stop - start):
            pass
        return {
            "model": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.module.state_dict(),
        }

    module = Regression()
    whole = run(copy.deepcopy(module), 0, 6)
    state = run(module, 0, 3)
    checkpoint.save(tmp_path, step=3, config={}, metadata={}, model={}, train_state=state, keep=1)
    resumed = run(Regression(), 3, 6, checkpoint.load_train_state(tmp_path))
    for part in ("model", "ema"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0)
    assert resumed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]


def test_the_objective_learns_where_the_run_is() -> None:
    module = Regression()
    reports = list(steps_of(module, torch.rand(4 * 8, 6), stop=4, accumulate=2))
    assert [progress for progress, _ in module.calls] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert module.finished == [report.step for report in reports] == [1, 2, 3, 4]


def test_layers_learn_at_their_own_rate() -> None:
    module = Regression()
    layers = {"layer_of": lambda name: 2 * int("2" in name), "num_layers": 2, "layer_decay": 0.5}
    groups = parameter_groups(module, lr=1.0, weight_decay=0.0, **layers)
    optimizer = create_adamw(groups, lr=1.0, betas=(0.9, 0.95))
    batches = iter([Batch(torch.rand(8, 6))])
    options = {"prepare": lambda batch: batch.images, "lr_at": lambda step: 0.1, "start": 0, "stop": 1}
    next(train_steps(module, batches, optimizer=optimizer, **options))
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.025, 0.1]


def test_only_the_forward_is_autocast() -> None:
    module = Regression()
    report = next(steps_of(module, torch.rand(8, 6), stop=9, dtype=torch.bfloat16))
    assert module.calls[0][1] == torch.bfloat16
    assert report.loss.dtype == report.grad_norm.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_the_average_sees_the_module_after_each_step() -> None:
    module = Regression()

    class Recorder:
        weights: list[Tensor] = []  # noqa: RUF012

        def update(self, module: nn.Module) -> None:
            self.weights.append(module.layers[0].weight.detach().clone())

    recorder = Recorder()
    for report in steps_of(module, torch.rand(3 * 8, 6), stop=3, ema=recorder):
        assert len(recorder.weights) == report.step
        assert torch.equal(recorder.weights[-1], module.layers[0].weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.requested
        os.kill(os.getpid(), number)
        assert request.requested
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with StopRequest(), pytest.raises(KeyboardInterrupt):
        interrupt_twice()


class Follower(nn.Module):
    """Follows the mean of its inputs, after each step and without a gradient."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.frozen = nn.Linear(6, 6)
        self.seen: list[Tensor] = []
        self.finished: list[int] = []

    def forward(self, inputs: Tensor, progress: Tensor) -> Output:
        outputs = self.frozen(inputs)
        assert not outputs.requires_grad
        self.seen.append(inputs.mean(0))
        return Output((inputs - self.mean).square().mean(), {}, {"progress": progress})

    def after_step(self, step: int) -> None:
        self.mean.lerp_(torch.stack(self.seen).mean(0), 0.5)
        self.seen.clear()
        self.finished.append(step)


def test_without_an_optimizer_only_the_objective_itself_learns() -> None:
    images, module = torch.rand(3 * 8, 6), Follower()
    weight = module.frozen.weight.detach().clone()
    ema = create_ema(module, decay=0.5)
    reports = train_steps(
        module,
        [Batch(rows) for rows in images.split(4)],
        prepare=lambda batch: batch.images,
        optimizer=None,
        lr_at=lambda step: 0.1 * step,
        start=0,
        stop=3,
        accumulate=2,
        ema=ema,
    )
    expected = torch.zeros(6)
    for report, rows in zip(reports, images.split(8), strict=True):
        torch.testing.assert_close(report.loss, (rows - expected).square().mean(), rtol=1e-5, atol=0)
        expected = 0.5 * expected + 0.5 * rows.mean(0)
        torch.testing.assert_close(module.mean, expected, rtol=1e-5, atol=1e-6)
        assert report.grad_norm is None
        assert report.lr == pytest.approx(0.1 * (report.step - 1))
        assert float(report.settings["progress"]) == pytest.approx((report.step - 1) / 3)
        assert (report.images, module.finished[-1]) == (8, report.step)
    assert module.frozen.weight.equal(weight)
    assert module.frozen.weight.grad is None
    torch.testing.assert_close(ema.module.mean, module.mean)  # buffers are copied


class Mean(Regression):
    def forward(self, inputs: Tensor, progress: Tensor) -> Output:
        loss = self.layers(inputs).float().mean() * progress
        return Output(loss, {"mean": loss.detach()}, {})


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device() -> None:
    images = torch.rand(5 * 8, 6, device="cuda")
    steps = steps_of(Mean().cuda(), images, stop=5, accumulate=2, clip_norm=1.0, dtype=torch.bfloat16)
    next(steps)  # lazy initialisation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(steps)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
