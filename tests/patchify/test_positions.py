import math

import pytest
import torch

from mpm.patchify.positions import resample_table, sincos_table


@pytest.mark.parametrize(("grid", "dim"), [((3, 3), 8), ((2, 5), 12), ((1, 4), 4)])
def test_sincos_equals_a_loop(grid, dim) -> None:
    quarter = dim // 4
    expected = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [[at / 10000 ** (k / quarter) for k in range(quarter)] for at in (column, row)]
            expected.append([f(a) for half in angles for f in (math.sin, math.cos) for a in half])
    torch.testing.assert_close(sincos_table(grid, dim), torch.tensor(expected), rtol=0, atol=1e-7)


def test_sincos_equals_lightly() -> None:
    from lightly.models.utils import get_2d_sine_cosine_positional_embedding

    expected = get_2d_sine_cosine_positional_embedding(32, 14, cls_token=False)
    torch.testing.assert_close(
        sincos_table((14, 14), 32), torch.from_numpy(expected).float(), rtol=0, atol=1e-5
    )  # theirs is computed in float32


def test_sincos_needs_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="dim 6 is not a multiple of 4"):
        sincos_table((2, 2), 6)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((3, 5), (6, 4)), ((6, 6), (3, 3))])
def test_resampling_equals_timm(old, new) -> None:
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(old[0] * old[1], 8)
    expected = resample_abs_pos_embed(
        table[None], list(new), list(old), num_prefix_tokens=0, antialias=False
    )[0]
    assert torch.equal(resample_table(table, old, new), expected)


def test_resampling_to_the_same_grid_changes_nothing() -> None:
    table = torch.randn(6, 8)
    assert resample_table(table, (2, 3), (2, 3)) is table


def test_resampling_keeps_the_type() -> None:
    assert resample_table(torch.randn(4, 8).bfloat16(), (2, 2), (3, 3)).dtype == torch.bfloat16
