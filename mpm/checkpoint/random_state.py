"""The random generators of a process, as what a checkpoint holds."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["rng_state", "set_rng_state"]


def rng_state(device: torch.device) -> dict[str, Any]:
    """This process's random generators (torch, `device`, Python, numpy) as tensors and numbers."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  libraries draw from it
    _, keys, *numpy_rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (torch.tensor(keys.tolist()), *numpy_rest),
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts this process's random generators where `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    keys, *numpy_rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), *numpy_rest))  # noqa: NPY002
