"""How many images a network takes in a second."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["images_per_second"]

_WARM_UP, _LEAST = 2, 5  # batches


def images_per_second(forward: Callable[[Tensor], Any], images: Tensor, *, seconds: float = 0.2) -> float:
    """Of the median batch, after two that warm up; nothing is read or copied meanwhile.

    Args:
        forward: takes the images.
        images: [B,C,H,W], on the device.
        seconds: goes on for so long, and for five batches at least.
    """

    def timed() -> float:
        begin = time.perf_counter()
        forward(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - begin

    for _ in range(_WARM_UP):
        timed()
    times: list[float] = []
    while len(times) < _LEAST or sum(times) < seconds:
        times.append(timed())
    return len(images) / statistics.median(times)
