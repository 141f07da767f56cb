import pytest
import torch

from mpm.backbones.backbone import Encoded
from mpm.backbones.create import create_backbone, create_blocks
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.predictors import ClassPretrainingPredictor, DecoderPredictor, LinearPredictor
from mpm.variants import Architecture, variant
from tests.networks import GRID, make_backbone, random_images, random_mask, randomize

N = GRID[0] * GRID[1]
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("num_prefix", [0, 1, 2])
def test_decoding_in_the_order_visible_masked_equals_unshuffling(num_prefix: int, depth: int) -> None:
    """The oracle: mask tokens and visible tokens in grid order, every block in full, then take."""
    decoder = randomize(DecoderPredictor(16, 9, grid=GRID, width=12, depth=depth, num_heads=3)).double()
    mask = random_mask(2, N, 7)
    encoded = Encoded(*torch.randn(2, num_prefix + 5, 16, dtype=torch.float64).split((num_prefix, 5), dim=1))
    prefix, visible = (decoder.embed(decoder.norm(tokens)) for tokens in (encoded.prefix, encoded.patches))
    x = decoder.mask_token.expand(2, N, 12).clone()
    for b in range(2):
        x[b, mask.visible[b]] = visible[b]
    x = torch.cat([prefix, x + decoder.positions.table], 1)
    for block in decoder.blocks:
        x = block(x)
    expected = mask.take_masked(decoder.head(decoder.decoder_norm(x))[:, num_prefix:])
    torch.testing.assert_close(decoder(encoded, mask)[0], expected, **EXACT)


def test_the_linear_predictor_is_a_norm_and_a_matrix() -> None:
    predictor = randomize(LinearPredictor(16, 9))
    encoded = Encoded(torch.full((2, 1, 16), torch.nan), torch.randn(2, 7, 16))
    found = predictor(encoded, random_mask(2, N, 7))
    expected = torch.nn.functional.layer_norm(
        encoded.patches, (16,), predictor.norm.weight, predictor.norm.bias, 1e-6
    )
    torch.testing.assert_close(found[0], expected @ predictor.head.weight.T + predictor.head.bias)


def test_drop_or_replace_follows_from_the_predictor() -> None:
    assert DecoderPredictor(16, 9, grid=GRID, width=12, depth=1, num_heads=3).encoder_mask_token is None
    assert LinearPredictor(16, 9).encoder_mask_token.shape == (16,)


@pytest.mark.parametrize(
    ("encoder", "parameters"), [(768, 26_109_184), (1024, 26_240_256), (1280, 26_309_708)]
)
def test_parameters_of_maes_decoder(encoder: int, parameters: int) -> None:
    """With its fixed positions, whose class slot of zeros we do not have. H is of patch 14, 16x16 patches."""
    patch, side = (14, 16) if encoder == 1280 else (16, 14)
    with torch.device("meta"):
        decoder = DecoderPredictor(encoder, 3 * patch**2, grid=(side, side))
    decoder.norm = torch.nn.Identity()  # the encoder's, counted there
    found = sum(tensor.numel() for tensor in [*decoder.parameters(), *decoder.buffers()])
    assert found + 512 == parameters


def test_parameters_of_beits_and_simmims_heads() -> None:
    with torch.device("meta"):
        heads = [LinearPredictor(768, out_dim).head for out_dim in (8192, 768)]
    assert [sum(p.numel() for p in head.parameters()) for head in heads] == [6_299_648, 590_592]


@pytest.mark.parametrize("relative_bias", ["shared", None])
@pytest.mark.parametrize(("depth", "early_layer"), [(1, 1), (2, 2), (3, 1)])
def test_class_pretraining_equals_the_published_order(
    depth: int, early_layer: int, relative_bias: str | None
) -> None:
    """BEiT v2: class token of the last block, patches of an early one, through the extra blocks; one head."""
    backbone = randomize(make_backbone(depth=2, relative_bias=relative_bias)).double()
    blocks = create_blocks(Architecture((4, 4), dim=16, depth=depth, heads=2, layer_scale=0.1))
    predictor = ClassPretrainingPredictor(16, 9, blocks=blocks, early_layer=early_layer)
    predictor = randomize(predictor).double()
    mask, images = random_mask(2, N, 7), random_images().double()
    found = MaskedPrediction(backbone, predictor, loss=torch.sub).predict(images, mask)

    x = backbone.embed(images, mask, predictor.encoder_mask_token)
    x = torch.cat([backbone.prefix_tokens.expand(2, -1, -1), x], 1)
    bias = backbone.relative_biases[0](None) if relative_bias else None
    states = []
    for block in backbone.blocks:
        x = block(x, bias)
        states.append(x)
    late = torch.cat([x[:, :1], states[early_layer - 1][:, 1:]], 1)
    for block in predictor.blocks:
        late = block(late, bias)
    expected = [mask.take_masked(predictor.head(predictor.norm(y))[:, 1:]) for y in (x, late)]
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)


@pytest.mark.parametrize(
    ("size", "early_layer", "parameters"), [("b", 9, 106_143_056), ("l", 21, 336_728_512)]
)
def test_parameters_of_beit_v2_in_pretraining(size: str, early_layer: int, parameters: int) -> None:
    """Published with the head of 8192 codes; a key has no bias there and here."""
    architecture = variant(f"beitv2_{size}").architecture
    with torch.device("meta"):
        backbone = create_backbone(architecture, image_size=(224, 224))
        blocks = create_blocks(architecture, drop_path_rates=[0.1, 0.1])
        predictor = ClassPretrainingPredictor(backbone.dim, 8192, blocks=blocks, early_layer=early_layer)
    assert sum(p.numel() for part in (backbone, predictor) for p in part.parameters()) == parameters
