"""Memory that the C library keeps instead of giving it back after every step."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1  # malloc.h of glibc
_M_MMAP_MAX = -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc to serve large tensors from its heap and never to shrink it; whether it did.

    Otherwise every large activation on a CPU is mapped, faulted in page by page and unmapped in every step.
    Memory use stays at its peak, which is a few blocks higher before glibc 2.38. Does nothing but on Linux
    with glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
