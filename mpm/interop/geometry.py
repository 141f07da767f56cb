"""The grid that a file's positions are of."""

import math

import torch
from torch import Tensor

from mpm.patchify.positions import sincos_table

__all__ = ["grid_of_positions", "is_sincos"]


def is_sincos(table: Tensor, grid: tuple[int, int]) -> bool:
    """Whether positions [N,D] are the fixed ones of a grid, but for roundings of float32."""
    length, dim = table.shape
    if length != math.prod(grid) or dim % 4:
        return False
    return torch.allclose(table, sincos_table(grid, dim).to(table), rtol=0, atol=1e-6)


def grid_of_positions(
    length: int | None,
    rows: int | None,
    *,
    prefix: int,
    patch_size: tuple[int, int],
    stated: tuple[int, int] | None,
    image_size: tuple[int, int] | None,
) -> tuple[int, int]:
    """Patches per side (rows, columns).

    An image size that fits the numbers decides, config.json's before the caller's; else the grid is square,
    as published ones are.

    Args:
        length: rows of `pos_embed`, with or without one for each prefix token; None: there is none.
        rows: of the relative bias; None: there is none.
        prefix: prefix tokens.
        patch_size: height and width of a patch in pixels.
        stated: height and width in pixels that the file's config.json says, if any.
        image_size: height and width in pixels that the caller says, if any.

    Raises:
        ValueError: if the grid cannot be told.
    """

    def fits(grid: tuple[int, int]) -> bool:
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * bool(prefix)
        return (length is None or length - math.prod(grid) in (0, prefix)) and (
            rows is None or rows == offsets
        )

    sizes = [size for size in (stated, image_size) if size is not None]
    told = [
        (height // patch_size[0], width // patch_size[1])
        for height, width in sizes
        if height % patch_size[0] == 0 and width % patch_size[1] == 0
    ]
    if length is None and rows is None:
        if told:
            return told[0]
        raise ValueError(
            "the file has no positions (pos_embed, relative_position_bias_table); it may have rotary ones, "
            "which mpm has not; give image_size= if it has none at all"
        )
    if fitting := [grid for grid in told if fits(grid)]:
        return fitting[0]
    squares = [
        (side, side) for side in range(1, math.isqrt(max(length or 0, rows or 0)) + 1) if fits((side, side))
    ]
    if len(squares) == 1:
        return squares[0]
    counted = f"pos_embed has {length} rows" if length else f"the relative bias has {rows} rows"
    reason = "fits two square grids" if squares else "fits no square grid"
    raise ValueError(
        f"{counted}, which with {prefix} prefix tokens {reason}; give image_size=(height, width) of the "
        "training images"
    )
