"""Weights that others trained: read by both scripts and by every command, wherever they lie."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import mpm
from mpm import checkpoint, cli
from mpm.finetuning import finetune
from mpm.imported import fetch, write_imported
from mpm.objectives.predictors import DecoderPredictor
from mpm.pretraining import pretrain
from mpm.trunk import Trunk, read_trunk
from tests.integration.settings import codes_of, finetune_config, pretrain_config, tokenizer_config
from tests.networks import randomize

SHORT = ["optim.steps=1", "optim.warmup_steps=0"]
TUNED = [*SHORT, "evaluate_every=1", "mixup=null", "data.train.count=32", "data.val=null", "ema=null"]
CLASSES = 4  # of the synthetic images


def vit(**options) -> VisionTransformer:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 192, "depth": 1, "num_heads": 3}
    return randomize(VisionTransformer(**sizes, num_classes=CLASSES, **options)).eval()


def save(model: nn.Module, file: Path) -> Path:
    """As the official training code does, its arguments beside the weights."""
    torch.save({"model": model.state_dict(), "epoch": 300, "args": argparse.Namespace(lr=1e-3)}, file)
    return file


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionTransformer, Path]:
    torch.manual_seed(0)
    model = vit()
    return model, save(model, tmp_path_factory.mktemp("deit") / "deit.pth")


def start_of(folder: Path, *words: str) -> mpm.Network:
    """The network after one step that moves nothing."""
    finetune(finetune_config(folder, *TUNED, "optim.lr=1e-30", "optim.weight_decay=0", *words))
    return mpm.load(folder)


def same_logits(ours: mpm.Network, theirs: nn.Module) -> None:
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs(ours.normalize(images)).softmax(1)
    torch.testing.assert_close(ours.predict(images), expected, rtol=1e-4, atol=1e-5)  # float32, one block


def places(deit: tuple[VisionTransformer, Path], folder: Path) -> dict[str, str]:
    """One network in every place that init.checkpoint takes."""
    model, file = deit
    write_imported(fetch(file), folder / "imported", source=file)
    hub = folder / "timm"
    hub.mkdir()
    save_file(model.state_dict(), hub / "model.safetensors")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 192, "depth": 1, "num_heads": 3}
    facts = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": CLASSES,
        "model_args": sizes,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.4] * 3, "std": [0.3] * 3, "crop_pct": 0.9},
    }
    (hub / "config.json").write_text(json.dumps(facts))
    return {"file": str(file), "imported": str(folder / "imported"), "timm": f"timm:local-dir:{hub}"}


@pytest.mark.parametrize("place", ["file", "imported", "timm"])
def test_fine_tuning_starts_from_published_weights_wherever_they_lie(place, deit, tmp_path: Path) -> None:
    """Readout and heads too, as there are as many classes."""
    source = places(deit, tmp_path)[place]
    network = start_of(
        tmp_path / "run", f"init.checkpoint={source}", "readout.kind=token", "data.image_size=null"
    )
    assert network.image_size == (16, 16)
    same_logits(network, deit[0])
    if place == "timm":
        torch.testing.assert_close(network.normalize.mean.flatten(), torch.tensor([0.4] * 3))


def test_other_classes_get_fresh_heads(deit, tmp_path: Path) -> None:
    words = [f"init.checkpoint={deit[1]}", "readout.kind=token", "data.image_size=null"]
    network = start_of(tmp_path, *words, "data.train.classes=5", "data.test.classes=5")
    assert network.classifier is not None
    assert network.classifier.heads[0].weight.std().item() == pytest.approx(0.02, rel=0.2)
    backbone = read_trunk(deit[1]).state["backbone"]
    torch.testing.assert_close(network.backbone.state_dict(), backbone)


@pytest.mark.parametrize(
    "words",
    [
        ["data.image_size=24"],
        ["data.image_size=[16, 32]", "data.channels=1", "data.mean=[0.5]", "data.std=[0.25]"],
        ["data.image_size=16", "data.channels=5", "data.mean=measured", "data.std=measured"],
    ],
    ids=str,
)
def test_published_weights_are_fine_tuned_on_other_images(words: list[str], deit, tmp_path: Path) -> None:
    finetune(finetune_config(tmp_path, *TUNED, f"init.checkpoint={deit[1]}", *words))
    assert mpm.load(tmp_path).predict(torch.rand(1, *_shape(tmp_path))).shape == (1, CLASSES)


def _shape(folder: Path) -> tuple[int, ...]:
    network = mpm.load(folder)
    return network.channels, *network.image_size


@pytest.mark.slow
def test_cait_is_fine_tuned_at_a_higher_resolution_with_its_class_attention(tmp_path: Path) -> None:
    model = randomize(
        Cait(img_size=16, patch_size=4, embed_dim=96, depth=2, num_heads=2, num_classes=CLASSES)
    ).eval()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "cait.pth")
    words = [f"init.checkpoint={tmp_path / 'cait.pth'}", "readout={kind: class_attention}"]
    same_logits(start_of(tmp_path / "same", *words, "data.image_size=null"), model)
    larger = start_of(tmp_path / "larger", *words, "data.image_size=32")
    assert larger.classifier is not None
    ours = read_trunk(tmp_path / "cait.pth")
    torch.testing.assert_close(larger.classifier.readout.state_dict(), ours.state["readout"])
    torch.testing.assert_close(larger.classifier.heads.state_dict(), ours.state["heads"])


def cait_file(folder: Path) -> Path:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 2}
    model = randomize(Cait(**sizes, num_classes=CLASSES))
    return save(model, folder / "cait.pth")


def test_a_second_query_joins_published_class_attention(tmp_path: Path) -> None:
    """The distillation token and its head start afresh; all else is the file's."""
    file = cait_file(tmp_path)
    words = [f"init.checkpoint={file}", "data.image_size=null"]
    network = start_of(tmp_path / "run", *words, "readout={kind: class_attention, queries: 2}")
    theirs = read_trunk(file)
    assert network.classifier is not None
    ours = network.classifier.readout.state_dict()
    torch.testing.assert_close(ours.pop("tokens")[:1], theirs.state["readout"].pop("tokens"))
    torch.testing.assert_close(ours, theirs.state["readout"])
    heads = network.classifier.heads
    torch.testing.assert_close(heads[0].weight, theirs.state["heads"]["0.weight"])
    assert heads[1].weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_pretraining_does_not_take_the_norm_of_class_attention(tmp_path: Path) -> None:
    words = [
        "backbone={patch_size: 4, dim: 96, depth: 2, heads: 2, attention: talking_heads, class_token: false}"
    ]
    words += ["init.checkpoint=" + str(cait_file(tmp_path)), "backbone.layer_scale=null"]
    model = started_from(tmp_path / "run", *words)
    assert model["predictor.norm.weight"].eq(1).all()


def test_pretraining_continues_with_the_files_mean_and_deviation(tmp_path: Path) -> None:
    places((vit(), save(vit(), tmp_path / "vit.pth")), tmp_path)  # timm's folder says mean 0.4, deviation 0.3
    started_from(tmp_path / "run", f"init.checkpoint=timm:local-dir:{tmp_path / 'timm'}", SAME_TRUNK)
    assert checkpoint.load(tmp_path / "run").config["data"]["mean"] == [0.4] * 3


def mae_file(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """An MAE file with its decoder, by the official names."""
    encoder = {
        name: tensor for name, tensor in vit().state_dict().items() if not name.startswith(("head", "fc"))
    }
    decoder = randomize(DecoderPredictor(192, 48, grid=(4, 4), width=64, depth=1, num_heads=2)).state_dict()
    names = {"embed": "decoder_embed", "head": "decoder_pred", "decoder_norm": "decoder_norm"}
    official = {
        f"{names[part]}.{name.partition('.')[2]}": tensor
        for name, tensor in decoder.items()
        if (part := name.partition(".")[0]) in names
    }
    official |= {f"decoder_{name}": tensor for name, tensor in decoder.items() if name.startswith("blocks.")}
    official["mask_token"] = decoder["mask_token"][None, None]
    official["decoder_pos_embed"] = torch.cat([torch.zeros(1, 64), decoder["positions.table"]])[None]
    torch.save({"model": encoder | official}, folder / "mae.pth")
    return decoder, folder / "mae.pth"


def started_from(folder: Path, *words: str) -> dict[str, Tensor]:
    """Weights of a pretraining run after one step that moves nothing."""
    words = ("optim.lr=1e-30", "optim.weight_decay=0", *SHORT, "data.image_size=16", "data.count=32", *words)
    pretrain(pretrain_config(folder, *words))
    return checkpoint.load(folder).model


SAME_TRUNK = "backbone={patch_size: 4, dim: 192, depth: 1, heads: 3}"


def test_pretraining_continues_a_published_mae_with_its_decoder(tmp_path: Path) -> None:
    # the width of this tiny decoder is none that is published, so its heads are given on the way in
    decoder, file = mae_file(tmp_path)
    official = fetch(file, decoder_heads=2)
    write_imported(official, tmp_path / "imported", source=file)
    model = started_from(
        tmp_path / "run",
        f"init.checkpoint={tmp_path / 'imported'}",
        SAME_TRUNK,
        "objective.predictor={kind: decoder, dim: 64, depth: 1, heads: 2}",
    )
    for name in ("head.weight", "blocks.0.attn.qkv.weight", "mask_token"):
        torch.testing.assert_close(model[f"predictor.{name}"], decoder[name])
    torch.testing.assert_close(
        model["backbone.blocks.0.attn.qkv.weight"], official.state["backbone.blocks.0.attn.qkv.weight"]
    )


def beit_v2_file(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """A pretraining file of BEiT v2 with codes of a tokenizer of 32."""
    options = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 192, "depth": 4, "num_heads": 3}
    model = randomize(Beit(**sizes, **options, num_classes=0, global_pool="token"))
    last = {"blocks.2.": "cls_pt_layers.0.", "blocks.3.": "cls_pt_layers.1."}
    state = {last.get(name[:9], name[:9]) + name[9:]: tensor for name, tensor in model.state_dict().items()}
    state |= {"mask_token": torch.randn(1, 1, 192), "lm_head.weight": torch.randn(32, 192)}
    state["lm_head.bias"] = torch.randn(32)
    torch.save({"model": state}, folder / "beitv2.pth")
    return state, folder / "beitv2.pth"


@pytest.mark.slow
def test_pretraining_continues_a_published_beit_v2_with_its_class_pretraining(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, path = beit_v2_file(tmp_path)
    assert cli.main(["import", str(path), "-o", str(tmp_path / "imported")]) == 0
    assert "early_layer of cls_pt_layers is not told: it is 1" in " ".join(capsys.readouterr().out.split())
    pretrain(tokenizer_config(tmp_path / "tokenizer", "optim.steps=1"))
    model = started_from(
        tmp_path / "run",
        *codes_of(tmp_path / "tokenizer"),
        "mask={kind: random, ratio: 0.5}",
        f"init.checkpoint={tmp_path / 'imported'}",
        "backbone={patch_size: 4, dim: 192, depth: 2, heads: 3, qkv_bias: query_value, layer_scale: 0.1}",
        "backbone.positions={table: none, bias: shared}",
        "objective.predictor={kind: class_pretraining, early_layer: 1, depth: 2}",
    )
    for ours, theirs in {
        "blocks.1.attn.q_bias": "cls_pt_layers.1.attn.q_bias",
        "blocks.0.ls2.gamma": "cls_pt_layers.0.gamma_2",
        "head.weight": "lm_head.weight",
        "norm.weight": "norm.weight",
    }.items():
        torch.testing.assert_close(model[f"predictor.{ours}"], file[theirs])
    # for fine-tuning they mean nothing
    finetune(finetune_config(tmp_path / "tuned", *TUNED, f"init.checkpoint={tmp_path / 'imported'}"))


def test_pretraining_continues_a_classifier_with_its_norm(deit, tmp_path: Path) -> None:
    model = started_from(tmp_path, f"init.checkpoint={deit[1]}", SAME_TRUNK)
    theirs = deit[0].state_dict()
    torch.testing.assert_close(model["backbone.blocks.0.mlp.fc1.weight"], theirs["blocks.0.mlp.fc1.weight"])
    torch.testing.assert_close(model["predictor.norm.weight"], theirs["norm.weight"])


def test_a_trunk_of_another_shape_is_refused(deit, tmp_path: Path) -> None:
    words = [f"init.checkpoint={deit[1]}", "backbone={patch_size: 4, dim: 192, depth: 2, heads: 3}"]
    with pytest.raises(ValueError, match=r"backbone\.depth 2 is not the checkpoint's, 1"):
        started_from(tmp_path, *words)


# The command line


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for number in range(CLASSES):
        folder = tmp_path / "photos" / f"n{number:02}"
        folder.mkdir(parents=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / "a.png")
    return tmp_path / "photos"


def test_import_tells_every_key_and_its_folder_serves_every_command(
    deit, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    assert cli.main(["import", str(deit[1]), "-o", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "deit, classifier of 4 classes" in told
    assert "1 blocks, width 192, 3 heads, patch 4x4" in told
    assert "16x16, 3 channels" in told

    assert cli.main(["predict", str(folder), str(photos), "--workers", "0", "--device", "cpu"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + CLASSES
    words = ["data.test.kind=folder", f"data.test.root={photos}", "run.workers=0", "run.device=cpu"]
    assert cli.main(["evaluate", str(folder), *words, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["count"] == CLASSES
    assert list(scores["classes"]) == [f"n{number:02}" for number in range(CLASSES)]
    out = str(tmp_path / "features.safetensors")
    assert (
        cli.main(["features", str(folder), str(photos), "-o", out, "--workers", "0", "--device", "cpu"]) == 0
    )


def test_import_writes_into_no_folder_that_is_in_use(
    deit, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["import", str(deit[1]), "-o", str(photos)]) == 2
    assert "is not empty; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pth", "no checkpoint nowhere.pth; give a run's folder, a file of weights, or timm:NAME"),
        ("timm:no_such_model", "timm gives no weights for no_such_model"),
    ],
)
def test_a_source_that_is_none_is_named(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["import", source, "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1


def test_a_trunk_knows_its_reader(deit) -> None:
    trunk: Trunk = read_trunk(deit[1])
    assert trunk.readout is not None
    assert (trunk.readout.kind, trunk.num_classes, trunk.classes) == ("token", CLASSES, ())
    assert trunk.norm.keys() == {"weight", "bias"}
