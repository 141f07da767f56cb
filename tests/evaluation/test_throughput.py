import time

import torch

from mpm.evaluation.throughput import images_per_second


def test_rate_is_that_of_the_median_batch_once_warm() -> None:
    delays = iter([0.05, 0.05, 0.004, 0.004, 0.05, 0.004, 0.004])
    calls = []

    def forward(images: torch.Tensor) -> None:
        calls.append(images)
        time.sleep(next(delays))

    found = images_per_second(forward, torch.empty(8, 1), seconds=0)
    assert len(calls) == 7
    assert 8 / 0.03 < found < 8 / 0.004
