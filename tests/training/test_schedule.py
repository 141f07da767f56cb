import math

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler

from mpm.training.schedule import cosine, multistep


def beit_schedule(*, peak: float, steps: int, warmup_steps: int, final: float, start: float) -> np.ndarray:
    """BEiT's formula: a linspace, then half a cosine over what is left."""
    left = steps - warmup_steps
    decay = final + 0.5 * (peak - final) * (1 + np.cos(math.pi * np.arange(left) / left))
    return np.concatenate([np.linspace(start, peak, warmup_steps), decay])


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 10])
@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_cosine_equals_beit(warmup_steps: int, start: float) -> None:
    shape = {"peak": 1.5e-3, "steps": 57, "warmup_steps": warmup_steps, "final": 1e-5, "start": start}
    lr_at = cosine(**shape)
    np.testing.assert_allclose([lr_at(i) for i in range(57)], beit_schedule(**shape), rtol=1e-12)


def test_cosine_equals_mae_after_the_warmup_and_is_at_most_one_step_ahead_in_it() -> None:
    peak, steps, warmup = 2.4e-3, 800, 40
    lr_at = cosine(peak=peak, steps=steps, warmup_steps=warmup, final=0.0)
    for step in range(steps):
        if step < warmup:
            assert peak * step / warmup <= lr_at(step) <= peak * (step + 1) / warmup
        else:
            mae = peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            assert lr_at(step) == pytest.approx(mae, rel=1e-12)


def test_multistep_multiplies_at_the_milestones() -> None:
    lr_at = multistep(peak=1.0, steps=100, warmup_steps=11, milestones=[70, 90], factor=0.1, start=0.5)
    assert [lr_at(step) for step in (0, 5, 10, 11, 69)] == pytest.approx([0.5, 0.75, 1, 1, 1])
    assert [lr_at(step) for step in (70, 89, 90, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit a run of 10 steps; set optim\.warmup_steps to"):
        cosine(peak=1.0, steps=10, warmup_steps=10, final=0.0)


@pytest.mark.parametrize("milestones", [[90, 70], [5, 70], [100], [70, 70]])
def test_milestones_outside_the_decay_are_refused(milestones: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend"):
        multistep(peak=1.0, steps=100, warmup_steps=10, milestones=milestones)


def timm_rates(scheduler: type, *, steps: int, **options) -> list[float]:
    """What timm sets at each update, of an optimizer whose rate is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler(optimizer, **options)
    rates = []
    for step in range(steps):
        schedule.step(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_a_cosine_over_the_run_equals_timms_and_is_at_most_one_step_ahead_in_the_warmup() -> None:
    """DeiT's shape: 300 epochs, 5 of them warm-up from 1e-3 of the rate, down to 1e-2 of it."""
    warmup, steps = 50, 3000
    theirs = timm_rates(
        CosineLRScheduler, steps=steps, t_initial=steps, lr_min=0.01, warmup_t=warmup, warmup_lr_init=0.001
    )
    lr_at = cosine(peak=1.0, steps=steps, warmup_steps=warmup, final=0.01, start=0.001, begin=0)
    ours = [lr_at(step) for step in range(steps)]
    np.testing.assert_allclose(ours[warmup:], theirs[warmup:], rtol=1e-12)
    assert all(theirs[step] <= ours[step] <= theirs[step + 1] + 1e-3 for step in range(warmup))
    rest = cosine(peak=1.0, steps=steps, warmup_steps=warmup, final=0.01, start=0.001)
    assert max(rest(step) - ours[step] for step in range(steps)) > 0.01  # BEiT's and MAE's is another


def test_deits_code_is_an_epoch_late() -> None:
    """It steps the schedule with the finished epoch: epochs 0 and 1 run at the rate of epoch 0."""
    per_epoch, epochs = 10, 20
    at_epoch = timm_rates(
        CosineLRScheduler, steps=epochs, t_initial=epochs, lr_min=0.01, warmup_t=5, warmup_lr_init=0.001
    )
    official = [at_epoch[max(0, epoch - 1)] for epoch in range(epochs)]
    assert official[0] == official[1] == 0.001
    lr_at = cosine(
        peak=1.0, steps=epochs * per_epoch, warmup_steps=5 * per_epoch, final=0.01, start=0.001, begin=0
    )
    for epoch in range(6, epochs):
        assert lr_at(epoch * per_epoch) == pytest.approx(at_epoch[epoch], rel=1e-9)
        assert lr_at(epoch * per_epoch) < official[epoch]


def test_multistep_is_timms_step_schedule() -> None:
    """CaiT at 384: 60 epochs, halved every 10, 5 of warm-up."""
    per_epoch = 7
    theirs = timm_rates(
        StepLRScheduler,
        steps=60 * per_epoch,
        decay_t=10 * per_epoch,
        decay_rate=0.5,
        warmup_t=5 * per_epoch,
        warmup_lr_init=0.2,
        warmup_prefix=False,  # as all of timm was then
    )
    milestones = [epoch * per_epoch for epoch in (10, 20, 30, 40, 50)]
    lr_at = multistep(
        peak=1.0,
        steps=60 * per_epoch,
        warmup_steps=5 * per_epoch,
        milestones=milestones,
        factor=0.5,
        start=0.2,
    )
    ours = [lr_at(step) for step in range(60 * per_epoch)]
    np.testing.assert_allclose(ours[5 * per_epoch :], theirs[5 * per_epoch :], rtol=1e-12)


def test_without_milestones_the_rate_is_constant_after_the_warmup() -> None:
    lr_at = multistep(peak=2.0, steps=20, warmup_steps=5, milestones=[], start=1.0)
    assert [lr_at(step) for step in range(20)] == pytest.approx([1, 1.25, 1.5, 1.75, *[2.0] * 16])
