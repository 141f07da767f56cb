import math

import numpy as np
import pytest

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
    with pytest.raises(ValueError, match=r"10 steps does not fit a run of 10 steps; set optim\.warmup_steps"):
        cosine(peak=1.0, steps=10, warmup_steps=10, final=0.0)


@pytest.mark.parametrize("milestones", [[90, 70], [5, 70], [100], [70, 70]])
def test_milestones_outside_the_decay_are_refused(milestones: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend"):
        multistep(peak=1.0, steps=100, warmup_steps=10, milestones=milestones)
