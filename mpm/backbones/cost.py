"""What a forward pass costs."""

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

__all__ = ["forward_macs"]


def forward_macs(function: Callable[..., Any], *inputs: Any) -> float:
    """Multiply-accumulates of the matrix products of one call, counted by torch.

    The papers' "FLOPs" are these. On the `meta` device nothing is computed.
    """
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() / 2
