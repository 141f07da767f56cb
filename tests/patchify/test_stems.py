import math

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mpm.patchify.masks import PatchMask
from mpm.patchify.stems import ConvStem, HierarchicalMLPStem, LinearStem, Stem, merge_factors
from tests import networks
from tests.networks import CHANNELS, GRID, random_images, random_mask, randomize, with_hidden

LINEAR_FORMS = {
    "linear-gelu": {"activation": "gelu"},
    "linear-layer": {"norm": "layer"},
    "linear-visible": {"norm": "batch", "statistics": "visible", "activation": "gelu"},
    "linear-all": {"norm": "batch", "statistics": "all"},
    "linear-all-gelu": {"norm": "batch", "statistics": "all", "activation": "gelu"},
}
STEMS = (*networks.STEMS, *LINEAR_FORMS)
ON_ALL = ["linear-all", "linear-all-gelu", "hmlp-all"]
ON_VISIBLE = ["linear-visible", "hmlp-visible"]
BLIND_IN_TRAINING = [kind for kind in STEMS if kind not in ON_ALL]
PATCH_LOCAL = [kind for kind in STEMS if not kind.startswith("conv")]
SUM_ORDER = {"rtol": 1e-5, "atol": 1e-5}  # the same sums over another number of rows


def make_stem(kind: str, patch_size: int = 4, *, channels: int = CHANNELS) -> Stem:
    """A stem by the name of its kind, of every form."""
    if kind in LINEAR_FORMS:
        return LinearStem((patch_size, patch_size), networks.DIM, channels=channels, **LINEAR_FORMS[kind])
    return networks.make_stem(kind, patch_size, channels=channels)


def published_hmlp(stem: HierarchicalMLPStem, *, channels: int, norm: str) -> nn.ModuleDict:
    """The stem as published: convolutions with kernel = stride, in the released code's key layout."""
    layers: list[nn.Module] = []
    narrow, factors = channels, merge_factors(stem.patch_size[0])
    for factor in factors:
        wide = stem.dim if len(layers) == 3 * (len(factors) - 1) else stem.dim // 4
        layers += [
            nn.Conv2d(narrow, wide, factor, stride=factor),
            nn.BatchNorm2d(wide) if norm == "batch" else LayerNorm2d(wide, eps=1e-6),
            nn.GELU(),
        ]
        narrow = wide
    return nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Sequential(*layers[:-1])})})


def tokens_of(published: nn.ModuleDict, images: Tensor) -> Tensor:
    return published["patch_embed"]["proj"](images).flatten(2).transpose(1, 2)


def from_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys `patch_embed.proj.{0,3,6}` are convolutions, `{1,4,7}` their norms."""
    mapped = {}
    for key, tensor in tensors.items():
        index, name = key.removeprefix("patch_embed.proj.").split(".")
        if int(index) % 3 == 0:
            flat = tensor.permute(0, 2, 3, 1).flatten(1) if name == "weight" else tensor
            mapped[f"projs.{int(index) // 3}.{name}"] = flat
        else:
            mapped[f"norms.{int(index) // 3}.{name}"] = tensor
    return mapped


def hmlp_pair(patch_size: int, norm: str, channels: int) -> tuple[HierarchicalMLPStem, nn.ModuleDict]:
    kind = "hmlp-layer" if norm == "layer" else "hmlp-all"
    stem = make_stem(kind, patch_size, channels=channels)
    published = randomize(published_hmlp(stem, channels=channels, norm=norm))
    stem.load_state_dict(from_published(published.state_dict()))
    return stem, published


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("patch_size", [(4, 4), (2, 6), (5, 3)])
def test_linear_equals_a_convolution(patch_size, channels) -> None:
    stem = LinearStem(patch_size, 8, channels=channels)
    conv = nn.Conv2d(channels, 8, patch_size, stride=patch_size)
    stem.proj.load_state_dict({"weight": conv.weight.permute(0, 2, 3, 1).flatten(1), "bias": conv.bias})
    images = torch.randn(2, channels, 3 * patch_size[0], 2 * patch_size[1])
    torch.testing.assert_close(stem(images), conv(images).flatten(2).transpose(1, 2), **SUM_ORDER)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_norm_and_activation_of_a_linear_stem_equal_torch_layers(norm, activation, training) -> None:
    """Outputs, gradients, and what a training step leaves in the running statistics."""
    stem = randomize(LinearStem((4, 2), 8, channels=2, norm=norm, activation=activation)).train(training)
    conv = nn.Conv2d(2, 8, (4, 2), stride=(4, 2))
    conv.load_state_dict(
        {"weight": stem.proj.weight.reshape(8, 4, 2, 2).permute(0, 3, 1, 2), "bias": stem.proj.bias}
    )
    theirs = {"none": nn.Identity(), "layer": LayerNorm2d(8, eps=1e-6), "batch": nn.BatchNorm2d(8)}[norm]
    theirs.load_state_dict(stem.norm.state_dict())
    layers = nn.Sequential(conv, theirs, nn.GELU() if activation == "gelu" else nn.Identity()).train(training)
    images = torch.randn(2, 2, 12, 4)
    expected, found = layers(images).flatten(2).transpose(1, 2), stem(images)
    torch.testing.assert_close(found, expected, **SUM_ORDER)

    weights = torch.randn_like(expected)
    for tokens in (expected, found):
        (tokens * weights).sum().backward()
    flat = conv.weight.grad.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(stem.proj.weight.grad, flat, **SUM_ORDER)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(stem.norm.get_parameter(name).grad, parameter.grad, **SUM_ORDER)
    torch.testing.assert_close(stem.norm.state_dict(), theirs.state_dict(), **SUM_ORDER)


def test_the_linear_stem_alone_is_its_projection() -> None:
    assert list(LinearStem((4, 4), 8).state_dict()) == ["proj.weight", "proj.bias"]
    batch = LinearStem((4, 4), 8, norm="batch", activation="gelu").state_dict()
    assert {name.rpartition(".")[0] for name in batch} == {"proj", "norm"}


@pytest.mark.parametrize("kind", STEMS)
def test_a_stem_says_whether_it_computes_hidden_patches(kind: str) -> None:
    """As the rows of its matrix products do; a convolution always has the whole image."""
    stem, images, mask = make_stem(kind), random_images(), random_mask(2, 12, 9)
    rows: list[int] = []
    for layer in stem.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, inputs, output: rows.append(output.shape[1]))
    for training in (True, False):
        rows.clear()
        stem.train(training)(images, mask)
        assert stem.computes_hidden == (not rows or set(rows) == {12})
        assert stem.computes_hidden or set(rows) == {3}


@pytest.mark.parametrize("kind", STEMS)
def test_shapes(kind: str) -> None:
    stem, images = make_stem(kind), random_images()
    assert stem(images).shape == (2, 12, 16)
    assert stem(images, random_mask(2, 12, 9)).shape == (2, 3, 16)


@pytest.mark.parametrize("hidden", ["other pixels", math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "training"), [*((k, True) for k in BLIND_IN_TRAINING), *((k, False) for k in STEMS)]
)
def test_stem_ignores_masked_pixels(kind: str, training: bool, hidden: str | float) -> None:
    stem, images, mask = randomize(make_stem(kind)).train(training), random_images(), random_mask(2, 12, 7)
    changed = with_hidden(images, mask, random_images() if isinstance(hidden, str) else hidden)
    expected = stem(images, mask)
    assert expected.isfinite().all()
    assert torch.equal(stem(changed, mask), expected)
    assert not torch.equal(stem(changed), stem(images))  # the pixels did change


@pytest.mark.parametrize("kind", BLIND_IN_TRAINING)
def test_running_statistics_ignore_masked_pixels(kind: str) -> None:
    stem, images, mask = randomize(make_stem(kind)), random_images(), random_mask(2, 12, 7)
    stem(with_hidden(images, mask, math.nan), mask)
    assert all(buffer.isfinite().all() for buffer in stem.buffers())


@pytest.mark.parametrize("kind", ON_ALL)
def test_statistics_of_all_see_masked_pixels_through_moments_only(kind: str) -> None:
    """A permutation of the hidden patches keeps the moments, so the visible tokens stay."""
    stem, images, mask = randomize(make_stem(kind)), random_images(), random_mask(2, 12, 7)
    turned = images.clone()
    for b, row in enumerate(mask.masked.tolist()):
        for to, source in zip(row, row[1:] + row[:1], strict=True):
            boxes = [
                (b, slice(None), slice(i // 4 * 4, i // 4 * 4 + 4), slice(i % 4 * 4, i % 4 * 4 + 4))
                for i in (to, source)
            ]
            turned[boxes[0]] = images[boxes[1]]
    expected = stem(images, mask)
    torch.testing.assert_close(stem(turned, mask), expected, **SUM_ORDER)
    assert not torch.allclose(stem(with_hidden(images, mask, random_images()), mask), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "training"),
    [*((k, False) for k in PATCH_LOCAL), *((k, True) for k in PATCH_LOCAL if k not in ON_VISIBLE)],
)
def test_masking_and_a_patch_local_stem_commute(kind: str, training: bool) -> None:
    stem, images, mask = randomize(make_stem(kind)).train(training), random_images(), random_mask(2, 12, 7)
    assert stem.patch_local
    torch.testing.assert_close(stem(images, mask), mask.take_visible(stem(images)), **SUM_ORDER)


@pytest.mark.parametrize("kind", ON_VISIBLE)
def test_batch_statistics_of_visible_patches_do_not_commute(kind: str) -> None:
    stem, images, mask = randomize(make_stem(kind)), random_images(), random_mask(2, 12, 7)
    assert not torch.allclose(stem(images, mask), mask.take_visible(stem(images)), atol=1e-2)


@pytest.mark.parametrize("kind", STEMS)
def test_a_token_depends_on_its_own_patch_where_the_stem_says_so(kind: str) -> None:
    stem, images = randomize(make_stem(kind)).eval(), random_images(1).requires_grad_()
    stem(images)[0, 5].sum().backward()  # row 1, column 1 of the grid
    touched = images.grad[0].abs().sum(0).ne(0)
    own = torch.zeros_like(touched)
    own[4:8, 4:8] = True
    assert touched[own].all()
    assert stem.patch_local == (not touched[~own].any())


@pytest.mark.parametrize(("norm", "training"), [("layer", True), ("batch", False), ("batch", True)])
@pytest.mark.parametrize("patch_size", [16, 8, 4, 14, 32, 7])
def test_hmlp_equals_the_published_convolutions(patch_size: int, norm: str, training: bool) -> None:
    """Outputs, gradients, and what a training step leaves in the running statistics."""
    channels = 2 if patch_size == 8 else 3
    stem, published = hmlp_pair(patch_size, norm, channels)
    for module in (stem, published):
        module.train(training)
    images = torch.randn(2, channels, 2 * patch_size, 3 * patch_size)
    expected, found = tokens_of(published, images), stem(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn_like(expected)
    for tokens in (expected, found):
        (tokens * weights).sum().backward()
    gradients = from_published({name: p.grad for name, p in published.named_parameters()})
    scale = max(gradient.abs().max() for gradient in gradients.values())  # some are 0 but for rounding
    for name, parameter in stem.named_parameters():
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, rtol=1e-5, atol=1e-5)
    state = from_published(published.state_dict())
    assert state.keys() == stem.state_dict().keys()
    for name, buffer in stem.named_buffers():
        torch.testing.assert_close(buffer, state[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_hmlp_under_a_mask_equals_masking_after_the_published_convolutions(norm: str) -> None:
    """As BEiT was combined with the stem in the paper; batch norm in train mode, on all statistics."""
    stem, published = hmlp_pair(16, norm, 3)
    images, mask = random_images(patch_size=16), random_mask(2, 12, 7)
    expected = mask.take_visible(tokens_of(published, images))
    torch.testing.assert_close(stem(images, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["hmlp-all", "hmlp-layer"])
def test_the_published_key_layout_of_patch_16(kind: str) -> None:
    norm = "layer" if kind == "hmlp-layer" else "batch"
    keys = published_hmlp(make_stem(kind, 16), channels=3, norm=norm).state_dict().keys()
    layers = {int(key.split(".")[2]) for key in keys}
    assert layers == {0, 1, 3, 4, 6, 7}


@pytest.mark.parametrize(
    ("patch_size", "factors"),
    [
        (16, (4, 2, 2)),
        (8, (4, 2)),
        (4, (2, 2)),
        (14, (7, 2)),
        (32, (4, 2, 2, 2)),
        (28, (7, 2, 2)),
        *((one, (one,)) for one in (1, 2, 3, 5, 6, 7, 10, 12, 21)),
    ],
)
def test_merge_factors(patch_size: int, factors: tuple[int, ...]) -> None:
    assert merge_factors(patch_size) == factors
    assert math.prod(factors) == patch_size


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(
    ("dim", "hmlp", "linear"),
    [
        (192, 49_248, 147_648),
        (384, 190_656, 295_296),
        (768, 749_952, 590_592),
        (1024, 1_327_616, 787_456),
    ],
)
def test_parameter_integers_of_patch_16(dim: int, hmlp: int, linear: int, norm: str) -> None:
    """Counted from the released class ("Three things", App. C)."""
    with torch.device("meta"):
        stems = HierarchicalMLPStem((16, 16), dim, norm=norm), LinearStem((16, 16), dim)
    assert [sum(p.numel() for p in stem.parameters()) for stem in stems] == [hmlp, linear]


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(("patch_size", "channels"), [(2, 1), (4, 3), (16, 2)])
def test_conv_stem_equals_torch_layers(patch_size: int, channels: int, norm: str) -> None:
    stem = randomize(ConvStem((patch_size, patch_size), 16, channels=channels, norm=norm))
    layers: list[nn.Module] = []
    for conv, ours in zip(stem.convs, stem.norms, strict=True):
        wide = conv.out_channels
        theirs = nn.BatchNorm2d(wide) if norm == "batch" else LayerNorm2d(wide, eps=1e-6)
        theirs.load_state_dict(ours.state_dict())
        layers += [conv, theirs, nn.GELU()]
    assert [conv.out_channels for conv in stem.convs][-1] == 16
    images = torch.randn(2, channels, 2 * patch_size, 3 * patch_size)
    expected = nn.Sequential(*layers[:-1])(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(images), expected, **SUM_ORDER)


def test_conv_stem_sees_hidden_pixels_as_zero() -> None:
    stem, images, mask = randomize(make_stem("conv-layer")), random_images(), random_mask(2, 12, 7)
    expected = mask.take_visible(stem(with_hidden(images, mask, 0.0)))
    assert torch.equal(stem(images, mask), expected)


def test_conv_stem_widths_double() -> None:
    with torch.device("meta"):
        stem = ConvStem((16, 16), 768)
    assert [conv.out_channels for conv in stem.convs] == [96, 192, 384, 768]


@pytest.mark.parametrize("kind", STEMS)
def test_gradients_of_a_masked_stem_equal_those_of_its_tokens(kind: str) -> None:
    """The gathered pixels get the gradient, the hidden ones none."""
    stem, images, mask = randomize(make_stem(kind)).eval(), random_images(), random_mask(2, 12, 7)
    images.requires_grad_()
    stem(images, mask).square().sum().backward()
    assert torch.equal(with_hidden(images.grad, mask, 0.0), images.grad)
    assert images.grad.ne(0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: HierarchicalMLPStem((4, 8), 16),
            r"patch_size \(4, 8\) is not square, which the hmlp stem needs",
        ),
        (lambda: HierarchicalMLPStem((4, 4), 18), "dim 18 is not a multiple of 4, which the hmlp stem needs"),
        (
            lambda: ConvStem((7, 7), 16),
            r"patch_size \(7, 7\) is not a square power of two; the conv stem takes 2, 4",
        ),
        (lambda: ConvStem((4, 8), 16), r"patch_size \(4, 8\) is not a square power of two"),
        (lambda: ConvStem((1, 1), 16), r"patch_size \(1, 1\) is not a square power of two"),
        (
            lambda: ConvStem((16, 16), 20),
            "dim 20 is not a multiple of 8, which a conv stem of patch 16 needs",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_told(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_of_different_masks_takes_different_patches() -> None:
    """Row by row, as if each image were alone."""
    stem, images = randomize(make_stem("hmlp-layer")), random_images(3)
    mask = random_mask(3, GRID[0] * GRID[1], 7)
    whole = stem(images, mask)
    for b in range(3):
        alone = stem(images[b : b + 1], PatchMask(mask.visible[b : b + 1], mask.masked[b : b + 1]))
        torch.testing.assert_close(whole[b : b + 1], alone, **SUM_ORDER)
