"""Weights of transformers' networks in mpm's, and back. The oracle is transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_backbone, create_readout
from mpm.backbones.initialization import initialize
from mpm.data.views import EvalView
from mpm.interop import load_official
from mpm.interop.files import read_weights
from mpm.interop.huggingface import from_transformers, to_transformers
from mpm.interop.huggingface_classes import classic
from mpm.interop.networks import network_of
from mpm.objectives.losses import patch_loss
from mpm.objectives.masked import MaskedInputs, MaskedPrediction
from mpm.objectives.predictors import DecoderPredictor, LinearPredictor
from mpm.objectives.targets import PixelTarget
from mpm.patchify.masks import PatchMask
from mpm.patchify.pixels import Normalize
from mpm.patchify.positions import sincos_table
from mpm.variants import Architecture
from tests.networks import randomize

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6, "encoder_stride": 4, "num_labels": 5,
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 8, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip
BATCH, N = 2, 16
# version 4 adds positions before it replaces BEiT's masked tokens, and takes DeiT's tokens 1:-1 for patches
SINCE_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 computes something else")


def theirs(name: str, **settings: Any) -> nn.Module:
    """A network of transformers with random values everywhere, but for MAE's positions, which are fixed."""
    kind = getattr(transformers, name)
    network = kind(kind.config_class(**SIZES, **settings)).double().eval()
    for path, parameter in network.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.3)
        else:
            assert "pos" in path
            parameter.data[0, 1:] = sincos_table((4, 4), parameter.shape[-1])  # version 5 has zeros
    return network


def ours(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """The network that a description says, with these weights, all of them."""
    architecture = Architecture(**config["backbone"])
    backbone = create_backbone(architecture, image_size=config["image_size"], channels=config["channels"])
    predictor, area = config["predictor"], 4 * 4 * config["channels"]
    network: nn.Module
    if predictor is None:
        assert config["num_classes"] is not None
        readout = create_readout(architecture, **config["readout"])
        network = Classifier(backbone, readout, num_classes=config["num_classes"])
    elif predictor["kind"] == "decoder":
        decoder = DecoderPredictor(
            backbone.dim,
            area,
            grid=backbone.grid,
            width=predictor["dim"],
            depth=predictor["depth"],
            num_heads=predictor["heads"],
        )
        network = MaskedPrediction(backbone, decoder, loss=lambda x, y: patch_loss(x, y, kind="l2"))
    else:
        head = LinearPredictor(backbone.dim, len(state["predictor.head.weight"]))
        network = MaskedPrediction(backbone, head, loss=cross_entropy)
    initialize(network, "vit")  # the index of a relative bias
    network.to(next(iter(state.values())).dtype).load_state_dict(state)
    return network.eval()


def cross_entropy(predictions: Tensor, codes: Tensor) -> Tensor:
    return F.cross_entropy(predictions.movedim(-1, 1), codes[..., 0].long(), reduction="none")


def read(network: Any, **more: Any) -> Any:
    return from_transformers(network.state_dict(), {**network.config.to_dict(), **more})


def random_mask() -> Tensor:
    return torch.rand(BATCH, N).argsort(1) < 6


def assert_same(network: Any, run_theirs: Any, run_ours: Any) -> None:
    """Outputs and all gradients in float64, outputs in float32."""
    built = ours(*read(network)[:2])
    images = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
    output, gradients = output_and_gradients(built, run_ours, images)
    expected, their_gradients = output_and_gradients(network, run_theirs, images)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients.pop("images"), their_gradients.pop("images"), rtol=1e-9, atol=1e-9)
    expected_gradients = from_transformers(their_gradients, network.config.to_dict()).state
    if any(
        name.endswith("position_embeddings") and p.requires_grad for name, p in network.named_parameters()
    ):
        expected_gradients["backbone.prefix_tokens"] /= 2  # the token's and its position's, which are equal
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-9, msg=name)
    output, expected = run_ours(built.float(), images.float()), run_theirs(network.float(), images.float())
    assert (output - expected).abs().max() / expected.abs().max() <= 1e-5


def output_and_gradients(network: nn.Module, run: Any, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What `run` gives, and the gradients of its squared sum; those of fixed positions are 0."""
    network.zero_grad()
    pixels = images.clone().requires_grad_()
    output = run(network, pixels)
    output.square().sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in network.named_parameters()
    }
    assert pixels.grad is not None
    return output.detach(), {"images": pixels.grad, **gradients}


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_vit_classifier_equals_transformers(qkv_bias: bool):
    network = theirs("ViTForImageClassification", qkv_bias=qkv_bias)
    assert_same(network, lambda model, x: model(x).logits, lambda model, x: model.predict(x))


def test_distilled_deit_equals_transformers_in_both_heads():
    network = theirs("DeiTForImageClassificationWithTeacher")

    def both(model: Any, images: Tensor) -> Tensor:
        outputs = model(images)
        return torch.stack([outputs.cls_logits, outputs.distillation_logits], dim=1)

    assert_same(network, both, lambda model, x: model(x))
    built = ours(*read(network)[:2])
    images = torch.randn(BATCH, 3, 16, 16)
    torch.testing.assert_close(built.predict(images), network(images).logits, rtol=1e-4, atol=1e-5)


def test_deit_whose_distillation_token_nothing_reads_equals_transformers():
    network = theirs("DeiTForImageClassification")
    assert_same(network, lambda model, x: model(x).logits, lambda model, x: model.predict(x))


@pytest.mark.parametrize("bias", ["shared", "per_block", "none"])
@pytest.mark.parametrize("mean", [True, False])
def test_beit_classifier_equals_transformers(bias: str, mean: bool):
    network = theirs(
        "BeitForImageClassification",
        use_shared_relative_position_bias=bias == "shared",
        use_relative_position_bias=bias == "per_block",
        use_absolute_position_embeddings=bias == "none",
        layer_scale_init_value=0.1 if mean else 0.0,
        use_mean_pooling=mean,
    )
    assert_same(network, lambda model, x: model(x).logits, lambda model, x: model.predict(x))


@pytest.mark.parametrize("normalize_patches", [True, False])
def test_vit_mae_equals_transformers_in_predictions_and_loss(normalize_patches: bool):
    network = theirs("ViTMAEForPreTraining", **DECODER, norm_pix_loss=normalize_patches)
    noise = torch.rand(BATCH, N)
    hidden = noise.argsort(1).argsort(1) >= N // 4
    mask = PatchMask.from_bool(hidden, N - N // 4)
    target = PixelTarget(
        (4, 4), normalize=Normalize((0.0,) * 3, (1.0,) * 3), channels=3, normalize_patches=normalize_patches
    )

    def predict(model: Any, images: Tensor) -> Tensor:
        return mask.take_masked(model(images, noise=noise).logits)

    def loss(model: Any, images: Tensor) -> Tensor:
        return model(images, noise=noise).loss

    def our_loss(model: Any, images: Tensor) -> Tensor:
        target.to(images.dtype)
        return model(MaskedInputs(images, mask, target(images, mask)), torch.tensor(0.0)).loss

    assert_same(network, predict, lambda model, x: model.predict(x, mask)[0])
    assert_same(network.double(), loss, our_loss)


@pytest.mark.parametrize("bias", ["shared", pytest.param("none", marks=SINCE_5)])
def test_beit_pretraining_equals_transformers_in_predictions_and_loss(bias: str):
    network = theirs(
        "BeitForMaskedImageModeling",
        use_mask_token=True,
        use_shared_relative_position_bias=bias == "shared",
        use_absolute_position_embeddings=bias == "none",
        vocab_size=11,
    )
    hidden = random_mask()
    mask = PatchMask.from_bool(hidden, 6)
    codes = torch.randint(11, (BATCH, 6))

    def predict(model: Any, images: Tensor) -> Tensor:
        return mask.take_masked(model(images, bool_masked_pos=hidden).logits)

    def loss(model: Any, images: Tensor) -> Tensor:
        return model(images, bool_masked_pos=hidden, labels=codes.flatten()).loss

    def our_loss(model: Any, images: Tensor) -> Tensor:
        predictions = model.predict(images, mask)[0]
        return F.cross_entropy(predictions.flatten(0, 1), codes.flatten())

    assert_same(network, predict, lambda model, x: model.predict(x, mask)[0])
    assert_same(network.double(), loss, our_loss)


@pytest.mark.parametrize(
    "name", ["ViTForMaskedImageModeling", pytest.param("DeiTForMaskedImageModeling", marks=SINCE_5)]
)
def test_masked_vit_equals_transformers_in_pixels(name: str):
    network = theirs(name)
    hidden = random_mask()
    mask = PatchMask.from_bool(hidden, 6)

    def predict(model: Any, images: Tensor) -> Tensor:
        pixels = model(images, bool_masked_pos=hidden).reconstruction  # [B,C,H,W]
        return mask.take_masked(
            pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, N, -1)
        )

    assert_same(network, predict, lambda model, x: model.predict(x, mask)[0])


# Files


NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", {}),
    "vit-alone": ("ViTModel", {}),
    "vit-without-biases": ("ViTForImageClassification", {"qkv_bias": False}),
    "vit-masked": ("ViTForMaskedImageModeling", {}),
    "deit": ("DeiTForImageClassification", {}),
    "deit-distilled": ("DeiTForImageClassificationWithTeacher", {}),
    "deit-alone": ("DeiTModel", {}),
    "deit-masked": ("DeiTForMaskedImageModeling", {}),
    "beit-mean": ("BeitForImageClassification", {"use_relative_position_bias": True}),
    "beit-token": (
        "BeitForImageClassification",
        {"use_mean_pooling": False, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0},
    ),
    "beit-masked": (
        "BeitForMaskedImageModeling",
        {"use_mask_token": True, "use_shared_relative_position_bias": True, "vocab_size": 11},
    ),
    "beit-alone": ("BeitModel", {"use_relative_position_bias": True}),
    "mae": ("ViTMAEForPreTraining", DECODER),
    "mae-encoder": ("ViTMAEModel", {}),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_saved_folder_is_read_as_the_network_itself(network: str, tmp_path: Path):
    name, settings = NETWORKS[network]
    saved = theirs(name, **settings)
    saved.save_pretrained(tmp_path)
    config, state, report = from_transformers(*read_weights(tmp_path))
    expected = read(saved)
    assert config == expected.config
    assert_equal(state, expected.state)
    assert set(report.dropped) | set(report.loaded) == read_weights(tmp_path).state.keys()
    assert all("pooler.dense" in name for name in report.dropped)


@pytest.mark.parametrize("network", NETWORKS)
def test_exported_folder_loads_as_the_network_itself(network: str, tmp_path: Path):
    name, settings = NETWORKS[network]
    original = theirs(name, **settings).float()
    config, state, _ = read(original)
    files = to_transformers(state, config)
    save_file(files.state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(files.config))
    kind = getattr(transformers, name)
    alone = {"add_pooling_layer": False} if name in ("ViTModel", "DeiTModel") else {}
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True, **alone)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert files.config["architectures"] == [name]
    images, more = torch.randn(BATCH, 3, 16, 16), {}
    if name.startswith("ViTMAE"):
        more["noise"] = torch.rand(BATCH, N)
    with torch.no_grad():
        expected, output = original(images, **more), loaded.eval()(images, **more)
    key = next(key for key in ("logits", "reconstruction", "last_hidden_state") if key in expected)
    torch.testing.assert_close(output[key], expected[key], rtol=1e-5, atol=1e-5)  # class slots are added up


@pytest.mark.parametrize("network", NETWORKS)
def test_out_and_in_again_is_the_identity(network: str):
    name, settings = NETWORKS[network]
    config, state, _ = read(theirs(name, **settings))
    files = to_transformers(state, config)
    again = from_transformers(files.state, files.config | {"preprocessor_config": files.preprocessor})
    assert again.config == config
    assert_equal(again.state, state)
    assert again.report.dropped == again.report.missing == ()


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def fresh(
    *,
    image_size: tuple[int, int] = (16, 16),
    readout: str | None = "token",
    num_classes: int = 5,
    **changes: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A network of mpm with random values: its description and its weights."""
    architecture = Architecture((4, 4), dim=16, depth=2, heads=2)._replace(**changes)
    config: dict[str, Any] = {
        "image_size": image_size, "channels": 3, "backbone": architecture._asdict(),
        "readout": readout and {"kind": readout}, "num_classes": num_classes, "predictor": None,
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop": 0.8, "interpolation": "bilinear",
    }  # fmt: skip
    backbone = create_backbone(architecture, image_size=image_size)
    network: nn.Module = backbone
    if readout:
        network = Classifier(backbone, create_readout(architecture, kind=readout), num_classes=num_classes)
    randomize(network)
    return config, network.state_dict()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layer_scale": 0.1}, "ViTForImageClassification"),
        ({"image_size": (8, 16)}, "ViTForImageClassification"),
        ({"positions": {"table": "none", "bias": "none"}}, "ViTForImageClassification"),
        ({"qkv_bias": "query_value"}, "ViTForImageClassification"),
        ({"layer_scale": 0.1, "distillation_token": True}, "DeiTForImageClassificationWithTeacher"),
        ({"readout": "mean", "positions": {"table": "sincos", "bias": "none"}}, "BeitForImageClassification"),
        (
            {"qkv_bias": "none", "positions": {"table": "learned", "bias": "shared"}},
            "BeitForImageClassification",
        ),
        ({"positions": {"table": "none", "bias": "per_block"}}, "BeitForImageClassification"),
    ],
)
def test_what_only_mpm_writes_so_is_exact_in_transformers(changes: dict[str, Any], name: str):
    config, state = fresh(**changes)
    files = to_transformers(state, config, classes=("a", "b", "c", "d", "e"))
    assert files.config["architectures"] == [name]
    kind = getattr(transformers, name)
    network = kind.from_pretrained(
        None, config=kind.config_class(**files.config), state_dict=files.state
    ).eval()
    assert network.config.id2label[1] == "b"
    images = torch.randn(BATCH, 3, *config["image_size"])
    expected = ours(config, state).predict(images)
    output = network(images).logits
    assert (output - expected).abs().max() / expected.abs().max() <= 1e-5


def test_preprocessor_gives_the_images_that_mpm_gives():
    config, state = fresh()
    processor = transformers.BitImageProcessor(**to_transformers(state, config).preprocessor)
    image = torch.randint(256, (3, 40, 25), dtype=torch.uint8)
    theirs = processor(image, return_tensors="pt").pixel_values
    view = EvalView((16, 16), crop=0.8, interpolation="bilinear")
    expected = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))(view(image)[None] / 255)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1.01 / 255 / 0.2)  # version 4 rounds as Pillow


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"branches": 2}, "parallel"),
        ({"attention": "talking_heads"}, "talking_heads"),
        ({"class_token": False, "readout": "mean"}, "class token"),
        ({"class_token": False, "readout": "class_attention"}, "class attention"),
        ({"registers": 2}, "registers"),
        ({"stem": {"kind": "hmlp"}}, "stem hmlp"),
        ({"stem": {"kind": "conv"}}, "stem conv"),
        ({"stem": {"kind": "linear", "norm": "layer"}}, "stem linear with a norm"),
        ({"image_size": (8, 16), "readout": "mean"}, "square"),
        (
            {"distillation_token": True, "positions": {"table": "none", "bias": "shared"}},
            "second prefix token",
        ),
    ],
)
def test_what_transformers_has_not_is_refused(changes: dict[str, Any], reason: str):
    config, state = fresh(**changes)
    with pytest.raises(ValueError, match=reason):
        to_transformers(state, config)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("ViTModel", {"hidden_act": "relu"}, "hidden_act relu"),
        ("ViTModel", {"head_dim": 4}, "head_dim 4"),
        ("ViTModel", {"model_type": "swin"}, "model_type swin"),
        (
            "ViTMAEForPreTraining",
            {**DECODER, "decoder_intermediate_size": 24},
            "decoder_intermediate_size 24",
        ),
        (
            "BeitModel",
            {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
            "both",
        ),
        (
            "BeitForMaskedImageModeling",
            {"use_mask_token": True, "use_mean_pooling": False},
            "use_mean_pooling",
        ),
    ],
)
def test_what_mpm_has_not_is_refused(name: str, settings: dict[str, Any], reason: str):
    network = theirs(name, **(DECODER if "MAE" in name else {}))
    with pytest.raises(ValueError, match=reason):
        read(network, **settings)


def test_unknown_weight_is_named():
    network = theirs("ViTForImageClassification")
    state = network.state_dict() | {"vit.layers.0.gate.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.gate\.weight is no weight"):
        from_transformers(state, network.config.to_dict())


def test_another_epsilon_is_told_with_its_size():
    report = read(theirs("ViTForImageClassification"), layer_norm_eps=1e-12).report
    assert "layer_norm_eps 1e-12 becomes 1e-06" in report.notes[0]
    assert "5e-07" in report.notes[0]


def test_preprocessing_is_read():
    preprocessor = {
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3,
        "size": {"height": 256, "width": 256}, "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }  # fmt: skip
    config = read(theirs("ViTModel"), preprocessor_config=preprocessor).config
    assert config["mean"] == (0.1, 0.2, 0.3)
    assert config["std"] == (0.4, 0.5, 0.6)
    assert config["crop"] == 0.875
    assert config["interpolation"] == "bicubic"


def test_null_in_a_preprocessor_is_what_it_leaves_out(tmp_path: Path):
    """Version 5 writes them."""
    theirs("ViTModel").save_pretrained(tmp_path)
    keys = ("image_mean", "image_std", "resample", "crop_size", "size", "do_center_crop")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict.fromkeys(keys)))
    config = load_official(tmp_path).config
    assert (config["mean"], config["crop"], config["interpolation"]) == ((0.5,) * 3, 1.0, "bilinear")


@pytest.mark.parametrize(("resample", "name"), [(0, "nearest"), (1, "lanczos"), (7, "number 7")])
def test_an_interpolation_that_mpm_has_not_becomes_bicubic_with_a_note(resample: int, name: str):
    config, _, report = read(theirs("ViTModel"), preprocessor_config={"resample": resample})
    assert config["interpolation"] == "bicubic"
    assert any(f"resized by {name}" in note for note in report.notes)


@pytest.mark.parametrize("lost", ["cls_classifier", "distillation_classifier"])
def test_heads_that_are_not_all_there_are_left_out(lost: str):
    network = theirs("DeiTForImageClassificationWithTeacher")
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(lost)}
    config, ours, report = from_transformers(state, network.config.to_dict())
    assert config["num_classes"] is None
    assert len(report.dropped) == 2
    assert any("of the classes' heads there is only" in note for note in report.notes)
    network_of(config).load_state_dict(ours)


def test_classifier_without_its_norm_is_refused():
    network = theirs("ViTForImageClassification")
    state = {name: tensor for name, tensor in network.state_dict().items() if "vit.layernorm" not in name}
    with pytest.raises(ValueError, match=r"lack readout\.norm\.weight"):
        from_transformers(state, network.config.to_dict())


def test_resized_mae_has_learned_positions_and_stays_what_it_is(tmp_path: Path):
    theirs("ViTMAEForPreTraining", **DECODER).float().save_pretrained(tmp_path)
    resized = load_official(tmp_path, image_size=24)
    assert resized.config["backbone"]["positions"]["table"] == "learned"
    assert torch.equal(resized.state["predictor.positions.table"], sincos_table((6, 6), 8))
    files = to_transformers(resized.state, resized.config)
    config, state, _ = from_transformers(files.state, files.config)
    assert config["backbone"] == resized.config["backbone"]
    assert_equal(state, resized.state)


def test_masked_network_without_mask_token_says_that_it_starts_fresh():
    report = read(
        theirs("BeitForMaskedImageModeling", use_shared_relative_position_bias=True, vocab_size=11)
    ).report
    assert report.missing == ("predictor.encoder_mask_token",)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("vit.layers.1.attention.k_proj.weight", r"lack vit\.encoder\.layer\.1\.attention\.attention\.key"),
        ("vit.layers.0.mlp.fc1.bias", r"lack backbone\.blocks\.0\.mlp\.fc1\.bias"),
        ("vit.embeddings.cls_token", r"lack vit\.embeddings\.cls_token"),
        ("vit.embeddings.position_embeddings", r"lack vit\.embeddings\.position_embeddings"),
    ],
)
def test_incomplete_weights_are_refused(lost: str, reason: str):
    network = theirs("ViTForImageClassification")
    state = {classic(name): tensor for name, tensor in network.state_dict().items()}  # of version 4 or 5
    del state[classic(lost)]
    with pytest.raises(ValueError, match=reason):
        from_transformers(state, network.config.to_dict())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"intermediate_size": 32},
            r"mlp\.fc1\.weight is \[24, 16\], where .* \[32, 16\]",
        ),
        ({"image_size": 32}, r"positions\.table is \[16, 16\]"),
        ({"num_hidden_layers": 3}, r"lack vit\.encoder\.layer\.2"),
        ({"num_hidden_layers": 1}, r"no weight that mpm knows"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(settings: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        read(theirs("ViTForImageClassification"), **settings)
