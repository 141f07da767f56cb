import pytest
import torch
from torch import Tensor

from mpm.backbones.backbone import Backbone
from mpm.patchify.masks import PatchMask, take
from mpm.patchify.stems import LinearStem
from tests.networks import (
    DEPTH,
    GRID,
    STEMS,
    make_backbone,
    random_images,
    random_mask,
    randomize,
    with_hidden,
)

N = GRID[0] * GRID[1]
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
BIASES = [None, "shared", "per_block"]
VARIANTS = {
    "plain": {},
    "fixed positions": {"learned_positions": False},
    "no positions": {"learned_positions": None, "relative_bias": "shared"},
    "no prefix": {"num_prefix": 0, "relative_bias": "per_block"},
    "registers": {"num_prefix": 3, "relative_bias": "shared"},
    "beit": {
        "learned_positions": None,
        "relative_bias": "per_block",
        "qkv_bias": "query_value",
        "layer_scale": 0.1,
    },
    "cait": {"num_prefix": 0, "attention": "talking_heads", "layer_scale": 0.1},
    "parallel": {"branches": 2, "relative_bias": "per_block"},
}


def double_backbone(stem: str = "linear", **options) -> Backbone:
    return randomize(make_backbone(stem, **options)).double()


def double_images() -> Tensor:
    return random_images().double()


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes(name: str) -> None:
    backbone, mask = randomize(make_backbone(**VARIANTS[name])), random_mask(2, N, 7)
    R = backbone.num_prefix
    encoded = backbone(random_images())
    assert (encoded.prefix.shape, encoded.patches.shape) == ((2, R, 16), (2, N, 16))
    tokens = backbone.embed(random_images(), mask)
    assert tokens.shape == (2, 5, 16)
    assert backbone.encode(tokens, at=mask.visible).patches.shape == (2, 5, 16)
    assert backbone.encode(tokens, at=mask.visible, layers=(0,)).layers[0].shape == (2, R + 5, 16)


@pytest.mark.parametrize("learned_positions", [True, False, None])
def test_dropped_tokens_keep_their_own_positions(learned_positions) -> None:
    backbone, images, mask = (
        double_backbone(learned_positions=learned_positions),
        double_images(),
        random_mask(2, N, 7),
    )
    torch.testing.assert_close(
        backbone.embed(images, mask), mask.take_visible(backbone.embed(images)), **EXACT
    )


def test_a_mask_token_stands_at_masked_patches_with_their_positions() -> None:
    backbone, images, mask = double_backbone(), double_images(), random_mask(2, N, 7)
    token = torch.randn(16, dtype=torch.float64)
    whole, found = backbone.embed(images), backbone.embed(images, mask, token)
    for b in range(2):
        for n in range(N):
            hidden = n in mask.masked[b]
            expected = token + backbone.positions.table[n] if hidden else whole[b, n]
            torch.testing.assert_close(found[b, n], expected, **EXACT)


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("relative_bias", BIASES)
def test_visible_tokens_alone_equal_attention_that_cannot_see_the_others(relative_bias, num_prefix) -> None:
    """The oracle keeps all tokens, and gives hidden keys a logit of minus infinity."""
    backbone = double_backbone(relative_bias=relative_bias, num_prefix=num_prefix)
    images, mask, R = double_images(), random_mask(2, N, 7), num_prefix
    x = backbone.embed(images)
    if R:
        x = torch.cat([backbone.prefix_tokens.expand(2, -1, -1), x], 1)
    wall = torch.zeros(2, 1, 1, R + N, dtype=torch.float64)
    for b in range(2):
        wall[b, ..., R + mask.masked[b]] = -torch.inf
    for index, block in enumerate(backbone.blocks):
        tables = backbone.relative_biases
        bias = tables[index if relative_bias == "per_block" else 0]() if relative_bias else 0.0
        x = block(x, bias + wall)
    found = backbone.encode(backbone.embed(images, mask), at=mask.visible)
    torch.testing.assert_close(found.prefix, x[:, :R], **EXACT)
    torch.testing.assert_close(found.patches, mask.take_visible(x[:, R:]), **EXACT)


@pytest.mark.parametrize("name", VARIANTS)
def test_at_says_which_patch_a_token_is_in_any_order(name: str) -> None:
    backbone, images = double_backbone(**VARIANTS[name]), double_images()
    order = torch.rand(2, N).argsort(1)
    tokens = backbone.embed(images)
    expected = backbone.encode(tokens)
    found = backbone.encode(take(tokens, order), at=order)
    torch.testing.assert_close(found.patches, take(expected.patches, order), **EXACT)
    torch.testing.assert_close(found.prefix, expected.prefix, **EXACT)


@pytest.mark.parametrize("layers", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", VARIANTS)
def test_reading_some_equals_encoding_all_then_taking(name: str, layers) -> None:
    backbone, images, mask = double_backbone(**VARIANTS[name]), double_images(), random_mask(2, N, 7)
    tokens = backbone.embed(images)
    everything = backbone.encode(tokens, layers=layers)
    found = backbone.encode(tokens, read=mask.masked, layers=layers)
    torch.testing.assert_close(found.prefix, everything.prefix, **EXACT)
    torch.testing.assert_close(found.patches, mask.take_masked(everything.patches), **EXACT)
    assert len(found.layers) == len(layers)
    for ours, theirs in zip(found.layers, everything.layers, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_layers_are_block_outputs() -> None:
    backbone, images = double_backbone(), double_images()
    outputs: list[Tensor] = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    encoded = backbone.encode(backbone.embed(images), layers=(1, 0))
    assert torch.equal(encoded.layers[0], outputs[1])
    assert torch.equal(encoded.layers[1], outputs[0])
    assert torch.equal(torch.cat([encoded.prefix, encoded.patches], 1), outputs[-1])  # not normalised


@pytest.mark.parametrize("kind", STEMS)
@pytest.mark.parametrize("replace", [False, True])
def test_backbone_ignores_masked_pixels(kind: str, replace: bool) -> None:
    """From end to end; in eval mode, as batch norm on all patches sees moments of them in train mode."""
    backbone = randomize(make_backbone(kind, relative_bias="shared")).eval()
    images, mask = random_images(), random_mask(2, N, 7)
    token, at = (torch.randn(16), None) if replace else (None, mask.visible)
    expected = backbone.encode(backbone.embed(images, mask, token), at=at)
    found = backbone.encode(backbone.embed(with_hidden(images, mask, torch.nan), mask, token), at=at)
    assert expected.patches.isfinite().all()
    assert torch.equal(found.patches, expected.patches)
    assert torch.equal(found.prefix, expected.prefix)


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    backbone, images, mask = (
        double_backbone("hmlp-layer", relative_bias="shared"),
        double_images(),
        random_mask(2, N, 7),
    )
    together = backbone.encode(backbone.embed(images, mask), at=mask.visible)
    for b in range(2):
        row = PatchMask(mask.visible[b : b + 1], mask.masked[b : b + 1])
        alone = backbone.encode(backbone.embed(images[b : b + 1], row), at=row.visible)
        torch.testing.assert_close(together.patches[b : b + 1], alone.patches, **EXACT)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["linear", "hmlp-all", "conv-batch"])
def test_the_residual_stream_is_never_autocast(kind: str, name: str) -> None:
    backbone, mask = randomize(make_backbone(kind, **VARIANTS[name])), random_mask(2, N, 7)
    with torch.autocast("cpu", torch.bfloat16):
        for tokens, at in [
            (backbone.embed(random_images()), None),
            (backbone.embed(random_images(), mask), mask.visible),
            (backbone.embed(random_images(), mask, torch.randn(16)), None),
        ]:
            assert tokens.dtype == torch.float32
            assert backbone.encode(tokens, at=at).patches.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("stem.projs.0.weight", 0),
        ("stem.norms.1.bias", 0),
        ("positions.table", 0),
        ("prefix_tokens", 0),
        ("blocks.0.norm1.weight", 1),
        ("blocks.0.attn.qkv.weight", 1),
        ("blocks.1.mlp.fc2.bias", 2),
        ("blocks.1.ls1.gamma", 2),
    ],
)
def test_layer_of(name: str, layer: int) -> None:
    backbone = make_backbone("hmlp-layer", layer_scale=0.1)
    assert name in dict(backbone.named_parameters())
    assert backbone.layer_of(name) == layer


def test_layer_of_relative_biases() -> None:
    """A bias of its own belongs to its block; a shared one goes with the readout, as in BEiT's code."""
    per_block, shared = (make_backbone(relative_bias=kind) for kind in ("per_block", "shared"))
    assert [per_block.layer_of(f"relative_biases.{i}.bias_table") for i in range(DEPTH)] == [1, 2]
    assert shared.layer_of("relative_biases.0.bias_table") == DEPTH + 1


@pytest.mark.parametrize("kind", STEMS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_layer(kind: str, name: str) -> None:
    backbone = make_backbone(kind, **VARIANTS[name])
    layers = {backbone.layer_of(parameter) for parameter, _ in backbone.named_parameters()}
    assert {0, 1, 2} <= layers <= {0, 1, 2, DEPTH + 1}


@pytest.mark.parametrize(
    "name", ["", "head.weight", "stems.proj.weight", "block.0.norm1.weight", "norm.weight"]
)
def test_layer_of_an_unknown_name_raises(name: str) -> None:
    with pytest.raises(KeyError, match="is no parameter of a backbone"):
        make_backbone().layer_of(name)


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "published"),
    [
        (192, 12, 3, 5_717_224),
        (384, 12, 6, 22_050_280),
        (768, 12, 12, 86_566_888),
        (768, 24, 12, 171_621_352),
        (1024, 24, 16, 304_325_608),
    ],
)
def test_parameters_of_the_published_sizes(dim: int, depth: int, heads: int, published: int) -> None:
    """ "Three things" at 1000 classes (positions without a class slot), less head and final norm."""
    with torch.device("meta"):
        stem = LinearStem((16, 16), dim)
        backbone = make_backbone(stem, grid=(14, 14), dim=dim, depth=depth, heads=heads)
    found = sum(parameter.numel() for parameter in backbone.parameters())
    assert found + 2 * dim + 1000 * (dim + 1) == published
