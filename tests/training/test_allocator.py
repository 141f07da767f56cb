import platform
import resource

import torch

from mpm.training.allocator import keep_freed_memory


def test_glibc_gives_a_freed_tensor_s_pages_to_the_next() -> None:
    kept = keep_freed_memory()
    assert kept == (platform.libc_ver()[0] == "glibc")
    for _ in range(16):  # glibc before 2.38 takes up to ten repeats to find an aligned block again
        torch.ones(1 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 20)  # 4 MiB, 1024 pages
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    assert faults < 100 or not kept
