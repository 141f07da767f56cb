"""A backbone's weights for other images than it was trained on: another grid, other channels."""

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

    Raises:
        ValueError: if there is a relative bias to resample and a grid is not square.
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
    """A relative-bias table [rows,h] for another grid (BEiT's code: cubic over geometrically spaced offsets).

    timm's implementation is used, which is for square grids; the three rows of prefix tokens stay.

    Raises:
        ValueError: if a grid is not square.
    """
    if old == new:
        return table
    for rows, columns in (old, new):
        if rows != columns:
            raise ValueError(
                f"a relative position bias is resampled between square grids only, not {rows}x{columns}"
            )
    from timm.layers import resize_rel_pos_bias_table

    prefix_rows = len(table) - (2 * old[0] - 1) ** 2
    shape = ((2 * new[0] - 1) ** 2 + prefix_rows, table.shape[1])
    resized: Tensor = resize_rel_pos_bias_table(table, new_window_size=new, new_bias_shape=shape)
    return resized


def _adapt_channels(weight: Tensor, old: int, new: int) -> Tensor:
    """Linear [D,(pixels channels)] or convolution [D,channels,kh,kw]."""
    if old == new:
        return weight
    if weight.ndim == 4:
        return repeat(weight.mean(1), "d h w -> d c h w", c=new) * (old / new)
    mean = rearrange(weight, "d (p c) -> d p c", c=old).mean(2)
    return repeat(mean, "d p -> d (p c)", c=new) * (old / new)
