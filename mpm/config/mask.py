"""Configuration of the mask: which patches are hidden."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mpm.config.section import Count, Section, multiples_near

__all__ = ["BlockMask", "Mask", "RandomMask"]


class RandomMask(Section):
    """Units hidden uniformly at random (MAE: unit 1; SimMIM: unit 2)."""

    alternatives: ClassVar = {"ratio": "count", "count": "ratio"}

    kind: Literal["random"] = "random"
    ratio: float | None = None
    """Share of the units to hide, rounded up to whole ones."""
    count: int | None = None
    """Patches to hide, in place of ratio."""
    unit: Count = 1
    """Side of a masking unit in patches."""

    @model_validator(mode="after")
    def _check(self) -> "RandomMask":
        _check_amount(self.ratio, self.count)
        return self

    def masked(self, grid: tuple[int, int]) -> int:
        """Patches hidden on a grid (rows, columns).

        Raises:
            ValueError: if the mask does not fit the grid.
        """
        rows, columns = grid
        if rows % self.unit or columns % self.unit:
            legal = [unit for unit in range(1, max(grid)) if not (rows % unit or columns % unit)]
            raise ValueError(
                f"mask.unit {self.unit} does not divide the grid {rows}x{columns}; use one of {legal}"
            )
        return _masked(self.ratio, self.count, patches=rows * columns, area=self.unit**2)


class BlockMask(Section):
    """Rectangles hidden until the count is reached (BEiT, arXiv:2106.08254, Alg. 1)."""

    alternatives: ClassVar = {"ratio": "count", "count": "ratio"}

    kind: Literal["block"] = "block"
    ratio: float | None = None
    """Share of the patches to hide, rounded up."""
    count: int | None = None
    """Patches to hide, in place of ratio (BEiT: 75 of 196)."""
    min_area: Count = 16
    """Smallest block, in patches."""

    @model_validator(mode="after")
    def _check(self) -> "BlockMask":
        _check_amount(self.ratio, self.count)
        return self

    def masked(self, grid: tuple[int, int]) -> int:
        """Patches hidden on a grid (rows, columns).

        Raises:
            ValueError: if the mask does not fit the grid.
        """
        masked = _masked(self.ratio, self.count, patches=grid[0] * grid[1], area=1)
        if self.min_area > masked:
            raise ValueError(
                f"mask.min_area {self.min_area} is above the {masked} patches to hide; use 1 to {masked}"
            )
        return masked


Mask = Annotated[RandomMask | BlockMask, Field(discriminator="kind")]


def _check_amount(ratio: float | None, count: int | None) -> None:
    if (ratio is None) == (count is None):
        raise ValueError(f"ratio {ratio} and count {count} are given; give exactly one")


def _masked(ratio: float | None, count: int | None, *, patches: int, area: int) -> int:
    """Patches hidden: `count`, or a ratio of the units of `area` patches rounded up."""
    units = patches // area
    # 1e-6: 0.6 * 5 is a little above 3 in floating point
    masked = count if count is not None else math.ceil(ratio * units - 1e-6) * area  # type: ignore[operator]
    given = f"mask.count {count}" if count is not None else f"mask.ratio {ratio:g}"
    if units < 2:
        raise ValueError(
            f"{given} hides all or nothing of {units} masking unit; use a smaller mask.unit or patch_size"
        )
    if masked % area:
        raise ValueError(f"{given} is not whole units of {area} patches; use {multiples_near(masked, area)}")
    if not 0 < masked < patches:
        hidden = "nothing" if masked <= 0 else "all"
        largest = math.floor((units - 1) / units * 1000) / 1000
        legal = f"{area} to {patches - area}" if count is not None else f"more than 0 and at most {largest:g}"
        raise ValueError(f"{given} hides {hidden} of {patches} patches; use {legal}")
    return masked
