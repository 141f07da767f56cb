import functools

import pytest
import torch
from timm.models.cait import ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn

from mpm.backbones.blocks import Block, ClassAttentionBlock, DropPath, ParallelBlock
from mpm.backbones.create import create_blocks
from mpm.backbones.fold import fold
from mpm.patchify.masks import take
from mpm.variants import Architecture
from tests.networks import make_backbone, random_images, random_mask, randomize

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
NORM = functools.partial(nn.LayerNorm, eps=1e-6)


def make_block(dim: int = 12, heads: int = 3, **architecture) -> Block | ParallelBlock:
    (block,) = create_blocks(Architecture((4, 4), dim=dim, depth=1, heads=heads, **architecture))
    return randomize(block)


def double_tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_equal_with_gradients(ours: nn.Module, theirs: nn.Module, *inputs: Tensor) -> None:
    """Outputs, and gradients by inputs and by every parameter (matched by name where the names agree)."""
    a, b = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(a, b, **EXACT)
    weights = torch.randn_like(a)
    for x, y in zip(
        *(torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True) for out in (a, b)),
        strict=True,
    ):
        torch.testing.assert_close(x, y, **EXACT)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    gradients = [
        sorted(p.grad.double().norm().item() for p in module.parameters()) for module in (ours, theirs)
    ]
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize("mlp_ratio", [4.0, 2.5])
def test_block_equals_timm(layer_scale, mlp_ratio) -> None:
    """Names too: the state loads as it is."""
    ours = make_block(mlp_ratio=mlp_ratio, layer_scale=layer_scale).double()
    theirs = TimmBlock(
        12, 3, mlp_ratio=mlp_ratio, qkv_bias=True, init_values=layer_scale, norm_layer=_timm_norm
    ).double()
    theirs.load_state_dict(ours.state_dict())
    assert_equal_with_gradients(ours, theirs, double_tokens(2, 5, 12))


def _timm_norm(dim: int, **_) -> nn.LayerNorm:  # timm passes a device
    return NORM(dim)


@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize("branches", [2, 3])
def test_parallel_block_equals_timm(layer_scale, branches) -> None:
    ours = make_block(branches=branches, layer_scale=layer_scale).double()
    theirs = ParallelThingsBlock(
        12, 3, num_parallel=branches, qkv_bias=True, init_values=layer_scale, norm_layer=_timm_norm
    ).double()
    theirs.load_state_dict(ours.state_dict())
    assert_equal_with_gradients(ours, theirs, double_tokens(2, 5, 12))


def test_talking_heads_equal_timm() -> None:
    ours = make_block(attention="talking_heads", layer_scale=1e-5).double()
    theirs = LayerScaleBlock(
        12, 3, qkv_bias=True, attn_block=TalkingHeadAttn, norm_layer=_timm_norm, init_values=1e-5
    ).double()
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2").replace("attend.", ""): tensor
        for name, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    assert_equal_with_gradients(ours, theirs, double_tokens(2, 5, 12))


def test_class_attention_with_one_query_equals_timm() -> None:
    ours = randomize(ClassAttentionBlock(12, 3, layer_scale=1e-5)).double()
    theirs = LayerScaleBlockClassAttn(
        12, 3, qkv_bias=True, attn_block=ClassAttn, norm_layer=_timm_norm, init_values=1e-5
    ).double()
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(state)

    class Swapped(nn.Module):  # timm takes the patches first
        def __init__(self) -> None:
            super().__init__()
            self.block = theirs

        def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
            return self.block(patches, queries)

    assert_equal_with_gradients(ours, Swapped(), double_tokens(2, 1, 12), double_tokens(2, 5, 12))


def test_class_attention_with_two_queries_equals_a_loop() -> None:
    """Each query attends to both queries and all patches; queries that ask stay in their own row."""
    block = randomize(ClassAttentionBlock(8, 2, layer_scale=0.1)).double()
    queries, patches = double_tokens(1, 2, 8), double_tokens(1, 3, 8)
    normed = block.norm1(torch.cat([queries, patches], dim=1))[0]
    attn = block.attn
    expected = []
    for asked in range(2):
        pooled = []
        for head in (slice(0, 4), slice(4, 8)):
            logits = torch.stack([attn.q(normed[asked])[head] @ attn.k(seen)[head] / 2 for seen in normed])
            pooled.append(logits.softmax(0) @ torch.stack([attn.v(seen)[head] for seen in normed]))
        out = queries[0, asked] + block.ls1.gamma * attn.proj(torch.cat(pooled))
        expected.append(out + block.ls2.gamma * block.mlp(block.norm2(out)))
    torch.testing.assert_close(block(queries, patches)[0], torch.stack(expected), **EXACT)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("qkv_bias", ["all", "query_value", "none"])
@pytest.mark.parametrize("kind", [{}, {"branches": 2}, {"attention": "talking_heads"}], ids=str)
def test_block_of_rows_equals_block_then_take(kind, qkv_bias, with_bias) -> None:
    block = make_block(qkv_bias=qkv_bias, layer_scale=0.1, **kind).double()
    x, rows = torch.randn(2, 5, 12, dtype=torch.float64), torch.tensor([[0, 4, 2], [3, 1, 0]])
    bias = torch.randn(2, 3, 5, 5, dtype=torch.float64) if with_bias else None
    picked = None if bias is None else torch.stack([bias[b, :, rows[b]] for b in range(2)])
    torch.testing.assert_close(block(x, picked, rows), take(block(x, bias), rows), **EXACT)


def test_a_bias_of_talking_heads_is_added_to_what_the_softmax_sees() -> None:
    """Each head keeps its own bias: a bias that forbids a token to one head takes its weight there."""
    attend = make_block(attention="talking_heads").attn.attend.double()
    q, k, v = (torch.randn(1, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    logits = torch.einsum("bhsd,bhtd->bsth", q, k) / 2
    logits = attend.proj_l(logits).permute(0, 3, 1, 2) + bias
    weights = attend.proj_w(logits.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(attend(q, k, v, bias), weights @ v, **EXACT)


@pytest.mark.parametrize("attention", ["softmax", "talking_heads"])
@pytest.mark.parametrize("relative_bias", [None, "shared", "per_block"])
@pytest.mark.parametrize("qkv_bias", ["all", "query_value", "none"])
def test_folding_parallel_branches_is_exact(attention, relative_bias, qkv_bias) -> None:
    backbone = make_backbone(
        branches=3, attention=attention, relative_bias=relative_bias, qkv_bias=qkv_bias, layer_scale=0.1
    )
    backbone = randomize(backbone).double().eval()
    folded = fold(backbone)
    assert all(isinstance(block, Block) for block in folded.blocks)
    images, mask = random_images().double(), random_mask(2, 12, 7)
    tokens = backbone.embed(images, mask)
    for ours, theirs in (
        (folded(images), backbone(images)),
        (folded.encode(tokens, at=mask.visible), backbone.encode(tokens, at=mask.visible)),
    ):
        torch.testing.assert_close(ours.prefix, theirs.prefix, **EXACT)
        torch.testing.assert_close(ours.patches, theirs.patches, **EXACT)
    assert isinstance(backbone.blocks[0], ParallelBlock)  # what was folded is as it was


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
    block = make_block(8, 2, drop_path=0.5, drop_path_rule="constant").train()
    x = torch.randn(1, 3, 8).expand(4000, 3, 8)
    outcomes, counts = block(x)[:, 0].unique(dim=0, return_counts=True)
    assert len(outcomes) == 4  # attention kept or dropped, MLP kept or dropped
    assert counts.min() > 880  # 1000 each, four deviations


def test_parallel_branches_are_dropped_independently() -> None:
    block = make_block(8, 2, branches=2, drop_path=0.5, drop_path_rule="constant").train()
    x = torch.randn(1, 3, 8).expand(8000, 3, 8)
    outcomes, counts = block(x)[:, 0].unique(dim=0, return_counts=True)
    assert len(outcomes) == 16  # two attentions and two MLPs, each kept or dropped
    assert counts.min() > 410  # 500 each, four deviations


@pytest.mark.parametrize("depth", [1, 2, 5, 12])
@pytest.mark.parametrize("branches", [1, 2])
def test_drop_path_rates_rise_linearly_as_timm_has_them_or_are_constant(depth: int, branches: int) -> None:
    from timm.layers import calculate_drop_path_rates

    sizes = Architecture((4, 4), dim=8, depth=depth, heads=2, branches=branches, drop_path=0.3)
    rates = [block.drop_path.rate for block in create_blocks(sizes)]
    assert rates == pytest.approx(calculate_drop_path_rates(0.3, depth))
    rates = [block.drop_path.rate for block in create_blocks(sizes._replace(drop_path_rule="constant"))]
    assert rates == [0.3] * depth
