"""Which patches are hidden: samplers that run in the loader's workers, and the index form the network uses.

Every sampler hides exactly `count` patches, so shapes are static and the device never has to be asked.
"""

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["BlockMask", "MaskSampler", "PatchMask", "RandomMask"]


class PatchMask(NamedTuple):
    """Indices of the visible and the masked patches, the same number in every row.

    Attributes:
        visible: int64 [B,K], ascending.
        masked: int64 [B,M], ascending.
    """

    visible: Tensor
    masked: Tensor

    @classmethod
    def from_bool(cls, masked: Tensor, count: int) -> "PatchMask":
        """From bool [B,N], True = masked, with exactly `count` True a row (the loader checks that)."""
        order = masked.to(torch.uint8).argsort(dim=1, stable=True)
        visible = masked.shape[1] - count
        return cls(order[:, :visible], order[:, visible:])

    def take_visible(self, x: Tensor) -> Tensor:
        """[B,N,...] -> [B,K,...]."""
        return take(x, self.visible)

    def take_masked(self, x: Tensor) -> Tensor:
        """[B,N,...] -> [B,M,...]."""
        return take(x, self.masked)

    def fill(self, visible: Tensor, token: Tensor) -> Tensor:
        """Visible tokens [B,K,D] at their places and `token` [D] at all others: [B,N,D]."""
        B, K, D = visible.shape
        N = K + self.masked.shape[1]
        hidden = token.to(visible.dtype).expand(B, N, D)
        return hidden.scatter(1, self.visible[..., None].expand(B, K, D), visible)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample: x [B,N,...] at index int64 [B,S] -> [B,S,...]."""
    shape = index.shape + x.shape[2:]
    return x.gather(1, index.reshape(*index.shape, *(1,) * (x.ndim - 2)).expand(shape))


class MaskSampler(Protocol):
    """Draws masks for one grid; `count` patches are hidden in every one."""

    count: int

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """Bool [N], row-major, True = masked."""
        ...


class RandomMask:
    """Masks of units chosen uniformly (MAE, arXiv:2111.06377: unit 1; SimMIM, arXiv:2111.09886: unit 2).

    Args:
        grid: patches per side (rows, columns).
        count: patches to mask, a multiple of `unit**2`, 0 < count < rows * columns.
        unit: side of a masking unit in patches.

    Returns (call): bool [N], row-major, True = masked.

    Raises:
        ValueError: if `count` or `unit` does not fit the grid.
    """

    def __init__(self, grid: tuple[int, int], *, count: int, unit: int = 1):
        _check_count(grid, count)
        if grid[0] % unit or grid[1] % unit:
            legal = [u for u in range(1, min(grid) + 1) if grid[0] % u == 0 and grid[1] % u == 0]
            raise ValueError(
                f"mask unit {unit} does not divide the grid {grid[0]}x{grid[1]}; use one of {legal}"
            )
        if count % unit**2:
            raise ValueError(f"mask count {count} is not a multiple of {unit**2} (unit {unit} squared)")
        self.count = count
        self._unit = unit
        self._units = (grid[0] // unit, grid[1] // unit)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a mask."""
        rows, columns = self._units
        units = np.zeros(rows * columns, dtype=bool)
        units[rng.permutation(rows * columns)[: self.count // self._unit**2]] = True
        if self._unit == 1:
            return units
        return units.reshape(rows, columns).repeat(self._unit, 0).repeat(self._unit, 1).reshape(-1)


class BlockMask:
    """Blockwise masks of exactly `count` patches (BEiT, arXiv:2106.08254, Alg. 1).

    Rectangles of random area and aspect ratio (0.3 to 1/0.3) are added until `count` is reached or ten
    tries bring nothing new. Differs from the reference: a mask that falls short is topped up at random,
    so every one hides the same number.

    Args:
        grid: patches per side (rows, columns).
        count: patches to mask, 0 < count < rows * columns.
        min_area: smallest block, in patches.

    Returns (call): bool [N], row-major, True = masked.

    Raises:
        ValueError: if `count` or `min_area` does not fit the grid.
    """

    def __init__(self, grid: tuple[int, int], *, count: int, min_area: int = 16):
        _check_count(grid, count)
        if not 1 <= min_area <= count:
            raise ValueError(f"mask min_area {min_area} is not between 1 and count {count}")
        self.count = count
        self._grid = grid
        self._min_area = min_area

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a mask."""
        mask = self.blocks(rng).reshape(-1)
        missing = self.count - int(mask.sum())
        if missing:
            mask[rng.choice(np.flatnonzero(~mask), size=missing, replace=False)] = True
        return mask

    def blocks(self, rng: np.random.Generator) -> np.ndarray:
        """The blocks alone, before the top-up: bool [rows, columns] with at most `count` True."""
        mask = np.zeros(self._grid, dtype=bool)
        count = 0
        while count < self.count:
            new = self._add_block(mask, self.count - count, rng)
            if not new:
                break
            count += new
        return mask

    def _add_block(self, mask: np.ndarray, most: int, rng: np.random.Generator) -> int:
        """Add one block that hides 1 to `most` new patches; 0 if ten tries failed."""
        rows, columns = self._grid
        for _ in range(10):
            # near the end `most` is below `min_area`; the area then lies between them, as published
            area = self._min_area + (most - self._min_area) * rng.random()
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top, left = rng.integers(0, rows - height + 1), rng.integers(0, columns - width + 1)
            block = mask[top : top + height, left : left + width]
            new = block.size - int(block.sum())
            if 0 < new <= most:
                block[:] = True
                return new
        return 0


def _check_count(grid: tuple[int, int], count: int) -> None:
    patches = grid[0] * grid[1]
    if not 0 < count < patches:
        raise ValueError(
            f"mask count {count} hides {'nothing' if count <= 0 else 'all'} of {patches} patches; "
            f"use 1 to {patches - 1}"
        )
