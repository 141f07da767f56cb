"""Each objective against independent code, and every combination of parts."""

import math

import pytest
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.initialization import initialize
from mpm.objectives.losses import patch_loss
from mpm.objectives.masked import MaskedInputs, MaskedPrediction
from mpm.objectives.predictors import DecoderPredictor, LinearPredictor
from mpm.objectives.targets import PixelTarget
from mpm.patchify.masks import PatchMask
from mpm.patchify.pixels import Normalize
from mpm.patchify.positions import sincos_table
from mpm.patchify.stems import LinearStem
from tests.networks import (
    STEMS,
    make_backbone,
    make_masked,
    random_mask,
    randomize,
    targets_of,
    train_steps_of,
    with_hidden,
)

SIDE, PATCH, DIM, DEPTH, HEADS = 4, 4, 16, 2, 2
WIDTH, DECODER_DEPTH, DECODER_HEADS = 12, 2, 3
N = SIDE**2
PROGRESS = torch.tensor(0.0)
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64
NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)).double()


def mae(*, depth: int = DEPTH) -> MaskedPrediction:
    backbone = make_backbone(grid=(SIDE, SIDE), learned_positions=False, depth=depth)
    decoder = DecoderPredictor(
        DIM, 3 * PATCH**2, grid=backbone.grid, width=WIDTH, depth=DECODER_DEPTH, num_heads=DECODER_HEADS
    )
    return MaskedPrediction(backbone, decoder, loss=lambda x, y: patch_loss(x, y, kind="l2")).double()


def inputs_of(images: Tensor, mask: PatchMask, *, norm_pix: bool) -> MaskedInputs:
    target = PixelTarget((PATCH, PATCH), normalize=NORMALIZE, channels=3, normalize_patches=norm_pix)
    return MaskedInputs(NORMALIZE(images), mask, target(images, mask))


def images_in_unit(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)


def gradients_of(theirs: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}


def assert_gradients(ours: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **EXACT, msg=name)


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Their names to ours, by how they start; kernels of patches to matrices; what is not named stays out."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in names.items():
            if name.startswith(f"{theirs}."):
                tensor = tensor.permute(0, 2, 3, 1).flatten(1) if tensor.ndim == 4 else tensor
                found[ours + name.removeprefix(theirs)] = tensor
    return found


class LightlyMAE(nn.Module):
    """MAE of lightly's parts and timm's vision transformer."""

    def __init__(self) -> None:
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        sizes = {"img_size": SIDE * PATCH, "patch_size": PATCH, "embed_dim": DIM}
        vit = VisionTransformer(**sizes, depth=DEPTH, num_heads=HEADS, num_classes=0)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.embed = nn.Linear(DIM, WIDTH)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=N, embed_dim=WIDTH, depth=DECODER_DEPTH, num_heads=DECODER_HEADS
        )
        self.predict = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, images: Tensor, mask: PatchMask, norm_pix: bool) -> Tensor:
        from lightly.models import utils

        visible = torch.cat([torch.zeros(len(images), 1, dtype=torch.int64), mask.visible + 1], 1)
        encoded = self.embed(self.backbone.encode(images=images, idx_keep=visible))
        x = utils.set_at_index(encoded.new_zeros(len(images), N + 1, WIDTH), visible, encoded)
        x = self.decoder(x, idx_mask=mask.masked + 1)
        predictions = self.predict(utils.get_at_index(x, mask.masked + 1))
        targets = utils.get_at_index(utils.patchify(images, PATCH), mask.masked)
        if norm_pix:
            targets = utils.normalize_mean_var(targets, dim=-1)
        return F.mse_loss(predictions, targets)


def from_lightly(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state or the gradients; fixed positions have none, and no slot for the class token here."""
    names = {
        "backbone.vit.patch_embed": "backbone.stem",
        "backbone.vit.blocks": "backbone.blocks",
        "backbone.vit.norm": "predictor.norm",
        "embed": "predictor.embed",
        "decoder.blocks": "predictor.blocks",
        "decoder.norm": "predictor.decoder_norm",
        "predict": "predictor.head",
    }
    mapped = renamed(tensors, names) | {
        "backbone.prefix_tokens": tensors["backbone.vit.cls_token"][0],
        "predictor.mask_token": tensors["decoder.mask_token"][0, 0],
    }
    if "decoder.pos_embed" in tensors:
        mapped["backbone.positions.table"] = tensors["backbone.vit.pos_embed"][0, 1:]
        mapped["predictor.positions.table"] = tensors["decoder.pos_embed"][0, 1:]
    return mapped


@pytest.mark.parametrize("norm_pix", [False, True])
def test_mae_equals_lightly(norm_pix: bool) -> None:
    """Loss, and the gradient of every parameter; the class slot of their positions is zero."""
    theirs = LightlyMAE()
    tables = [theirs.backbone.vit.pos_embed, theirs.decoder.pos_embed]
    fixed = [table.detach().clone() for table in tables]
    randomize(theirs)
    for table, values in zip(tables, fixed, strict=True):
        table.data.copy_(values)
        table.requires_grad_(False)
    theirs, ours = theirs.double(), mae()
    ours.load_state_dict(from_lightly(theirs.state_dict()))
    images, mask = images_in_unit(), random_mask(3, N, 12)
    expected = theirs(NORMALIZE(images), mask, norm_pix)
    found = ours(inputs_of(images, mask, norm_pix=norm_pix), PROGRESS).loss
    torch.testing.assert_close(found, expected, **EXACT)
    expected.backward()
    found.backward()
    assert_gradients(ours, from_lightly(gradients_of(theirs)))


def from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state or the gradients."""
    names = {
        "vit.embeddings.patch_embeddings.projection": "backbone.stem.proj",
        "vit.layernorm": "predictor.norm",
        "decoder.decoder_embed": "predictor.embed",
        "decoder.decoder_norm": "predictor.decoder_norm",
        "decoder.decoder_pred": "predictor.head",
    }
    mapped = {
        "backbone.prefix_tokens": tensors["vit.embeddings.cls_token"][0],
        "predictor.mask_token": tensors["decoder.mask_token"][0, 0],
    }
    stacks = [
        ("vit.layers", "backbone.blocks", DEPTH),
        ("decoder.decoder_layers", "predictor.blocks", DECODER_DEPTH),
    ]
    for theirs, ours, depth in stacks:
        for i in range(depth):
            names |= {
                f"{theirs}.{i}.layernorm_before": f"{ours}.{i}.norm1",
                f"{theirs}.{i}.attention.o_proj": f"{ours}.{i}.attn.proj",
                f"{theirs}.{i}.layernorm_after": f"{ours}.{i}.norm2",
                f"{theirs}.{i}.mlp": f"{ours}.{i}.mlp",
            }
            for leaf in ("weight", "bias"):
                qkv = [tensors[f"{theirs}.{i}.attention.{x}_proj.{leaf}"] for x in "qkv"]
                mapped[f"{ours}.{i}.attn.qkv.{leaf}"] = torch.cat(qkv)
    if "decoder.decoder_pos_embed" in tensors:
        mapped["backbone.positions.table"] = tensors["vit.embeddings.position_embeddings"][0, 1:]
        mapped["predictor.positions.table"] = tensors["decoder.decoder_pos_embed"][0, 1:]
    return mapped | renamed(tensors, names)


@pytest.mark.slow  # the import takes seconds
@pytest.mark.parametrize("norm_pix", [False, True])
def test_mae_equals_transformers(norm_pix: bool) -> None:
    """From the same noise: predictions, loss, and the gradient of every parameter."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        decoder_hidden_size=WIDTH,
        decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=4 * WIDTH,
        mask_ratio=0.75,
        norm_pix_loss=norm_pix,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    theirs = randomize(transformers.ViTMAEForPreTraining(config))
    # started from scratch their positions are zero: ours are compared with lightly's
    embeddings, decoder = theirs.vit.embeddings, theirs.decoder
    for table, dim in [(embeddings.position_embeddings, DIM), (decoder.decoder_pos_embed, WIDTH)]:
        table.data.copy_(F.pad(sincos_table((SIDE, SIDE), dim), (0, 0, 1, 0)))
    theirs, ours = theirs.double(), mae()
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    images, noise = images_in_unit(), torch.rand(3, N)
    expected = theirs(NORMALIZE(images), noise=noise)
    mask = PatchMask.from_bool(expected.mask.bool(), 12)
    inputs = inputs_of(images, mask, norm_pix=norm_pix)
    torch.testing.assert_close(
        ours.predict(inputs.images, mask)[0], mask.take_masked(expected.logits), **EXACT
    )
    found = ours(inputs, PROGRESS).loss
    torch.testing.assert_close(found, expected.loss, **EXACT)
    expected.loss.backward()
    found.backward()
    assert_gradients(ours, from_transformers(gradients_of(theirs)))


class PublishedSimMIM(nn.Module):
    """SimMIM as published, around timm's BEiT: all on the full image, masks as weights, pixels shuffled."""

    def __init__(self, relative_bias: str | None) -> None:
        super().__init__()
        self.vit = Beit(
            img_size=SIDE * PATCH,
            patch_size=PATCH,
            embed_dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            num_classes=0,
            init_values=0.1,
            use_abs_pos_emb=False,
            use_rel_pos_bias=relative_bias == "per_block",
            use_shared_rel_pos_bias=relative_bias == "shared",
            global_pool="token",
        )
        self.mask_token = nn.Parameter(torch.empty(1, 1, DIM))
        self.head = nn.Conv2d(DIM, PATCH**2 * 3, 1)

    def forward(self, images: Tensor, masked: Tensor) -> Tensor:
        """Normalised images [B,3,H,W], masked bool [B,N]."""
        x, weight = self.vit.patch_embed(images), masked[..., None].to(images.dtype)
        x = x * (1 - weight) + self.mask_token * weight
        x = torch.cat([self.vit.cls_token.expand(len(x), -1, -1), x], 1)
        shared = None if self.vit.rel_pos_bias is None else self.vit.rel_pos_bias()
        for block in self.vit.blocks:
            x = block(x, shared_rel_pos_bias=shared)
        x = self.vit.norm(x)[:, 1:].transpose(1, 2).reshape(len(x), DIM, SIDE, SIDE)
        drawn = F.pixel_shuffle(self.head(x), PATCH)
        pixels = (
            masked.reshape(-1, SIDE, SIDE).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
        )
        return ((images - drawn).abs() * pixels).sum() / pixels.sum() / 3


def from_simmim(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state or the gradients; pixels go from (channel, row, column) to (row, column, channel)."""
    names = {"vit.patch_embed": "backbone.stem", "vit.norm": "predictor.norm"}
    for i in range(DEPTH):
        theirs, ours = f"vit.blocks.{i}", f"backbone.blocks.{i}"
        names |= {f"{theirs}.{part}": f"{ours}.{part}" for part in ("norm1", "attn", "norm2", "mlp")}
    mapped = {
        "predictor.encoder_mask_token": tensors["mask_token"][0, 0],
        "backbone.prefix_tokens": tensors["vit.cls_token"][0],
    }
    for name, tensor in tensors.items():
        match name.split("."):
            case ["head", leaf]:
                shuffled = tensor.reshape(3, PATCH, PATCH, -1).permute(1, 2, 0, 3).flatten(0, 2)
                mapped[f"predictor.head.{leaf}"] = shuffled.squeeze(1) if leaf == "bias" else shuffled
            case ["vit", "rel_pos_bias", _]:
                mapped["backbone.relative_biases.0.bias_table"] = tensor
            case ["vit", "blocks", index, "attn", "relative_position_bias_table"]:
                mapped[f"backbone.relative_biases.{index}.bias_table"] = tensor
            case ["vit", "blocks", index, "gamma_1" | "gamma_2" as gamma]:
                mapped[f"backbone.blocks.{index}.ls{gamma[-1]}.gamma"] = tensor
    attention = {name: tensor for name, tensor in tensors.items() if "relative_position" not in name}
    return mapped | renamed(attention, names)


@pytest.mark.parametrize("relative_bias", [None, "shared", "per_block"])
def test_simmim_equals_the_published_computation(relative_bias: str | None) -> None:
    """Loss and gradients, though hidden pixels and unread tokens are never computed here."""
    theirs = randomize(PublishedSimMIM(relative_bias)).double()
    backbone = make_backbone(
        grid=(SIDE, SIDE),
        learned_positions=None,
        relative_bias=relative_bias,
        qkv_bias="query_value",
        layer_scale=0.1,
    )
    randomize(backbone)  # fills the index of offsets
    ours = MaskedPrediction(
        backbone, LinearPredictor(DIM, 3 * PATCH**2), loss=lambda x, y: patch_loss(x, y, kind="l1")
    ).double()
    ours.load_state_dict(from_simmim(theirs.state_dict()))
    images, mask = images_in_unit(), random_mask(3, N, 10)
    masked = torch.zeros(3, N, dtype=torch.bool).scatter(1, mask.masked, True)
    expected = theirs(NORMALIZE(images), masked)
    found = ours(inputs_of(images, mask, norm_pix=False), PROGRESS).loss
    torch.testing.assert_close(found, expected, **EXACT)
    expected.backward()
    found.backward()
    assert_gradients(ours, from_simmim(gradients_of(theirs)))


TRUNKS = {
    "vit": {},
    "cait": {"num_prefix": 0, "attention": "talking_heads", "layer_scale": 0.1},
    "parallel": {"branches": 2, "layer_scale": 0.1},
}


def combination(
    method: str, stem: str, relative_bias: str | None = None, trunk: str = "vit"
) -> MaskedPrediction:
    objective = make_masked(method, make_backbone(stem, relative_bias=relative_bias, **TRUNKS[trunk]))
    initialize(objective, "mae" if method == "mae" else "beit")
    return objective


@pytest.mark.parametrize("relative_bias", [pytest.param(None, marks=pytest.mark.slow), "shared"])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize(
    "method", ["mae", "simmim", *(pytest.param(name, marks=pytest.mark.slow) for name in ("beit", "beitv2"))]
)
def test_every_combination_learns_and_every_parameter_gets_a_gradient(
    method: str, trunk: str, stem: str, relative_bias: str | None
) -> None:
    if method == "beitv2" and trunk == "cait":
        pytest.skip("class pretraining needs a class token")
    objective = combination(method, stem, relative_bias, trunk)
    images, mask = torch.randn(4, 3, 12, 16), random_mask(4, 12, 7)
    losses = train_steps_of(objective, MaskedInputs(images, mask, targets_of(method, 4, 7)))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_predictions_ignore_masked_pixels(method: str, trunk: str, stem: str) -> None:
    """From end to end, NaN for pixels; in eval mode, as batch norm on all patches sees moments of them."""
    objective = randomize(combination(method, stem, "shared", trunk)).eval()
    images, mask = torch.randn(2, 3, 12, 16), random_mask(2, 12, 7)
    expected = objective.predict(images, mask)
    assert expected.isfinite().all()
    assert torch.equal(objective.predict(with_hidden(images, mask, math.nan), mask), expected)


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_bf16_autocast_stays_near_float32(method: str) -> None:
    objective = combination(method, "hmlp-all", "shared")
    inputs = MaskedInputs(torch.randn(4, 3, 12, 16), random_mask(4, 12, 7), torch.randn(4, 7, 48))
    expected = objective(inputs, PROGRESS).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(inputs, PROGRESS).loss
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    found.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in objective.parameters())


def test_losses_of_two_predictions_are_summed() -> None:
    """The mean over masked patches of each; S = 2 is BEiT v2's class-token pretraining."""

    class Twice(nn.Module):
        encoder_mask_token = None
        reads = "all"
        layers = ()

        def forward(self, encoded, mask) -> Tensor:
            return torch.stack([torch.zeros(2, 7, 5), torch.ones(2, 7, 5)])

    objective = MaskedPrediction(make_backbone(), Twice(), loss=lambda x, y: patch_loss(x, y, kind="l2"))
    inputs = MaskedInputs(torch.randn(2, 3, 12, 16), random_mask(2, 12, 7), torch.full((2, 7, 5), 3.0))
    initialize(objective, "vit")
    assert objective(inputs, PROGRESS).loss.item() == pytest.approx(3.0**2 + 2.0**2)


def test_the_first_norm_pix_loss_is_as_expected() -> None:
    """1 + the variance of a Xavier head's predictions, 2 fan_in / (fan_in + fan_out)."""
    backbone = make_backbone(dim=64, grid=(8, 8), learned_positions=False)
    decoder = DecoderPredictor(64, 48, grid=(8, 8), width=64, depth=2, num_heads=4)
    objective = MaskedPrediction(backbone, decoder, loss=lambda x, y: patch_loss(x, y, kind="l2"))
    initialize(objective, "mae")
    normalize = Normalize((0.5,) * 3, (0.3,) * 3)
    target = PixelTarget((4, 4), normalize=normalize, channels=3, normalize_patches=True)
    images, mask = torch.rand(8, 3, 32, 32), random_mask(8, 64, 48)
    loss = objective(MaskedInputs(normalize(images), mask, target(images, mask)), PROGRESS).loss
    assert loss.item() == pytest.approx(1 + 2 * 64 / (64 + 48), rel=0.1)


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "patch", "published"),
    [
        (768, 12, 12, 16, 111_907_840),
        (1024, 24, 16, 16, 329_541_888),
        (1280, 32, 16, 14, 657_074_508),
    ],
)
def test_parameters_of_the_published_mae(
    dim: int, depth: int, heads: int, patch: int, published: int
) -> None:
    """With the fixed positions of encoder and decoder, whose class slots of zeros we do not have."""
    side = 224 // patch
    with torch.device("meta"):
        stem = LinearStem((patch, patch), dim)
        backbone = make_backbone(
            stem, grid=(side, side), dim=dim, depth=depth, heads=heads, learned_positions=False
        )
        decoder = DecoderPredictor(dim, 3 * patch**2, grid=backbone.grid)
        objective = MaskedPrediction(backbone, decoder, loss=patch_loss)
    found = sum(tensor.numel() for tensor in [*objective.parameters(), *objective.buffers()])
    assert found + dim + 512 == published


def test_parameters_of_the_published_simmim() -> None:
    with torch.device("meta"):
        backbone = make_backbone(
            LinearStem((16, 16), 768),
            grid=(14, 14),
            dim=768,
            depth=12,
            heads=12,
            learned_positions=None,
            relative_bias="shared",
            qkv_bias="query_value",
            layer_scale=0.1,
        )
        objective = MaskedPrediction(backbone, LinearPredictor(768, 768), loss=patch_loss)
    assert sum(parameter.numel() for parameter in objective.parameters()) == 86_256_720
