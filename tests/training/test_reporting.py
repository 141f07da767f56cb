import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mpm.checkpoint import load_train_state, save
from mpm.training.loop import StepReport
from mpm.training.reporting import Reporter

CPU = torch.device("cpu")


def reporter_at(run_dir: Path, **options: Any) -> Reporter:
    return Reporter(run_dir, total_steps=20, global_batch=8, **options)


def report_at(step: int, loss: float | None = None) -> StepReport:
    generator = torch.Generator().manual_seed(step)
    values = torch.rand(3, generator=generator)
    return StepReport(
        step=step,
        lr=step * 1e-3,
        loss=values[0] if loss is None else torch.tensor(loss),
        grad_norm=values[1],
        metrics={"accuracy": values[2]},
        wait_s=0.0,
        images=8,
        settings={"temperature": torch.tensor(1 / step)},
    )


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events_of(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_the_mean_over_the_window_is_written(tmp_path: Path) -> None:
    reporter = reporter_at(tmp_path, flops_per_image=10.0, ceiling=1e6)
    reporter.resume(0)
    for step in range(1, 9):
        reporter.add(report_at(step))
        if step % 4 == 0:
            reporter.log(step)
    reporter.close()
    first, second = lines_of(tmp_path)
    assert (first["step"], second["step"]) == (4, 8)
    expected = torch.stack([report_at(step).loss for step in range(5, 9)]).mean().item()
    assert second["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert (second["train/lr"], second["train/temperature"]) == (8e-3, 1 / 8)
    assert second["train/mfu"] == pytest.approx(second["train/images_per_s"] * 10.0 / 1e6)
    names = ["loss", "lr", "grad_norm", "accuracy", "temperature"]
    names += ["images_per_s", "data_wait", "memory_gib", "mfu"]
    assert list(second) == ["step", *(f"train/{name}" for name in names)]
    assert [(s, pytest.approx(v)) for s, v in events_of(tmp_path, "train/loss")] == [
        (line["step"], line["train/loss"]) for line in (first, second)
    ]


def test_a_window_cut_by_a_resume_has_the_same_mean(tmp_path: Path) -> None:
    def run(run_dir: Path, start: int, stop: int) -> Reporter:
        reporter = reporter_at(run_dir)
        reporter.resume(start)
        if start:
            reporter.load_state_dict(load_train_state(run_dir)["reporter"], device=CPU)
        for step in range(start + 1, stop + 1):
            reporter.add(report_at(step))
            if step % 7 == 0:
                reporter.log(step)
        return reporter

    run(tmp_path / "whole", 0, 14).close()
    cut = run(tmp_path / "cut", 0, 10)
    state = {"reporter": cut.state_dict()}
    save(tmp_path / "cut", step=10, config={}, metadata={}, model={}, train_state=state, keep=1)
    for step in range(11, 16):  # lost in a crash, but logged
        cut.add(report_at(step))
    cut.log(15)
    run(tmp_path / "cut", 10, 14).close()
    cut.close()
    names = ("step", "train/loss", "train/grad_norm", "train/accuracy", "train/lr")
    whole, resumed = ([[line[n] for n in names] for line in lines_of(tmp_path / d)] for d in ("whole", "cut"))
    assert resumed == whole


@pytest.mark.parametrize("torn", [b"", b'{"step": 3, "train/lo', b'{"step": 3}', b"\n", b"3\n", b"\xff\n"])
def test_resume_cuts_later_and_torn_lines(
    torn: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = reporter_at(tmp_path)
    reporter.resume(0)
    for step in (2, 4, 6):
        reporter.scalars(step, {"x": float(step)})
    reporter.close()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + torn)

    # TensorBoard reads the files of one second by a counter in their names, the 100th before the 99th
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 2)
    resumed = reporter_at(tmp_path)
    resumed.resume(4)
    resumed.scalars(6, {"x": 0.5})
    resumed.close()
    expected = [(2, 2.0), (4, 4.0), (6, 0.5)]
    assert [(line["step"], line["x"]) for line in lines_of(tmp_path)] == expected
    assert events_of(tmp_path, "x") == expected


def test_a_gradient_that_is_not_finite_stops_before_its_weights_are_saved(tmp_path: Path) -> None:
    reporter = reporter_at(tmp_path)
    reporter.resume(0)
    reporter.add(report_at(1)._replace(grad_norm=torch.tensor(math.inf)))
    with pytest.raises(FloatingPointError, match="not finite in steps 1 to 1"):
        reporter.check_finite(1)


def test_steps_without_a_gradient_are_reported_without_its_norm(tmp_path: Path) -> None:
    reporter = reporter_at(tmp_path)
    reporter.resume(0)
    for step in range(1, 5):
        reporter.add(report_at(step)._replace(grad_norm=None))
    reporter.log(4)
    reporter.add(report_at(5, math.nan)._replace(grad_norm=None))
    with pytest.raises(FloatingPointError, match="not finite in steps 5 to 5"):
        reporter.log(5)
    reporter.close()
    (line,) = lines_of(tmp_path)
    names = ["loss", "lr", "accuracy", "temperature", "images_per_s", "data_wait", "memory_gib"]
    assert list(line) == ["step", *(f"train/{name}" for name in names)]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_says_where(loss: float, tmp_path: Path) -> None:
    reporter = reporter_at(tmp_path)
    reporter.resume(0)
    reporter.add(report_at(1))
    reporter.log(1)
    for step in range(2, 6):
        reporter.add(report_at(step, loss if step == 3 else None))
    for check in (reporter.check_finite, reporter.log):
        with pytest.raises(FloatingPointError, match=r"not finite in steps 2 to 5 on rank 0, lr 0\.005"):
            check(5)
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    reporter.close()


def test_other_numbers_may_be_not_finite(tmp_path: Path) -> None:
    reporter = reporter_at(tmp_path)
    reporter.scalars(1, {"accuracy": math.nan}, prefix="knn/")
    reporter.close()
    assert lines_of(tmp_path) == [{"step": 1, "knn/accuracy": None}]


def test_a_pause_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    reporter = reporter_at(tmp_path)  # 0
    reporter.resume(0)  # 1
    reporter.add(report_at(1))
    with reporter.paused():  # 2 to 12
        for _ in range(9):
            next(clock)
    reporter.add(report_at(2))
    reporter.log(2)  # 13
    reporter.close()
    assert lines_of(tmp_path)[0]["train/images_per_s"] == 2 * 8 / 2


def test_pictures_and_texts_arrive(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = reporter_at(tmp_path)
    reporter.image("reconstruction", torch.zeros(3, 4, 6, dtype=torch.uint8), 2)
    reporter.text("config", "seed: 0")
    reporter.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (image,) = accumulator.Images("reconstruction")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    assert "config/text_summary" in accumulator.Tags()["tensors"]


def test_without_a_terminal_the_log_has_the_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter = reporter_at(tmp_path, progress_bar=False)
    reporter.add(report_at(1, 0.25))
    with caplog.at_level(logging.INFO):
        reporter.log(1)
    reporter.close()
    assert "step 1 of 20: loss 0.25, images/s" in caplog.text
