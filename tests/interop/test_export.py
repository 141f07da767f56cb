"""Exported networks, loaded again by the programs that they are for."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_backbone, create_blocks, create_readout
from mpm.commands.exporting import subject_of
from mpm.imported import write_imported
from mpm.interop import load_official
from mpm.interop.export import FORMATS, export, load_network
from mpm.interop.inference import Inference, Subject, Written, inference_of
from mpm.network import load
from mpm.objectives.predictors import ClassPretrainingPredictor, DecoderPredictor, LinearPredictor
from mpm.pretraining import pretrain
from mpm.variants import Architecture
from tests.integration.settings import pretrain_config
from tests.networks import randomize

CLASSES = ("ape", "bee", "cat", "dog", "elk")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CLASS_ATTENTION = {"kind": "class_attention", "depth": 2, "queries": 1, "mlp_ratio": 3.0}
CAIT = {"attention": "talking_heads", "layer_scale": 0.1, "class_token": False, "readout": CLASS_ATTENTION}


def subject(
    *,
    readout: dict[str, Any] | None = {"kind": "token"},  # noqa: B006  never changed
    predictor: dict[str, Any] | None = None,
    image_size: tuple[int, int] = (16, 16),
    channels: int = 3,
    out_dim: int = 48,
    target: str | None = None,
    **changes: Any,
) -> Subject:
    """A tiny network with random weights: a classifier, or with `readout` None, a pretrained one."""
    positions = {"table": "learned", "bias": "none"} | changes.pop("positions", {})
    architecture = Architecture((4, 4), dim=16, depth=2, heads=2, positions=positions)._replace(**changes)
    config: dict[str, Any] = {
        "family": "mpm", "image_size": image_size, "channels": channels, "mean": MEAN[:channels],
        "std": STD[:channels], "crop": 0.8, "interpolation": "bilinear", "backbone": architecture._asdict(),
        "readout": readout, "num_classes": readout and len(CLASSES), "predictor": predictor,
    }  # fmt: skip
    backbone = create_backbone(architecture, image_size=image_size, channels=channels)
    if readout:
        network: Any = Classifier(backbone, create_readout(architecture, **readout), num_classes=len(CLASSES))
        state = randomize(network).state_dict()
    else:
        head: Any = LinearPredictor(backbone.dim, out_dim)
        if predictor and predictor["kind"] == "decoder":
            head = DecoderPredictor(backbone.dim, out_dim, grid=backbone.grid, width=8, depth=1, num_heads=2)
        elif predictor and predictor["kind"] == "class_pretraining":
            blocks = create_blocks(architecture._replace(depth=1))
            head = ClassPretrainingPredictor(backbone.dim, out_dim, blocks=blocks, early_layer=1)
        state = {f"backbone.{name}": tensor for name, tensor in randomize(backbone).state_dict().items()}
        state |= {f"predictor.{name}": tensor for name, tensor in randomize(head).state_dict().items()}
    return Subject(config, state, CLASSES if readout else (), "runs/tiny, step 7", target=target)


def images_for(exported: Subject, count: int = 4) -> Tensor:
    return torch.rand(count, exported.config["channels"], *exported.config["image_size"])


def assert_close(output: Tensor, expected: Tensor) -> None:
    assert (output - expected).abs().max() / expected.abs().max() <= 1e-5


# timm


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "vit_base_patch16_224"),
        ({"layer_scale": 0.1, "qkv_bias": "none", "image_size": (8, 16)}, "vit_base_patch16_224"),
        ({"registers": 2, "channels": 1}, "vit_base_patch16_224"),
        ({"readout": {"kind": "mean"}, "positions": {"table": "sincos"}}, "vit_base_patch16_224"),
        ({"readout": {"kind": "mean"}, "class_token": False}, "vit_base_patch16_224"),
        ({"positions": {"table": "none"}}, "vit_base_patch16_224"),
        ({"stem": {"kind": "linear", "norm": "layer"}}, "vit_base_patch16_224"),
        ({"stem": {"kind": "linear", "norm": "batch", "statistics": "all"}}, "vit_base_patch16_224"),
        ({"distillation_token": True, "layer_scale": 0.1}, "deit_base_distilled_patch16_224"),
        ({"branches": 2}, "vit_small_patch16_18x2_224"),
        ({"branches": 2, "layer_scale": 0.1}, "vit_small_patch16_18x2_224"),
        (CAIT, "cait_s24_224"),
        (CAIT | {"layer_scale": None}, "cait_s24_224"),
        (
            {"readout": {"kind": "mean"}, "qkv_bias": "query_value", "positions": {"bias": "per_block"}},
            "beit_base_patch16_224",
        ),
        (
            {"qkv_bias": "query_value", "layer_scale": 0.1, "positions": {"table": "none", "bias": "shared"}},
            "beit_base_patch16_224",
        ),
    ],
)
def test_timm_gives_the_same_logits(changes: dict[str, Any], name: str, tmp_path: Path):
    classifier = subject(**changes)
    exported = export(classifier, tmp_path / "network", to="timm")
    model = timm.create_model(f"local-dir:{exported.path}", pretrained=True).eval()
    assert model.pretrained_cfg["architecture"] == name
    assert tuple(model.pretrained_cfg["label_names"]) == CLASSES
    transform = timm.data.resolve_model_data_config(model)
    assert transform["input_size"] == (classifier.config["channels"], *classifier.config["image_size"])
    assert (transform["crop_pct"], transform["interpolation"]) == (0.8, "bilinear")
    images = images_for(classifier)
    channels = classifier.config["channels"]
    mean, std = (torch.tensor(transform[key]).reshape(channels, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert_close(model((images - mean) / std), inference_of(classifier)(images))
    assert exported.relative <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False, "registers": 1},
        {"qkv_bias": "query_value", "positions": {"table": "none", "bias": "shared"}},
    ],
)
def test_timm_gives_the_features_of_a_pretrained_trunk(changes: dict[str, Any], tmp_path: Path):
    exported = export(
        subject(readout=None, predictor={"kind": "linear"}, **changes), tmp_path / "trunk", to="timm"
    )
    assert exported.relative <= 1e-5
    model = timm.create_model(f"local-dir:{exported.path}", pretrained=True)
    assert model.num_classes == 0


def test_published_size_has_its_name_in_timm(tmp_path: Path):
    trunk = {"patch_size": (16, 16), "dim": 192, "depth": 1, "heads": 3}
    exported = export(subject(**trunk, image_size=(224, 224)), tmp_path / "network", to="timm")
    assert json.loads((exported.path / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stem": {"kind": "hmlp"}}, "hmlp"),
        ({"stem": {"kind": "conv"}}, "conv"),
        ({"branches": 3}, "2 branches"),
        ({"branches": 2, "distillation_token": True}, "distillation token"),
        (CAIT | {"readout": CLASS_ATTENTION | {"queries": 2}}, "1 query"),
    ],
)
def test_what_timm_has_not_is_refused_and_nothing_is_left(
    changes: dict[str, Any], reason: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=reason):
        export(subject(**changes), tmp_path / "network", to="timm")
    assert not list(tmp_path.iterdir())


# transformers


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layer_scale": 0.1}, "ViTForImageClassification"),
        ({"stem": {"kind": "linear", "norm": "batch"}}, "ViTForImageClassification"),
        pytest.param(
            {"distillation_token": True}, "DeiTForImageClassificationWithTeacher", marks=pytest.mark.slow
        ),
        ({"readout": {"kind": "mean"}, "positions": {"bias": "per_block"}}, "BeitForImageClassification"),
    ],
)
def test_transformers_gives_the_same_logits_from_its_own_preprocessing(
    changes: dict[str, Any], name: str, tmp_path: Path
):
    classifier = subject(**changes)
    exported = export(classifier, tmp_path / "network", to="transformers")
    model = getattr(transformers, name).from_pretrained(exported.path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(exported.path)
    image = torch.randint(256, (3, 20, 20), dtype=torch.uint8)  # crop 0.8: nothing is resized
    with torch.no_grad():
        output = model(**processor(image, return_tensors="pt")).logits
    assert_close(output, inference_of(classifier)(image[None, :, 2:18, 2:18] / 255))
    assert model.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (
            {
                "predictor": {"kind": "decoder", "dim": 8, "depth": 1, "heads": 2},
                "positions": {"table": "sincos"},
            },
            "ViTMAEForPreTraining",
        ),
        (
            {"predictor": {"kind": "linear"}, "out_dim": 11, "positions": {"bias": "shared"}},
            "BeitForMaskedImageModeling",
        ),
        ({"predictor": {"kind": "linear"}}, "ViTForMaskedImageModeling"),
        ({}, "ViTModel"),
    ],
)
def test_transformers_gives_the_features_of_what_was_pretrained(
    changes: dict[str, Any], name: str, tmp_path: Path
):
    pretrained = subject(readout=None, **changes)
    if not changes:
        state = {key: t for key, t in pretrained.state.items() if not key.startswith("predictor.head")}
        state.pop("predictor.encoder_mask_token")
        pretrained = pretrained._replace(state=state)
    if name.startswith("ViTMAE"):
        pretrained = pretrained._replace(training={"norm_pix_loss": True, "mask_ratio": 0.6})
    exported = export(pretrained, tmp_path / "network", to="transformers")
    assert exported.relative <= 1e-5
    config = json.loads((exported.path / "config.json").read_text())
    assert config["architectures"] == [name]
    if name.startswith("ViTMAE"):
        assert (config["norm_pix_loss"], config["mask_ratio"]) == (True, 0.6)


LINEAR, DECODER = {"kind": "linear"}, {"kind": "decoder", "dim": 8, "depth": 1, "heads": 2}
CLASS_PRETRAINING = {"kind": "class_pretraining", "early_layer": 1, "depth": 1}
BIAS = {"positions": {"table": "none", "bias": "shared"}}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"predictor": LINEAR, "target": "pixels"}, "ViTForMaskedImageModeling"),
        ({"predictor": DECODER, "target": "pixels"}, "ViTMAEForPreTraining"),
        ({"predictor": LINEAR, "target": "codes"} | BIAS, "BeitForMaskedImageModeling"),
        ({"predictor": LINEAR, "target": "codes", "out_dim": 11}, "BeitForMaskedImageModeling"),
        # as many codes as a patch has values
        ({"predictor": LINEAR, "target": "codes", "out_dim": 48}, "BeitForMaskedImageModeling"),
        ({"predictor": LINEAR, "target": "pixels"} | BIAS, "BeitModel"),
        ({"predictor": LINEAR, "target": "hog", "out_dim": 48}, "ViTModel"),
        ({"predictor": LINEAR, "target": "hog", "out_dim": 108} | BIAS, "BeitModel"),
        ({"predictor": LINEAR, "target": "latent", "out_dim": 16}, "ViTModel"),
        ({"predictor": DECODER, "target": "codes", "out_dim": 11}, "ViTModel"),
        ({"predictor": DECODER, "target": "hog", "out_dim": 48}, "ViTModel"),
        ({"predictor": CLASS_PRETRAINING, "target": "codes", "out_dim": 11}, "ViTModel"),
        ({"predictor": CLASS_PRETRAINING, "target": "codes", "out_dim": 11} | BIAS, "BeitModel"),
        (
            {"predictor": CLASS_PRETRAINING, "target": "pixels", "distillation_token": True},
            "DeiTModel",
        ),
    ],
)
def test_transformers_gets_a_predictor_only_where_it_has_such_a_head(
    changes: dict[str, Any], name: str, tmp_path: Path
):
    pretrained = subject(readout=None, layer_scale=0.1, **changes)
    exported = export(pretrained, tmp_path / "network", to="transformers")
    assert exported.relative <= 1e-5
    config = json.loads((exported.path / "config.json").read_text())
    assert config["architectures"] == [name]
    is_left_out = "What predicted hidden patches is left out" in exported.card.read_text()
    assert is_left_out == name.endswith("Model")


def test_pixels_of_simmims_published_weights_are_no_codes(tmp_path: Path):
    published = subject(readout=None, predictor=LINEAR, **BIAS)
    published = published._replace(config={**published.config, "family": "simmim"})
    exported = export(published, tmp_path / "network", to="transformers")
    assert json.loads((exported.path / "config.json").read_text())["architectures"] == ["BeitModel"]


# Files


@pytest.mark.parametrize(
    "changes",
    [
        {"stem": {"kind": "hmlp", "norm": "batch"}},
        CAIT | {"readout": CLASS_ATTENTION | {"queries": 2}},
        {"branches": 3, "positions": {"bias": "shared"}},
        {"readout": None, "predictor": {"kind": "linear"}},
    ],
)
def test_safetensors_holds_all_that_the_network_needs(changes: dict[str, Any], tmp_path: Path):
    given = subject(**changes)
    exported = export(given, tmp_path / "network.safetensors", to="safetensors")
    images = images_for(given)
    assert torch.equal(load_network(exported.path)(images), inference_of(given)(images))
    assert exported.difference == 0
    assert {file.name for file in tmp_path.iterdir()} == {"network.safetensors", "network.safetensors.md"}


def test_other_safetensors_are_no_network(tmp_path: Path):
    exported = export(subject(), tmp_path / "network", to="timm")
    with pytest.raises(ValueError, match="was not written by mpm export"):
        load_network(exported.path / "model.safetensors")


PROGRAMS = [
    pytest.param({}, id="vit", marks=pytest.mark.slow),
    pytest.param(CAIT, id="cait", marks=pytest.mark.slow),
    pytest.param({"branches": 2, "stem": {"kind": "hmlp"}}, id="parallel-hmlp", marks=pytest.mark.slow),
    pytest.param(
        {"readout": None, "qkv_bias": "query_value", "positions": {"table": "none", "bias": "shared"}},
        id="beit-trunk",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"stem": {"kind": "conv"}, "distillation_token": True}, id="distilled", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("changes", PROGRAMS)
def test_program_gives_the_same_for_another_number_of_images(changes: dict[str, Any], tmp_path: Path):
    given = subject(**changes)
    exported = export(given, tmp_path / "network.pt2", to="torch-export")
    program = torch.export.load(exported.path).module()
    for count in (1, 5):
        images = images_for(given, count)
        assert_close(program(images), inference_of(given)(images))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [program.values[0] for program in PROGRAMS])
def test_onnx_runtime_gives_the_same_for_another_number_of_images(changes: dict[str, Any], tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    given = subject(**changes)
    exported = export(given, tmp_path / "network.onnx", to="onnx")
    session = onnxruntime.InferenceSession(exported.path)
    (place,) = session.get_inputs()
    assert (place.name, place.shape[0]) == ("images", "batch")
    assert [place.name for place in session.get_outputs()] == [given.output]
    for count in (1, 5):
        images = images_for(given, count)
        (output,) = session.run(None, {"images": images.numpy()})
        assert_close(torch.from_numpy(output), inference_of(given)(images))


# The rest


def test_card_tells_what_it_is_and_how_exact(tmp_path: Path):
    exported = export(subject(layer_scale=0.1), tmp_path / "network", to="timm")
    card = exported.card.read_text()
    for part in (
        "library_name: timm",
        "| from | runs/tiny, step 7 |",
        "2 blocks, width 16, 2 heads, patches of 4x4, linear stem",
        "LayerScale, class token; reads: token",
        "| output | logits of 5 classes |",
        "resize to cover 20 x 20 (bilinear), crop the centre; mean 0.4, 0.5, 0.6 and std 0.2, 0.3, 0.4",
        f"differs by at most {exported.difference:.1g} ({exported.relative:.1g} of the largest output)",
        'timm.create_model("local-dir:network", pretrained=True)',
        "2. cat",
    ):
        assert part in card
    parameters = sum(parameter.numel() for parameter in inference_of(subject(layer_scale=0.1)).parameters())
    assert f"| parameters | {parameters:,} |" in card


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_card_tells_of_the_norm_that_is_folded(to: str, tmp_path: Path):
    exported = export(subject(stem={"kind": "linear", "norm": "batch"}), tmp_path / "network", to=to)
    assert "Batch norm of the stem is folded into its map (exact)." in exported.card.read_text()
    assert load_official(exported.path).config["backbone"]["stem"] == {"kind": "linear"}


def test_trunk_exported_to_timm_is_read_again(tmp_path: Path):
    trunk = subject(readout=None, predictor={"kind": "linear"})
    config, state, _ = load_official(export(trunk, tmp_path / "trunk", to="timm").path)
    assert config["num_classes"] is config["readout"] is None
    assert torch.equal(state["predictor.norm.weight"], trunk.state["predictor.norm.weight"])


CARDS = [
    ("timm", {}),
    ("timm", {"readout": None}),
    ("transformers", {"distillation_token": True}),
    ("transformers", {"readout": None, "predictor": {"kind": "decoder", "dim": 8, "depth": 1, "heads": 2}}),
    ("transformers", {"readout": None, "predictor": {"kind": "linear"}}),
    ("transformers", {"readout": None, "predictor": {"kind": "linear"}, "positions": {"bias": "shared"}}),
    ("safetensors", {}),
    pytest.param("torch-export", {}, marks=pytest.mark.slow),
    pytest.param("onnx", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("to", "changes"), CARDS)
def test_lines_of_the_card_run_and_give_what_mpm_gives(
    to: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = subject(**changes)
    given = given._replace(config={**given.config, "crop": 1.0})
    exported = export(given, tmp_path / f"network{FORMATS[to][1]}", to=to)
    pixels = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    images = pixels[None] / 255
    names = {"image": to_pil_image(pixels), "images": images.numpy() if to == "onnx" else images}
    code = exported.card.read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        exec(code, names)
    assert_close(torch.as_tensor(names[given.output]), inference_of(given)(images))


def test_network_that_differs_when_loaded_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write_wrong(network: Inference, subject: Subject, path: Path) -> Written:
        path.write_text("wrong")
        return Written(lambda images: network(images) * 1.01, "")

    monkeypatch.setitem(FORMATS, "wrong", (write_wrong, ".txt"))
    with pytest.raises(ValueError, match=r"differs by 1\.0e-02"):
        export(subject(), tmp_path / "network.txt", to="wrong")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "to", "error", "reason"),
    [
        ("network.bin", "onnx", ValueError, "ends in .onnx"),
        ("full", "timm", FileExistsError, "not empty"),
        ("nowhere/network", "timm", FileNotFoundError, "does not exist"),
    ],
)
def test_wrong_place_is_told_before_anything_is_written(
    output: str, to: str, error: type[Exception], reason: str, tmp_path: Path
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(error, match=reason):
        export(subject(), tmp_path / output, to=to)
    assert [file.name for file in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("to", "package", "output"), [("onnx", "onnxruntime", "a.onnx"), ("transformers", "transformers", "a")]
)
def test_missing_package_is_named_with_the_way_to_get_it(
    to: str, package: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'masked-patch-modeling\[export\]'"):
        export(subject(), tmp_path / output, to=to)


def test_network_without_classes_and_norm_is_refused(tmp_path: Path):
    pretrained = subject(readout=None)
    state = {name: tensor for name, tensor in pretrained.state.items() if name.startswith("backbone")}
    with pytest.raises(ValueError, match="neither classes nor a norm"):
        export(pretrained._replace(state=state), tmp_path / "a.safetensors", to="safetensors")


# Checkpoints


def test_exported_run_is_the_network_that_mpm_runs(finetuned: Path, pretrained: Path):
    images = torch.rand(2, 3, 32, 32)
    classifier, encoder = subject_of(finetuned), subject_of(pretrained)
    assert tuple(classifier.classes) == load(finetuned).classes
    assert torch.equal(inference_of(classifier)(images).softmax(1), load(finetuned).predict(images))
    assert torch.equal(inference_of(encoder)(images), load(pretrained).features(images))
    assert encoder.config["predictor"]["kind"] == "decoder"
    assert encoder.training == {"mask_ratio": 0.75, "norm_pix_loss": True}
    assert (encoder.target, classifier.target) == ("pixels", None)


@pytest.mark.parametrize("target", ["hog", "latent"])
def test_exported_run_tells_what_was_predicted(target: str, tmp_path: Path):
    words = ["objective.predictor={kind: decoder, dim: 8, depth: 1, heads: 2}", "optim.steps=1"]
    words += [f"objective.target={{kind: {target}}}", "optim.warmup_steps=0"]
    pretrain(pretrain_config(tmp_path / "run", *words))
    given = subject_of(tmp_path / "run")
    assert (given.target, given.training) == (target, {})
    exported = export(given, tmp_path / "network", to="transformers")
    assert json.loads((exported.path / "config.json").read_text())["architectures"] == ["ViTModel"]


def test_imported_weights_go_out_as_they_came_in(tmp_path: Path):
    classifier = subject(distillation_token=True)
    exported = export(classifier, tmp_path / "theirs", to="transformers")
    write_imported(load_official(exported.path), tmp_path / "ours", source=exported.path)
    again = subject_of(tmp_path / "ours")
    assert again.config == {**classifier.config, **{key: again.config[key] for key in ("family", "backbone")}}
    assert again.state.keys() == classifier.state.keys()
    for name, tensor in classifier.state.items():
        assert torch.equal(again.state[name], tensor), name
