"""Published weights in mpm: the same function, and the same weights again on the way out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.interop import load_official
from mpm.interop.networks import network_of
from mpm.interop.official import to_official
from mpm.objectives.masked import predict
from mpm.patchify.masks import PatchMask
from mpm.patchify.patches import unpatchify
from mpm.patchify.positions import sincos_table
from mpm.variants import Architecture
from tests.interop.published import (
    CASES,
    CLASSES,
    DEPTH,
    DIM,
    HEADS,
    PATCH,
    SIDE,
    SIZES,
    Case,
    logits,
    ours,
    published,
    randomize,
)  # fmt: skip

GRID = SIDE // PATCH
OFFICIAL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
IN_TIMM = {name: case for name, case in CASES.items() if case.in_timm}
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"]
)


def _images(case: Case | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
    side = SIDE if case is None else case.arguments.get("img_size", SIDE)
    height, width = (side, side) if isinstance(side, int) else side
    return torch.randn(2, 3, height, width, dtype=dtype)


def _assert_near(actual: Tensor, expected: Tensor, tolerance: float, *, scale: float | Tensor = 0.0) -> None:
    """Difference over the largest value, or over `scale` where the values only round to zero."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(expected.abs().max(), scale)


@OFFICIAL
@PRECISIONS
def test_logits_and_gradients_are_those_of_the_published_network(
    case: Case, dtype: torch.dtype, tolerance: float
) -> None:
    theirs = published(case, dtype=dtype)
    official = load_official(theirs.state_dict(), heads=HEADS)
    assert official.report.family == official.config["family"] == case.family
    network = ours(official.config, official.state, dtype=dtype)
    images, weights = _images(case, dtype=dtype), torch.randn(2, CLASSES, dtype=dtype)
    expected, actual = theirs(images), logits(network, images)
    _assert_near(actual, expected, tolerance)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert None not in gradients.values()
    layout = "timm" if case.in_timm else None
    renamed = to_official(official.state | gradients, official.config, layout=layout)
    rows, columns = network["backbone"].grid
    scale = 1e-2 * max(parameter.grad.abs().max() for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        mine, reference = renamed[name], parameter.grad
        if name == "pos_embed":  # the rows of prefix tokens are in the tokens
            mine, reference = mine[:, -rows * columns :], reference[:, -rows * columns :]
        _assert_near(mine, reference, tolerance, scale=scale)


@pytest.mark.parametrize("case", IN_TIMM.values(), ids=IN_TIMM)
def test_timm_loads_what_mpm_writes(case: Case) -> None:
    official = load_official(published(case).state_dict(), heads=HEADS)
    state = randomize(network_of(official.config).double()).state_dict()
    theirs = case.build(**SIZES | case.arguments).double().eval()
    theirs.load_state_dict(to_official(state, official.config, layout="timm"), strict=True)
    images = _images(case)
    _assert_near(theirs(images), logits(ours(official.config, state), images), 1e-9)


@OFFICIAL
def test_out_and_in_again_is_the_identity(case: Case) -> None:
    official = load_official(published(case).state_dict(), heads=HEADS)
    written = to_official(official.state, official.config)
    again = load_official(written, heads=HEADS)
    assert again.config == official.config
    _assert_identical(again.state, official.state)
    assert set(again.report.loaded) == written.keys()
    assert again.report.dropped == again.report.resized == again.report.missing == ()


def _assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])]


def _config(family: str, *, predictor: dict[str, Any] | None = None, **trunk: Any) -> dict[str, Any]:
    """Facts of a tiny network of a family, as it is pretrained."""
    sizes = {"patch_size": (PATCH, PATCH), "dim": DIM, "depth": DEPTH, "heads": HEADS}
    return {
        "family": family,
        "image_size": (SIDE, SIDE),
        "channels": 3,
        "backbone": Architecture(**sizes | trunk)._asdict(),
        "readout": None,
        "num_classes": None,
        "predictor": predictor,
    }


def _classifier(family: str, readout: dict[str, Any], **trunk: Any) -> dict[str, Any]:
    return _config(family, **trunk) | {"readout": readout, "num_classes": CLASSES}


SINCOS = {"table": "sincos", "bias": "none"}
LEARNED = {"table": "learned", "bias": "none"}
SHARED = {"table": "none", "bias": "shared"}
BEIT = {"qkv_bias": "query_value", "layer_scale": 0.1, "positions": SHARED}
LINEAR = {"kind": "linear"}
CLASS_PRETRAINING = {"kind": "class_pretraining", "early_layer": 1, "depth": 2}
DECODER = {"kind": "decoder", "dim": 16, "depth": 1, "heads": 2}
CAIT = {"attention": "talking_heads", "layer_scale": 0.1, "class_token": False, "drop_path_rule": "constant"}
CLASS_ATTENTION = {"kind": "class_attention", "depth": 3, "queries": 1, "mlp_ratio": 2.0}


def _three_things(**trunk: Any) -> dict[str, Any]:
    return _classifier("three_things", {"kind": "token"}, drop_path_rule="constant", **trunk)


# the kinds of file that timm has no class for
WITHOUT_TIMM = {
    "beit, pretrained": _config("beit", predictor=LINEAR, **BEIT),
    "beit v2, pretrained": _config("beit", predictor=CLASS_PRETRAINING, **BEIT | {"depth": 4}),
    "simmim": _config("simmim", predictor=LINEAR, **BEIT),
    "simmim of patches 4x8": _config(
        "simmim", predictor=LINEAR, **BEIT | {"patch_size": (4, 8), "positions": LEARNED}
    )
    | {"image_size": (16, 32)},
    "mae, full": _config("mae", predictor=DECODER, positions=SINCOS),
    "hmlp of layer norm": _three_things(stem={"kind": "hmlp", "norm": "layer"}),
    "conv stem": _three_things(stem={"kind": "conv", "norm": "batch"}),
    "batch norm": _three_things(stem={"kind": "linear", "norm": "batch", "statistics": "all"}),
    "three branches": _three_things(branches=3, layer_scale=1e-4),
    "twelve branches": _three_things(branches=12),
    "cait": _classifier("cait", CLASS_ATTENTION, **CAIT),
}


def _state(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights of a network that predicts pixels, where it is pretrained; fixed positions are kept."""
    rows, columns = config["backbone"]["patch_size"]
    state = randomize(network_of(config, out_dim=3 * rows * columns)).state_dict()
    if config["backbone"]["positions"] == SINCOS:
        state["backbone.positions.table"] = sincos_table((GRID, GRID), DIM)
    return state


@pytest.mark.parametrize("config", WITHOUT_TIMM.values(), ids=WITHOUT_TIMM)
def test_out_and_in_again_is_the_identity_where_timm_has_no_class(config: dict[str, Any]) -> None:
    state = _state(config)
    again = load_official(to_official(state, config), heads=HEADS, decoder_heads=2)
    _assert_identical(again.state, state)
    assert {key: again.config[key] for key in config} == config


@PRECISIONS
def test_a_pretrained_mae_encoder_gives_timms_features_and_gradients(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Its positions are fixed, and nobody reads it but the norm."""
    theirs = randomize(VisionTransformer(**SIZES | {"num_classes": 0})).to(dtype).eval()
    fixed = sincos_table((GRID, GRID), DIM)
    with torch.no_grad():
        theirs.pos_embed.copy_(torch.cat([torch.zeros(1, DIM), fixed])[None])
    official = load_official(theirs.state_dict(), heads=HEADS)
    config = official.config
    assert config["family"] == "mae"
    assert config["backbone"]["positions"]["table"] == "sincos"
    assert config["readout"] is config["predictor"] is config["num_classes"] is None
    norm = nn.LayerNorm(DIM, eps=1e-6).to(dtype)
    trunk = {name: tensor for name, tensor in official.state.items() if name.startswith("backbone.")}
    norm.load_state_dict({leaf: official.state[f"predictor.norm.{leaf}"] for leaf in ("weight", "bias")})
    network, images = ours(config, trunk, dtype=dtype), _images(dtype=dtype)
    encoded = network["backbone"](images)
    tokens = norm(torch.cat([encoded.prefix, encoded.patches], dim=1))
    expected = theirs.forward_features(images)
    _assert_near(tokens, expected, tolerance)
    weights = torch.randn_like(tokens)
    (tokens * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    gradients |= {f"predictor.norm.{leaf}": parameter.grad for leaf, parameter in norm.named_parameters()}
    renamed = to_official(official.state | gradients, config)
    for name, parameter in theirs.named_parameters():
        if name != "pos_embed":  # fixed
            _assert_near(renamed[name], parameter.grad, tolerance)


def test_pretrained_beit_predicts_codes_as_timms_trunk_and_lm_head_do() -> None:
    shared = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
    theirs = randomize(Beit(**SIZES | shared | {"num_classes": 0, "global_pool": "token"})).double().eval()
    lm_head = randomize(nn.Linear(DIM, 7)).double()
    file = theirs.state_dict() | {f"lm_head.{key}": value for key, value in lm_head.state_dict().items()}
    file |= {
        "mask_token": torch.randn(1, 1, DIM).double(),
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17).long(),
    }
    official = load_official(file)
    assert official.config["predictor"] == {"kind": "linear"}
    assert official.report.dropped == ("rel_pos_bias.relative_position_index",)
    network, images = ours(official.config, official.state), _images()
    codes = network["predictor"](network["backbone"](images), None)[0]
    _assert_near(codes, lm_head(theirs.forward_features(images)[:, 1:]), 1e-9)
    assert torch.equal(official.state["predictor.encoder_mask_token"], file["mask_token"].flatten())


def beit_v2() -> tuple[Beit, nn.ModuleList, dict[str, Tensor]]:
    """timm's trunk of 4 blocks, 2 more for class pretraining, and a file of all as released."""
    options = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
    options |= {"depth": 6, "num_classes": 0, "global_pool": "token"}
    trunk = randomize(Beit(**SIZES | options)).double().eval()
    extra, trunk.blocks = trunk.blocks[4:], trunk.blocks[:4]
    file = trunk.state_dict() | {f"cls_pt_layers.{key}": t for key, t in extra.state_dict().items()}
    shapes = {"lm_head.weight": (7, DIM), "lm_head.bias": (7,), "mask_token": (1, 1, DIM)}
    return trunk, extra, file | {key: torch.randn(shape).double() for key, shape in shapes.items()}


def test_pretrained_beit_v2_predicts_codes_twice_as_timms_blocks_do_in_the_released_order() -> None:
    trunk, extra, file = beit_v2()
    official = load_official(file)
    assert official.config["predictor"] == {"kind": "class_pretraining", "early_layer": 1, "depth": 2}
    assert official.config["mean"] == (0.485, 0.456, 0.406)  # BEiT v2's, which the extra blocks tell
    assert official.report.dropped == official.report.missing == ()
    assert "early_layer of cls_pt_layers is not told: it is 1" in official.report.notes[0]
    network, images = ours(official.config, official.state), _images()
    masked = torch.rand(2, GRID**2).argsort(1) < 7
    mask = PatchMask.from_bool(masked, 7)
    found = predict(network["backbone"], network["predictor"], images, mask)

    x = torch.where(masked[..., None], file["mask_token"], trunk.patch_embed(images))
    x = torch.cat([trunk.cls_token.expand(2, -1, -1), x], 1)
    bias = trunk.rel_pos_bias()
    states = []
    for block in trunk.blocks:
        x = block(x, shared_rel_pos_bias=bias)
        states.append(x)
    late = torch.cat([x[:, :1], states[0][:, 1:]], 1)
    for block in extra:
        late = block(late, shared_rel_pos_bias=bias)
    expected = [
        F.linear(trunk.norm(y)[:, 1:], file["lm_head.weight"], file["lm_head.bias"]) for y in (x, late)
    ]
    _assert_near(found, torch.stack([y[masked].reshape(2, 7, 7) for y in expected]), 1e-9)


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({"cls_pt_norm.weight": (DIM,), "cls_pt_lm_head.weight": (7, DIM)}, ()),
        ({"cls_pt_layers.0.attn.relative_position_bias_table": (52, HEADS)}, ()),
        ({}, ("lm_head.",)),
    ],
    ids=["own head", "own bias", "no head"],
)
def test_class_pretraining_that_mpm_has_not_is_dropped_and_told(
    own: dict[str, tuple[int, ...]], kept: tuple[str, ...]
) -> None:
    _, _, file = beit_v2()
    file |= {key: torch.randn(shape) for key, shape in own.items()}
    official = load_official({key: t for key, t in file.items() if not key.startswith(kept or "-")})
    assert official.config["predictor"] == (None if kept else {"kind": "linear"})
    assert set(official.report.dropped) == {key for key in file if key.startswith("cls_pt_")}
    if own:
        names = ", ".join(sorted(own))
        assert f"class pretraining is left out: it has {names} of its own" in official.report.notes[0]


@pytest.mark.parametrize("patch_size", [(4, 4), (4, 8)])
def test_simmims_head_draws_the_pixels_that_pixel_shuffle_draws(patch_size: tuple[int, int]) -> None:
    config = _config("simmim", predictor={"kind": "linear"}, **BEIT | {"patch_size": patch_size})
    config["image_size"] = (GRID * patch_size[0], GRID * patch_size[1])
    height, width = patch_size
    state = _state(config)
    file = to_official(state, config)
    head = {name: file[f"decoder.0.{name}"] for name in ("weight", "bias")}
    tokens = torch.randn(2, GRID * GRID, DIM)
    predictions = F.linear(tokens, state["predictor.head.weight"], state["predictor.head.bias"])
    drawn = unpatchify(predictions, patch_size, grid=(GRID, GRID))
    features = F.conv2d(rearrange(tokens, "b (h w) d -> b d h w", h=GRID), **head)
    shuffled = rearrange(features, "b (c i j) h w -> b c (h i) (w j)", i=height, j=width)
    if height == width:
        torch.testing.assert_close(shuffled, F.pixel_shuffle(features, height))
    torch.testing.assert_close(drawn, shuffled)
    assert {key.partition(".")[0] for key in file} == {"encoder", "decoder"}


def test_a_full_mae_has_the_published_names() -> None:
    config = _config("mae", predictor=DECODER, positions=SINCOS)
    file = to_official(network_of(config, out_dim=48).state_dict(), config)
    top = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    layers = {"patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"}
    inner = {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}
    layers |= {f"blocks.{i}.{part}" for i in range(DEPTH) for part in inner}
    layers |= {f"decoder_blocks.0.{part}" for part in inner}
    assert file.keys() == top | {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    assert file["pos_embed"].shape == (1, 17, DIM)
    assert file["decoder_pos_embed"].shape == (1, 17, 16)


def test_16_bit_weights_become_float32() -> None:
    state = {key: tensor.bfloat16() for key, tensor in published(CASES["deit"]).state_dict().items()}
    official = load_official(state, heads=HEADS)
    assert {tensor.dtype for tensor in official.state.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["deit", "beit", "mae, full"])
def test_positions_are_resampled_to_another_image_size(name: str) -> None:
    if name in CASES:
        file = published(CASES[name], dtype=torch.float32).state_dict()
    else:
        file = to_official(_state(WITHOUT_TIMM[name]), WITHOUT_TIMM[name])
    official = load_official(file, heads=HEADS, decoder_heads=2, image_size=(24, 32))
    assert official.config["image_size"] == (24, 32)
    ours(official.config, official.state, dtype=torch.float32)  # loads strictly
    expected = {
        "deit": ("pos_embed",),
        "beit": tuple(f"blocks.{i}.attn.relative_position_bias_table" for i in range(DEPTH)),
        "mae, full": ("pos_embed", "decoder_pos_embed"),
    }
    assert set(official.report.resized) == set(expected[name])
    if name != "beit":
        image = rearrange(file["pos_embed"][:, 1:], "1 (h w) d -> 1 d h w", h=GRID)
        resampled = F.interpolate(image, size=(6, 8), mode="bicubic", align_corners=False)
        torch.testing.assert_close(official.state["backbone.positions.table"], resampled[0].flatten(1).T)


def test_a_grid_that_is_not_square_needs_the_image_size() -> None:
    config = _classifier("deit", {"kind": "token"}) | {"image_size": (12, 16)}
    file = to_official(_state(config), config)
    with pytest.raises(
        ValueError,
        match=r"pos_embed has 13 rows, .* no square grid; give image_size=",
    ):
        load_official(file, heads=HEADS)
    assert load_official(file, heads=HEADS, image_size=(12, 16)).config["image_size"] == (12, 16)


def test_an_image_size_that_fits_the_positions_is_that_of_the_file() -> None:
    """64 patches could be 8x8, too."""
    theirs = randomize(VisionTransformer(**SIZES | {"img_size": (8, 32), "patch_size": 2})).double().eval()
    file = theirs.state_dict()
    official = load_official(file, heads=HEADS, image_size=(8, 32))
    assert official.report.resized == ()
    images = torch.randn(2, 3, 8, 32).double()
    _assert_near(logits(ours(official.config, official.state), images), theirs(images), 1e-9)
    assert load_official(file, heads=HEADS).config["image_size"] == (16, 16)
    other = load_official(file, heads=HEADS, image_size=(8, 16))  # 32 patches: of the square
    image = rearrange(file["pos_embed"][:, 1:], "1 (h w) d -> 1 d h w", h=8)
    resampled = F.interpolate(image.float(), size=(4, 8), mode="bicubic", align_corners=False)
    table = other.state["backbone.positions.table"].float()
    torch.testing.assert_close(table, resampled[0].flatten(1).T)


def test_a_resized_mae_says_that_its_positions_are_learned_and_stays_what_it_is() -> None:
    config = _config("mae", predictor=DECODER, positions=SINCOS)
    state = _state(config)
    state["predictor.positions.table"] = sincos_table((GRID, GRID), 16)
    options: dict[str, Any] = {"heads": HEADS, "decoder_heads": 2}
    official = load_official(to_official(state, config), **options, image_size=(24, 32))
    assert official.config["backbone"]["positions"] == LEARNED
    assert torch.equal(official.state["predictor.positions.table"], sincos_table((6, 8), 16))
    assert sum("sine-cosine positions" in note for note in official.report.notes) == 2
    written = to_official(official.state, official.config)
    again = load_official(written, **options, image_size=(24, 32))
    assert again.config == official.config
    assert again.report.resized == ()
    _assert_identical(again.state, official.state)
    same = load_official(to_official(state, config), **options, image_size=(SIDE, SIDE))
    assert same.config["backbone"]["positions"] == SINCOS


def test_files_are_read_with_what_stands_beside_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(published(CASES["mean"]).state_dict(), folder / "model.safetensors")
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_pct": 0.95, "interpolation": "bilinear"}
    facts = {
        "architecture": "vit_tiny_patch16_224",
        "global_pool": "avg",
        "model_args": SIZES | {"global_pool": "avg"},
        "pretrained_cfg": preprocessing | {"input_size": [3, SIDE, SIDE]},
    }
    (folder / "config.json").write_text(json.dumps(facts))
    config = load_official(folder).config
    assert config["backbone"]["heads"] == HEADS
    expected = {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "crop": 0.95, "interpolation": "bilinear"}
    assert {key: config[key] for key in expected} == expected


def test_beit2_is_told_by_the_name_of_its_file(tmp_path: Path) -> None:
    state = published(CASES["beit"]).state_dict()
    for name, mean in {"beit_x.pth": 0.5, "beitv2_x.pth": 0.485}.items():
        torch.save({"model": state}, tmp_path / name)
        official = load_official(tmp_path / name)
        assert official.config["mean"][0] == mean
        assert any("of BEiT v2 and SimMIM" in note for note in official.report.notes) == (mean == 0.5)


def test_a_class_slot_is_noted() -> None:
    file = published(CASES["deit"]).state_dict()
    assert "added to the token" in load_official(file, heads=HEADS).report.notes[0]
    file["pos_embed"][:, 0] = 0
    assert not any("added" in note for note in load_official(file, heads=HEADS).report.notes)


def test_what_is_assumed_of_heads_and_preprocessing_is_noted() -> None:
    wide = {"embed_dim": 192, "depth": 1, "num_classes": 0}
    notes = load_official(VisionTransformer(**SIZES | wide).state_dict()).report.notes
    assert any(
        "3 attention heads are not told: they are as published for width 192" in note for note in notes
    )
    (note,) = (note for note in notes if "mean, std, crop" in note)
    assert "of the published deit networks; timm's own ViTs have the same keys, and mean and std 0.5" in note
    notes = load_official(published(CASES["deit"]).state_dict(), heads=HEADS).report.notes
    assert not any("heads" in note for note in notes)
    config = _config("mae", predictor=DECODER | {"dim": 512, "heads": 16}, positions=SINCOS)
    notes = load_official(to_official(_state(config), config), heads=HEADS).report.notes
    assert any("16 heads of the decoder are not told" in note for note in notes)


@pytest.mark.parametrize("lost", [("head_dist.",), ("head.",), ("head.bias",), ("head.bias", "head_dist.")])
def test_heads_that_are_not_all_there_are_left_out(lost: tuple[str, ...]) -> None:
    file = _without(*lost)(published(CASES["deit distilled"]).state_dict())
    config, state, report = load_official(file, heads=HEADS)
    assert config["num_classes"] is None
    assert report.missing == ()
    assert set(report.dropped) == {key for key in file if key.startswith("head")}
    assert any("of the classes' heads there is only" in note for note in report.notes)
    ours(config, state)  # loads strictly
    assert set(report.loaded) | set(report.dropped) == file.keys()


def _without(*keys: str) -> Any:
    return lambda file: {key: tensor for key, tensor in file.items() if not key.startswith(keys)}


def _with(**tensors: Tensor) -> Any:
    return lambda file: file | tensors


def _renamed(file: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("fc_"): tensor for key, tensor in file.items()}


NORM = {"blocks.1.norm1.weight": torch.ones(3)}
REFUSED = {
    "a key too many": (
        "deit",
        _with(rope=torch.ones(1)),
        r"1 of 33 keys mean nothing in deit networks .*: rope",
    ),
    "no first block": ("deit", _without("blocks.0."), r"blocks\.0\..* is missing"),
    "a weight is missing": (
        "deit",
        _without("blocks.1.mlp.fc1.bias"),
        r"lacks weights of its deit network, 1 .*1\.mlp\.fc1\.bias",
    ),
    "not finite": (
        "deit",
        _with(**{"norm.bias": torch.full((DIM,), torch.nan)}),
        r"weights that are not finite: norm\.bias",
    ),
    "no norm before the head": (
        "deit",
        _without("norm."),
        r"lacks weights of its deit network, 2 .*readout\.norm",
    ),
    "no positions": ("deit", _without("pos_embed"), r"rotary"),
    "no stem": ("deit", _without("patch_embed"), r"patch_embed\.proj\.weight is missing"),
    "another shape": ("deit", _with(**NORM), r"norm1\.weight is \[3\], where \[24\]"),
    "another width": ("deit", _with(cls_token=torch.ones(1, 1, 9)), r"\[1, 1, 9\], where \[1, 1, 24\]"),
    "a mean after the norm": ("registers alone", _renamed, r"pools its tokens"),
    "two heads": ("deit", _with(**{"lm_head.weight": torch.ones(5, DIM)}), r"nothing .*: lm_head\.weight"),
}


@pytest.mark.parametrize(("case", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_nothing_explains_is_refused(case: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_official(change(published(CASES[case]).state_dict()), heads=HEADS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "heads", "message"),
    [
        ("deit", None, "the width 24 .* give heads,"),
        ("deit", 5, "heads 5 does not divide the width 24"),
        ("deit", 0, "heads 0 does not divide the width 24"),
        ("deit", -3, "heads -3 does not divide the width 24"),
        ("beit", 2, "heads 2 contradicts the file, whose attention has 3"),
        ("cait", 2, "heads 2 contradicts the file, whose attention has 3"),
    ],
)
def test_heads_are_told_or_asked_for(case: str, heads: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_official(published(CASES[case]).state_dict(), heads=heads)


def test_a_decoder_is_asked_for_its_heads_and_may_not_move_the_class_token() -> None:
    config = WITHOUT_TIMM["mae, full"]
    file = to_official(_state(config), config)
    with pytest.raises(ValueError, match=r"the width 16 .* give decoder_heads,"):
        load_official(file, heads=HEADS)
    file["decoder_pos_embed"] = torch.ones(1, 17, 16)
    with pytest.raises(ValueError, match="decoder_pos_embed is not 0"):
        load_official(file, heads=HEADS, decoder_heads=2)


def test_another_pooling_in_config_json_is_refused(tmp_path: Path) -> None:
    save_file(published(CASES["deit"]).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"global_pool": "avg"}')
    with pytest.raises(ValueError, match=r"pools its tokens \(avg\)"):
        load_official(tmp_path, heads=HEADS)


def test_weights_of_transformers_need_their_config() -> None:
    with pytest.raises(ValueError, match=r"need their config\.json"):
        load_official({"vit.encoder.layer.0.layernorm_before.weight": torch.ones(3)})
