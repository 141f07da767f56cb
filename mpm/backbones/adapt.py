"""A backbone's weights for other images than it was trained on: another grid, other channels."""

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from mpm.patchify.positions import resample_table

__all__ = ["adapt_state", "resample_relative_bias"]


def adapt_state(
    state: dict[str, Tensor],
    *,
    grids: tuple[tuple[int, int], tuple[int, int]],
    channels: tuple[int, int],
    depth: int,
) -> dict[str, Tensor]:
    """A backbone's state dict for images of another size or number of channels.

    Args:
        state: of a `Backbone`.
        grids: patches per side (rows, columns), old and new; position tables and biases are resampled.
        channels: old and new. The weights that see channels are averaged over the old ones, repeated, and
            scaled so that equal channels give the same tokens.
        depth: blocks, to each of which a shared relative bias is copied (BEiT's fine-tuning); 0: it
            stays shared.
    """
    adapted = {}
    for name, tensor in state.items():
        match name.split("."):
            case ["positions", "table"]:
                adapted[name] = resample_table(tensor, *grids)
            case ["stem", "proj", "weight"] | ["stem", "projs" | "convs", "0", "weight"]:
                adapted[name] = _adapt_channels(tensor, *channels)
            case ["relative_biases", index, "bias_table"]:
                table = resample_relative_bias(tensor, *grids)
                shared = "relative_biases.1.bias_table" not in state
                copies = range(depth) if shared and depth else [int(index)]
                adapted |= {f"relative_biases.{copy}.bias_table": table.clone() for copy in copies}
            case _:
                adapted[name] = tensor
    return adapted


def resample_relative_bias(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A relative-bias table [rows,h] for another grid (the fine-tuning of BEiT's released code).

    Cubic splines through the old biases, laid so that gaps between offsets grow geometrically from the middle
    and the outermost fall on the new outermost: near offsets stay where they were. The three rows of prefix
    tokens stay. The released code takes square grids only; here each axis has a ratio of its own.
    """
    if old == new:
        return table
    from scipy.interpolate import RectBivariateSpline

    knots = [_spread_offsets(before - 1, after - 1) for before, after in zip(old, new, strict=True)]
    wanted = [np.arange(1 - size, size) for size in new]
    count = len(knots[0]) * len(knots[1])
    heads = table[:count].double().cpu().numpy().reshape(len(knots[0]), len(knots[1]), -1)
    degrees = [min(3, len(places) - 1) for places in knots]
    resampled = np.stack(
        [
            RectBivariateSpline(*knots, heads[..., head], kx=degrees[0], ky=degrees[1])(*wanted)
            for head in range(heads.shape[-1])
        ],
        axis=-1,
    )
    flat = torch.from_numpy(resampled).flatten(0, 1).to(table)
    return torch.cat([flat, table[count:]])


def _spread_offsets(old_reach: int, new_reach: int) -> np.ndarray:
    """Places of the old offsets -old_reach .. old_reach among the new ones.

    The ratio of neighbouring gaps is bisected between 1.01 and 1.5, as published.
    """
    low, high = 1.01, 1.5
    powers = np.arange(old_reach)
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (ratio**powers).sum() > new_reach else (ratio, high)
    places = np.cumsum(ratio**powers)
    return np.concatenate([-places[::-1], [0.0], places])


def _adapt_channels(weight: Tensor, old: int, new: int) -> Tensor:
    """Linear [D,(pixels channels)] or convolution [D,channels,kh,kw]."""
    if old == new:
        return weight
    if weight.ndim == 4:
        return repeat(weight.mean(1), "d h w -> d c h w", c=new) * (old / new)
    mean = rearrange(weight, "d (p c) -> d p c", c=old).mean(2)
    return repeat(mean, "d p -> d (p c)", c=new) * (old / new)
