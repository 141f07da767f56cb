"""Position tables: fixed 2-D sine-cosine, and resampling to another grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["resample_table", "sincos_table"]


def sincos_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (MAE, arXiv:2111.06377, App. A).

    The first half of the channels codes the column, the second the row; each half is sines, then cosines.

    Args:
        grid: patches per side (rows, columns).
        dim: width, a multiple of 4.

    Returns: float32 [N,dim], row-major.

    Raises:
        ValueError: if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim {dim} is not a multiple of 4, which sine-cosine positions need")
    rows, columns = grid
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)[:, None] * frequency  # [N,dim/4]
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)[:, None] * frequency
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


def resample_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions of another grid by bicubic interpolation (DeiT, arXiv:2012.12877, section 3).

    Args:
        table: [N,D] of the grid `old`, row-major.
        old: patches per side (rows, columns) of `table`.
        new: patches per side (rows, columns) wanted.

    Returns: [N',D]; `table` itself where the grids are equal.
    """
    if old == new:
        return table
    image = table.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)
