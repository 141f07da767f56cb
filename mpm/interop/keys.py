"""What the keys and shapes of a state dict tell: numbers of parts, and the stem."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpm.patchify.stems import merge_factors

__all__ = ["count", "outputs_of", "ratio_of", "shape_of", "stem_of"]


def shape_of(state: Mapping[str, Tensor], key: str) -> torch.Size:
    """The shape of a tensor that must be there.

    Raises:
        ValueError: if it is not.
    """
    if key not in state:
        raise ValueError(f"{key} is missing: this is no vision transformer that mpm knows, or not all of one")
    return state[key].shape


def outputs_of(state: Mapping[str, Tensor], key: str) -> int:
    """How many outputs a layer has, from its weight.

    Raises:
        ValueError: if the weight is not there, or empty.
    """
    shape = shape_of(state, key)
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{key} is {list(shape)}, where the weight of a layer is expected")
    return shape[0]


def ratio_of(hidden: int, dim: int) -> float:
    """The ratio of an MLP that gives `hidden` again as int(dim * ratio), for all rounding."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def count(state: Mapping[str, Tensor], template: str) -> int:
    """How many numbers, from 0 on, begin keys of a template such as `blocks.{}.`; none is 0.

    Raises:
        ValueError: if a number is left out.
    """
    pattern = re.escape(template).replace(r"\{\}", r"(\d*)")
    numbers = {int(match[1] or 0) for key in state if (match := re.match(pattern, key))}
    if lost := set(range(max(numbers, default=0))) - numbers:
        raise ValueError(
            f"{template.format(min(lost))} is missing, but not all after it; the file is not whole"
        )
    return len(numbers)


def stem_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], tuple[int, int], int]:
    """Options of the stem, patch size, channels.

    Raises:
        ValueError: if it is none of mpm's.
    """
    if steps := count(state, "patch_embed.convs.{}.weight"):
        channels = _convolution(state, "patch_embed.convs.0.weight")[1]
        return {"kind": "conv", "norm": _norm(state, "patch_embed.norms.0")}, (2**steps, 2**steps), channels
    if "patch_embed.proj.0.weight" in state:
        return _hmlp(state)
    _, channels, *patch_size = _convolution(state, "patch_embed.proj.weight")
    stem: dict[str, Any] = {"kind": "linear"}
    if "patch_embed.norm.weight" in state:
        norm = _norm(state, "patch_embed.norm")
        stem |= {"norm": norm} | _statistics(norm)
    return stem, (patch_size[0], patch_size[1]), channels


def _hmlp(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], tuple[int, int], int]:
    kernels, step = [], 0
    while (key := f"patch_embed.proj.{step}.weight") in state:  # convolution, norm, GELU, convolution, ...
        kernels.append(_convolution(state, key)[2])
        step += 3
    side = math.prod(kernels)
    if tuple(kernels) != merge_factors(side):
        raise ValueError(
            f"the hMLP stem merges by {kernels}; of a patch of {side}, mpm's by {merge_factors(side)}"
        )
    norm = _norm(state, "patch_embed.proj.1")
    channels = _convolution(state, "patch_embed.proj.0.weight")[1]
    return {"kind": "hmlp", "norm": norm} | _statistics(norm), (side, side), channels


def _convolution(state: Mapping[str, Tensor], key: str) -> torch.Size:
    shape = shape_of(state, key)
    if len(shape) != 4:
        raise ValueError(f"{key} has {len(shape)} axes, where a convolution's 4 are expected")
    return shape


def _norm(state: Mapping[str, Tensor], name: str) -> str:
    return "batch" if f"{name}.running_mean" in state else "layer"


def _statistics(norm: str) -> dict[str, str]:
    return {"statistics": "all"} if norm == "batch" else {}
