import time

import torch

from mpm.training.ceiling import matmul_flops_per_s


def test_the_ceiling_is_that_of_a_large_product_and_quickly_found() -> None:
    begin = time.perf_counter()
    ceiling = matmul_flops_per_s(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - begin < 2  # half a second on an idle core
    a = torch.ones(512, 512)
    begin = time.perf_counter()
    for _ in range(10):
        a @ a
    reached = 10 * 2 * 512**3 / (time.perf_counter() - begin)
    assert 0.2 < ceiling / reached < 20  # other processes may slow either
