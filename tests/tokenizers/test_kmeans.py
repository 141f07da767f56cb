import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpm.patchify.pixels import Normalize
from mpm.tokenizers.base import Tokenizer
from mpm.tokenizers.kmeans import FeatureCodes, PatchCodes
from tests.networks import DIM, GRID, PATCH, make_backbone, randomize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGE_SIZE = GRID[0] * PATCH[0], GRID[1] * PATCH[1]


def make_images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *IMAGE_SIZE)


def make_patch_codes(num_codes: int = 6, *, normalize_patches: bool = True) -> PatchCodes:
    return PatchCodes(
        num_codes,
        patch_size=PATCH,
        normalize=Normalize(MEAN, STD),
        channels=3,
        normalize_patches=normalize_patches,
    )


def make_feature_codes(
    num_codes: int = 6,
    *,
    stem: str = "linear",
    layer: int | None = None,
    with_norm: bool = True,
    relative_bias: str | None = None,
) -> FeatureCodes:
    backbone = make_backbone(stem, depth=3, num_prefix=2, relative_bias=relative_bias)
    norm = torch.nn.LayerNorm(DIM, eps=1e-6) if with_norm else None
    tokenizer = FeatureCodes(
        num_codes, backbone=backbone, norm=norm, normalize=Normalize(MEAN, STD), layer=layer
    )
    return randomize(tokenizer)


def started(tokenizer: PatchCodes | FeatureCodes) -> PatchCodes | FeatureCodes:
    tokenizer.codebook.start(tokenizer.vectors(make_images(4)), seed=0)
    return tokenizer


TOKENIZERS = {
    "patches": make_patch_codes,
    "features": make_feature_codes,
    "features, inner layer, batch norm": lambda: make_feature_codes(stem="hmlp-all", layer=2),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_image_has_the_code_of_the_nearest_centroid_at_each_patch(kind: str) -> None:
    tokenizer, images = started(TOKENIZERS[kind]()), make_images()
    codes = tokenizer.encode(images)
    assert (codes.shape, codes.dtype) == ((2, 12), torch.int64)
    assert len(codes.unique()) > 2
    vectors = tokenizer.vectors(images).double()
    distances = (vectors[:, :, None] - tokenizer.codebook.vectors.double()).square().sum(-1)
    assert codes.equal(distances.argmin(-1))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_codes_do_not_depend_on_the_batch_the_mode_or_autocast(kind: str) -> None:
    tokenizer, images = started(TOKENIZERS[kind]()), make_images(5)
    together = tokenizer.encode(images)
    assert torch.cat([tokenizer.encode(part) for part in images.split(2)]).equal(together)
    tokenizer.train()
    assert tokenizer.encode(images).equal(together)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encode(images).equal(together)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_says_what_it_takes_and_gives(kind: str) -> None:
    tokenizer: Tokenizer = started(TOKENIZERS[kind]())
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.channels) == (6, PATCH, 3)
    assert tokenizer.interpolation == "bicubic"
    assert tokenizer.grid == (None if kind == "patches" else GRID)
    assert tokenizer.decode(tokenizer.encode(make_images()), GRID) is None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_loaded_tokenizer_gives_the_same_codes(kind: str) -> None:
    tokenizer, images = started(TOKENIZERS[kind]()), make_images()
    loaded = TOKENIZERS[kind]()
    with pytest.raises(AssertionError, match="trained or loaded"):
        loaded.encode(images)
    loaded.load_state_dict(tokenizer.state_dict())
    assert loaded.encode(images).equal(tokenizer.encode(images))


@pytest.mark.parametrize("normalize_patches", [True, False])
def test_pixels_are_those_of_each_patch_by_its_own_moments(normalize_patches: bool) -> None:
    images = make_images()
    found = make_patch_codes(normalize_patches=normalize_patches).vectors(images)
    assert found.shape == (2, 12, 48)
    for b in range(2):
        for n in range(12):
            top, left = n // GRID[1] * 4, n % GRID[1] * 4
            patch = images[b, :, top : top + 4, left : left + 4].tolist()
            values = [
                (patch[c][y][x] - MEAN[c]) / STD[c] for y in range(4) for x in range(4) for c in range(3)
            ]
            if normalize_patches:
                mean = sum(values) / 48
                variance = sum((value - mean) ** 2 for value in values) / 47
                values = [(value - mean) / math.sqrt(variance + 0.003) for value in values]
            torch.testing.assert_close(found[b, n], torch.tensor(values), rtol=1e-4, atol=1e-5)


def test_the_noise_of_flat_patches_stays_small() -> None:
    flat = torch.full((1, 3, 8, 8), 0.7)
    flat[..., :4] += torch.randint(2, (1, 3, 8, 4)) / 255  # half the patches differ by a grey level
    tokenizer = make_patch_codes()
    tokenizer.normalize = Normalize((0.5,) * 3, (0.225,) * 3)
    noisy, constant = tokenizer.vectors(flat)[0, [0, 2]], tokenizer.vectors(flat)[0, [1, 3]]
    assert noisy.square().mean().sqrt() < 0.2
    assert constant.abs().max() < 1e-4


@pytest.mark.parametrize("relative_bias", [None, "shared", "per_block"])
@pytest.mark.parametrize("layer", [None, 3, 2, 1])
def test_features_are_the_networks_tokens(layer: int | None, relative_bias: str | None) -> None:
    tokenizer = make_feature_codes(layer=layer, relative_bias=relative_bias)
    assert tokenizer.backbone.depth == len(tokenizer.backbone.blocks) == (layer or 3)
    whole = make_feature_codes(relative_bias=relative_bias)
    missing = whole.load_state_dict(tokenizer.state_dict(), strict=False).missing_keys
    assert all(name.startswith(("backbone.blocks", "backbone.relative_biases", "norm")) for name in missing)
    images = make_images()
    normalized = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    index = (layer or 3) - 1
    tokens = whole.backbone.encode(whole.backbone.embed(normalized), layers=[index]).layers[0][:, 2:]
    expected = tokenizer.norm(tokens) if layer in (None, 3) else F.layer_norm(tokens, (DIM,), eps=1e-6)
    torch.testing.assert_close(tokenizer.vectors(images), expected, rtol=1e-5, atol=1e-5)


def test_the_last_tokens_of_a_network_without_norm_are_standardised() -> None:
    vectors = make_feature_codes(with_norm=False).vectors(make_images())
    torch.testing.assert_close(vectors.mean(-1), torch.zeros(2, 12), rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors.var(-1, unbiased=False), torch.ones(2, 12), rtol=1e-4, atol=0)


def test_the_network_is_frozen_and_stays_in_eval_mode() -> None:
    tokenizer = make_feature_codes(stem="hmlp-all")
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    state = copy.deepcopy(tokenizer.state_dict())
    tokenizer.train()
    assert not any(part.training for part in tokenizer.modules())
    tokenizer.vectors(make_images())
    torch.testing.assert_close(tokenizer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer {layer} of the network is not there; use 1 to 3"):
        make_feature_codes(layer=layer)


def test_images_of_another_size_are_refused_by_a_network() -> None:
    with pytest.raises(ValueError, match="images of 16x16 pixels, where the tokenizer's network takes 12x16"):
        make_feature_codes().vectors(torch.rand(1, 3, 16, 16))
    assert make_patch_codes().vectors(torch.rand(1, 3, 16, 20)).shape == (1, 20, 48)
