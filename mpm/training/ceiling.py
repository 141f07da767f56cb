"""What the device can do at best, to measure training against."""

import functools
import statistics
import time

import torch

_ENOUGH_S = 0.01  # one product long enough for its launch and the clock not to matter
_BUDGET_S = 0.2


@functools.cache
def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large square matrix product, by this process; takes less than half a second.

    The median of repeats, at the first size of 512, 1024, ... that takes 10 ms; a process measures once.
    """
    size = 512
    while (seconds := _matmul_s(size, device, dtype)) < _ENOUGH_S and size < 8192:
        size *= 2
    repeats = min(50, max(3, int(_BUDGET_S / seconds)))
    return 2 * size**3 / statistics.median(_matmul_s(size, device, dtype) for _ in range(repeats))


def _matmul_s(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a  # the first product of a shape chooses an algorithm
    _synchronize(device)
    begin = time.perf_counter()
    a @ a
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
