import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from mpm.backbones.backbone import vit_blocks
from mpm.backbones.blocks import Block, DropPath
from mpm.patchify.masks import take
from tests.networks import randomize


@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize("mlp_ratio", [4.0, 2.5])
def test_block_equals_timm(layer_scale, mlp_ratio) -> None:
    """Names too: the state loads as it is."""
    ours = randomize(Block(12, 3, mlp_ratio=mlp_ratio, layer_scale=layer_scale)).double()
    norm = lambda dim, **_: nn.LayerNorm(dim, eps=1e-6)  # noqa: E731  timm passes a device
    theirs = TimmBlock(
        12, 3, mlp_ratio=mlp_ratio, qkv_bias=True, init_values=layer_scale, norm_layer=norm
    ).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("qkv_bias", ["all", "query_value", "none"])
def test_block_of_rows_equals_block_then_take(qkv_bias, with_bias) -> None:
    block = randomize(Block(12, 3, qkv_bias=qkv_bias, layer_scale=0.1)).double()
    x, rows = torch.randn(2, 5, 12, dtype=torch.float64), torch.tensor([[0, 4, 2], [3, 1, 0]])
    bias = torch.randn(2, 3, 5, 5, dtype=torch.float64) if with_bias else None
    picked = None if bias is None else torch.stack([bias[b, :, rows[b]] for b in range(2)])
    torch.testing.assert_close(block(x, picked, rows), take(block(x, bias), rows), rtol=1e-9, atol=1e-9)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    y = DropPath(0.25).train()(torch.ones(20000, 2, 3))
    kept = y[:, 0, 0].ne(0)
    torch.testing.assert_close(y, kept[:, None, None].expand_as(y) / 0.75)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.012)  # four deviations


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.5, False)])
def test_drop_path_does_nothing_at_rate_0_or_in_eval_mode(rate, training) -> None:
    x = torch.randn(4, 2, 3)
    assert DropPath(rate).train(training)(x) is x


def test_the_branches_of_a_block_are_dropped_independently() -> None:
    block = randomize(Block(8, 2, drop_path=0.5)).train()
    x = torch.randn(1, 3, 8).expand(4000, 3, 8)
    outcomes, counts = block(x)[:, 0].unique(dim=0, return_counts=True)
    assert len(outcomes) == 4  # attention kept or dropped, MLP kept or dropped
    assert counts.min() > 880  # 1000 each, four deviations


@pytest.mark.parametrize("depth", [1, 2, 5, 12])
def test_drop_path_rates_rise_linearly_as_timm_has_them(depth: int) -> None:
    from timm.layers import calculate_drop_path_rates

    rates = [block.drop_path.rate for block in vit_blocks(8, depth, 2, drop_path=0.3)]
    assert rates == pytest.approx(calculate_drop_path_rates(0.3, depth))
