import platform
import subprocess
import sys

PROGRAM = """
import torch
from mpm.training.allocator import keep_freed_memory
kept = keep_freed_memory()
before = torch.zeros(1 << 24).data_ptr()
after = torch.zeros(1 << 24).data_ptr()
print(int(kept), int(before == after))
"""


def test_glibc_gives_a_freed_tensor_s_memory_to_the_next() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, reused = map(int, output.split())
    assert kept == (platform.libc_ver()[0] == "glibc")
    assert reused or not kept
