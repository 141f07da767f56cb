import numpy as np
import pytest
import torch
from scipy.interpolate import make_interp_spline
from scipy.optimize import brentq
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mpm.backbones.adapt import adapt_state, resample_relative_bias
from tests.networks import make_backbone, make_stem, random_images, randomize

SAME_CHANNELS = (3, 3)


@pytest.mark.parametrize(("old", "new"), [((3, 4), (6, 8)), ((4, 4), (7, 5)), ((3, 4), (2, 3))])
def test_positions_of_another_grid_equal_timms(old, new) -> None:
    backbone = randomize(make_backbone(grid=old))
    state = adapt_state(backbone.state_dict(), grids=(old, new), channels=SAME_CHANNELS, depth=0)
    expected = resample_abs_pos_embed(
        backbone.positions.table[None], list(new), list(old), num_prefix_tokens=0, antialias=False
    )
    assert torch.equal(state["positions.table"], expected[0])
    make_backbone(grid=new).load_state_dict(state)  # and nothing else changes its shape


def bias_by_splines(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Not-a-knot cubic splines, one axis after the other; gaps grow so that both grids end alike."""
    square = table.double().reshape(2 * old[0] - 1, 2 * old[1] - 1, -1).numpy()
    for axis in (0, 1):
        reach_old, reach_new = old[axis] - 1, new[axis] - 1
        ratio = brentq(lambda r, n=reach_old, m=reach_new: sum(r**i for i in range(n)) - m, 1.01, 1.5)
        gaps = np.cumsum([ratio**i for i in range(reach_old)])
        places = np.concatenate([-gaps[::-1], [0], gaps])
        square = make_interp_spline(places, square, k=3, axis=axis)(np.arange(-reach_new, reach_new + 1))
    return torch.tensor(square).float().flatten(0, 1)


@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [((5, 5), (6, 6)), ((6, 6), (9, 9)), ((5, 7), (6, 9))])
def test_relative_biases_of_another_grid_equal_splines(old, new, num_prefix: int) -> None:
    options = {"learned_positions": None, "relative_bias": "per_block", "num_prefix": num_prefix}
    backbone = randomize(make_backbone(grid=old, **options))
    state = adapt_state(backbone.state_dict(), grids=(old, new), channels=SAME_CHANNELS, depth=0)
    larger = make_backbone(grid=new, **options)
    larger.load_state_dict(state)
    for index, bias in enumerate(backbone.relative_biases):
        table, found = bias.bias_table.detach(), larger.relative_biases[index].bias_table.detach()
        offsets = (2 * old[0] - 1) * (2 * old[1] - 1)
        expected = bias_by_splines(table[:offsets], old, new)
        # the ratio is found to 1e-6, by bisection
        torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=1e-4)
        assert torch.equal(found[len(expected) :], table[offsets:])


@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (4, 4)), ((2, 2), (3, 3)), ((5, 5), (4, 4)), ((3, 3), (7, 7))]
)
def test_any_grid_gets_a_bias_and_the_same_grid_keeps_it(old, new) -> None:
    table = torch.randn((2 * old[0] - 1) ** 2 + 3, 2)
    found = resample_relative_bias(table, old, new)
    assert found.shape == ((2 * new[0] - 1) ** 2 + 3, 2)
    assert found.isfinite().all()
    assert (found is table) == (old == new)


def test_a_shared_bias_is_copied_to_every_block() -> None:
    """BEiT's fine-tuning: the network is the same until the copies learn apart."""
    shared = randomize(make_backbone(relative_bias="shared"))
    grids = (shared.grid, shared.grid)
    per_block = make_backbone(relative_bias="per_block")
    randomize(per_block)
    per_block.load_state_dict(adapt_state(shared.state_dict(), grids=grids, channels=SAME_CHANNELS, depth=2))
    images = random_images()
    assert torch.equal(per_block(images).patches, shared(images).patches)


@pytest.mark.parametrize("kind", ["linear", "hmlp-layer", "conv-layer"])
@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (2, 13), (3, 3)])
def test_equal_channels_give_the_same_tokens(kind: str, old: int, new: int) -> None:
    """A grey image shown in one, three or thirteen equal channels."""
    before, after = (randomize(make_stem(kind, channels=channels)) for channels in (old, new))
    state = {f"stem.{name}": tensor for name, tensor in before.state_dict().items()}
    adapted = adapt_state(state, grids=((3, 4), (3, 4)), channels=(old, new), depth=0)
    after.load_state_dict({name.removeprefix("stem."): tensor for name, tensor in adapted.items()})
    grey = random_images(channels=1)
    torch.testing.assert_close(
        after(grey.expand(-1, new, -1, -1)), before(grey.expand(-1, old, -1, -1)), rtol=1e-4, atol=1e-4
    )
