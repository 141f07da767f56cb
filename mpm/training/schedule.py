"""Learning rates as functions of the step."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence


def cosine(
    *, peak: float, steps: int, warmup_steps: int, final: float, start: float = 0.0, begin: int | None = None
) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine, by step (BEiT, arXiv:2106.08254, `utils.cosine_scheduler`).

    The warm-up is `linspace(start, peak, warmup_steps)`: step 0 gets `start`, step `warmup_steps - 1` already
    `peak`. MAE's warm-up (`peak * step / warmup_steps`) reaches the peak one step later; then both are equal.
    So does timm's, whose half cosine begins at step 0, under the warm-up.

    Args:
        peak: rate at the end of the warm-up.
        steps: optimizer steps of the whole run.
        warmup_steps: steps of the warm-up, of those.
        final: rate that the cosine tends to, reached at step `steps`, one after the last.
        start: rate of step 0, unless there is no warm-up.
        begin: step at which the half cosine begins, at most `warmup_steps`; None: there.

    Raises:
        ValueError: if the warm-up is not shorter than the run.
    """
    _check_warmup(warmup_steps, steps)
    first = warmup_steps if begin is None else begin

    def lr_at(step: int) -> float:
        if step < warmup_steps:
            return _warmup(step, start, peak, warmup_steps)
        progress = (step - first) / (steps - first)
        return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))

    return lr_at


def multistep(
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    milestones: Sequence[int],
    factor: float = 0.1,
    start: float = 0.0,
) -> Callable[[int], float]:
    """Linear warm-up, then a constant that `factor` multiplies at each milestone (SimMIM, arXiv:2111.09886).

    The warm-up is the one of `cosine`; SimMIM's reaches the peak one step later.

    Args:
        peak: rate at the end of the warm-up.
        steps: optimizer steps of the whole run.
        warmup_steps: steps of the warm-up, of those.
        milestones: ascending; the first steps with a smaller rate.
        factor: of the rate, at each milestone.
        start: rate of step 0, unless there is no warm-up.

    Raises:
        ValueError: if the warm-up is not shorter than the run, or a milestone is not between their ends.
    """
    _check_warmup(warmup_steps, steps)
    if list(milestones) != sorted({m for m in milestones if warmup_steps <= m < steps}):
        raise ValueError(
            f"milestones {list(milestones)} must ascend, from the end of the warm-up (step {warmup_steps}) "
            f"to before the end of the run (step {steps})"
        )

    def lr_at(step: int) -> float:
        if step < warmup_steps:
            return _warmup(step, start, peak, warmup_steps)
        return peak * factor ** bisect_right(milestones, step)

    return lr_at


def _warmup(step: int, start: float, peak: float, steps: int) -> float:
    return start + (peak - start) * step / max(1, steps - 1)


def _check_warmup(warmup_steps: int, steps: int) -> None:
    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"a warm-up of {warmup_steps} steps does not fit a run of {steps} steps; "
            "set optim.warmup_steps to less, or train longer"
        )
