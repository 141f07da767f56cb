"""`mpm probe`: what it reads from the blocks, which images it takes, and what it reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

import mpm
from mpm import config as cfg
from mpm.backbones.create import create_backbone
from mpm.backbones.initialization import initialize
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.commands.probe_report import Draw, Row, Scored, Sizes, draws_of, report
from mpm.commands.probe_sources import probe_config
from mpm.commands.probe_tokens import LabelledImages, RecomputedTokens, keep
from mpm.commands.probing import feature_rows, layer_features, layer_tokens
from mpm.configfile import ConfigError
from mpm.data.datasets import SyntheticImages
from mpm.data.views import EvalView
from mpm.evaluation.knn import knn_accuracy
from mpm.evaluation.probes import Score
from mpm.network import Network
from mpm.patchify.pixels import Normalize
from mpm.variants import Architecture
from tests.command_line import CONFIGS, ROOT, CommandLine, finished_run

TINY = Architecture((4, 4), dim=16, depth=3, heads=2)


def _network(architecture: Architecture, *, channels: int) -> Network:
    backbone = create_backbone(architecture, image_size=(12, 16), channels=channels)
    initialize(backbone, "vit")
    return Network(
        backbone,
        architecture=architecture,
        norm=nn.LayerNorm(16),
        normalize=Normalize((0.5,) * channels, (0.5,) * channels),
        view=EvalView((12, 16)),
        reading={"channels": channels},
        step=0,
    )


@pytest.mark.parametrize(
    ("architecture", "channels"),
    [
        (TINY, 3),
        (TINY._replace(distillation_token=True, registers=2), 1),
        (TINY._replace(class_token=False, attention="talking_heads", layer_scale=0.1), 5),
        (TINY._replace(branches=2, stem={"kind": "hmlp", "norm": "batch", "statistics": "all"}), 4),
    ],
)
def test_features_are_those_of_hooks_on_the_blocks(architecture: Architecture, channels: int) -> None:
    network = _network(architecture, channels=channels)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
    images = torch.rand(2, channels, 12, 16)
    outputs = []
    for block in network.backbone.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    expected = {Row(None, "output"): network.features(images)}
    for layer, output in enumerate(list(outputs), start=1):
        centred = output - output.mean(2, keepdim=True)
        tokens = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
        expected[Row(layer, "patches")] = tokens[:, -12:].mean(1)
        if architecture.class_token:
            expected[Row(layer, "class token")] = tokens[:, 0]
        torch.testing.assert_close(layer_tokens(network, images)[:, layer - 1], tokens[:, -12:])
    rows = feature_rows(network)
    found = layer_features(network, images)
    assert found.shape == (2, len(rows), 16)
    assert set(rows) == set(expected)
    for number, row in enumerate(rows):
        torch.testing.assert_close(found[:, number], expected[row])


def test_of_a_model_of_timm_the_output_is_probed() -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    network = Network(
        model,
        architecture=None,
        norm=nn.Identity(),
        normalize=Normalize((0.5,) * 3, (0.5,) * 3),
        view=EvalView((32, 32)),
        reading={"channels": 3},
        step=0,
        classifier=TimmClassifier(model),
    )
    images = torch.rand(2, 3, 32, 32)
    assert feature_rows(network) == [Row(None, "output")]
    expected = model.forward_head(model.forward_features(2 * images - 1), pre_logits=True)
    torch.testing.assert_close(layer_features(network, images), expected[:, None])


@pytest.mark.slow
def test_a_run_of_a_model_of_timm_is_probed_but_for_its_patches(
    commands: CommandLine, tmp_path: Path
) -> None:
    words = ["init=null", "readout=null", "optim.layer_decay=1"]
    words += ["network={kind: timm, model: test_resnet, pretrained: false}"]
    run = finished_run(commands, "finetune.py", CONFIGS / "finetune" / "debug.yaml", *words)
    ended = commands(*_words(run, "--labels", 20, "--seeds", 0, 1))
    assert ended.status == 0, ended.err
    scores = json.loads(ended.out)["scores"]
    assert [(score["features"], score["probe"]) for score in scores] == [
        ("output", "k-NN"),
        ("output", "linear"),
    ] * 2
    ended = commands(*_words(run, "--attentive"))
    assert ended.status == 2
    assert "tells no patch tokens; leave --attentive out" in ended.complaint


def test_kept_tokens_are_those_computed_again() -> None:
    source = SyntheticImages(9, image_size=(12, 16), channels=3, num_classes=2, seed=0)
    places = torch.tensor([0, 2, 3, 5, 8])
    labels = torch.tensor([source.label(int(place)) for place in places])
    network = _network(TINY, channels=3)
    images = LabelledImages(source, network.view, places, labels, 0)
    computed = RecomputedTokens(images, lambda x: layer_tokens(network, x), torch.device("cpu"))
    kept = keep(computed, (3, 12, 16), torch.device("cpu"))
    orders = [torch.tensor([4, 1]), torch.tensor([2, 0]), torch.tensor([3])]
    for (a, a_labels), (b, b_labels) in zip(computed.batches(orders), kept.batches(orders), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)  # other batches round otherwise, in float16
        assert torch.equal(a_labels, b_labels)
    (row,) = network.preprocess([source.read(8)])
    (first, _), *_ = kept.batches(orders)
    torch.testing.assert_close(first[0], layer_tokens(network, row[None])[0], atol=2e-3, rtol=2e-3)


def _words(checkpoint: Path, *more: object) -> list[object]:
    return ["mpm", "probe", checkpoint, "--json", "run.device=cpu", *more]


@pytest.mark.slow
def test_scores_are_those_of_the_loaded_network(commands: CommandLine, finetuned: Path) -> None:
    ended = commands(*_words(finetuned))
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)
    network = mpm.load(finetuned)
    config = probe_config(finetuned, train=None, test=None, words=[])
    sets = []
    for part in (config.data.train, config.data.test):
        assert isinstance(part, cfg.SyntheticSource)
        images = SyntheticImages(
            part.count,
            image_size=network.image_size,
            channels=network.channels,
            num_classes=part.classes,
            seed=part.seed,
        )
        features = network.features(network.preprocess([images.read(i) for i in range(len(images))]))
        sets.append((features, torch.tensor([images.label(i) for i in range(len(images))])))
    (bank, bank_labels), (queries, query_labels) = sets
    (found,) = (
        score["test"] for score in told["scores"] if (score["layer"], score["probe"]) == (None, "k-NN")
    )
    classes = config.data.train.classes
    expected = knn_accuracy(queries, query_labels, bank, bank_labels, num_classes=classes)
    assert found == pytest.approx(expected, abs=1.5 / len(queries))  # a neighbour may move in float16
    assert told["test_images"] == 30
    assert told["train_images"] == len(bank)


@pytest.mark.slow
def test_workers_and_memory_change_nothing(commands: CommandLine, pretrained: Path) -> None:
    told = []
    for more in (("run.workers=0",), ("run.workers=2",), ("run.workers=0", "--memory", 0)):
        data = ["data.train.count=120", "data.test.count=600"]
        words = _words(pretrained, *data, "--attentive", *more, "--labels", 4, 40)
        ended = commands(*words)
        assert ended.status == 0, ended.err
        assert ("runs again" in ended.err) == ("--memory" in more)
        told.append(json.loads(ended.out))
    assert told[0] == told[1]
    network = mpm.load(pretrained)
    rows = 2 * (2 * len(feature_rows(network)) + network.backbone.depth)
    assert len(told[0]["scores"]) == rows
    for kept, again in zip(told[0]["scores"], told[2]["scores"], strict=True):
        if kept["probe"] != "attentive":
            assert kept == again
        assert kept["test"] == pytest.approx(again["test"], abs=0.02)  # batches round otherwise
        assert (kept["held_out"] is None) == (kept["labels"] == "4 labels")


@pytest.mark.torchrun
def test_two_processes_score_as_one(commands: CommandLine, pretrained: Path) -> None:
    words = _words(pretrained, "data.test.count=31", "--labels", 40)
    alone = commands(*words)
    assert alone.status == 0, alone.err
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    settings = {"capture_output": True, "text": True, "timeout": 300, "cwd": ROOT}
    pair = subprocess.run([*launcher, *map(str, words)], **settings, check=True)
    (told,) = (json.loads(line) for line in pair.stdout.splitlines() if line.startswith("{"))
    expected = json.loads(alone.out)
    assert [score["layer"] for score in told["scores"]] == [score["layer"] for score in expected["scores"]]
    for ours, theirs in zip(told["scores"], expected["scores"], strict=True):
        assert ours["test"] == pytest.approx(theirs["test"], abs=1.5 / 31)  # other batches, other rounding
    refused = subprocess.run([*launcher, *map(str, words), "--attentive"], **settings)
    assert refused.returncode
    assert refused.stderr.count("start it without torchrun") == 1


def test_images_come_from_folders_configurations_and_words(finetuned: Path, tmp_path: Path) -> None:
    config = probe_config(
        finetuned, train=tmp_path, test=CONFIGS / "finetune" / "debug.yaml", words=["k=3", "data.test.seed=7"]
    )
    assert isinstance(config.data.train, cfg.FolderSource)
    assert config.data.train.root == tmp_path
    assert isinstance(config.data.test, cfg.SyntheticSource)
    assert (config.data.test.seed, config.k) == (7, 3)


def test_a_fine_tuned_network_probed_on_its_own_training_images_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (CONFIGS / "finetune" / "debug.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    other = CONFIGS / "debug.yaml"
    probe_config(tmp_path, train=None, test=None, words=["data.test.seed=7"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{tmp_path} was fine-tuned on these training images" in caplog.text
    caplog.clear()
    probe_config(tmp_path, train=None, test=None, words=["data.train.seed=7"])
    probe_config(tmp_path, train=tmp_path, test=None, words=[])
    (tmp_path / "config.yaml").write_text(other.read_text())
    probe_config(tmp_path, train=None, test=None, words=[])
    assert not caplog.records


def test_missing_images_are_told(commands: CommandLine, tmp_path: Path) -> None:
    written = yaml.safe_load((CONFIGS / "debug.yaml").read_text())
    del written["monitor"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    ended = commands("mpm", "probe", tmp_path, "data.train.kind=synthetic")
    assert ended.status == 2
    assert "names no labelled images to test on; give --test FOLDER" in ended.complaint
    with pytest.raises(ConfigError, match=r"unknown key data\.test\.cont"):
        probe_config(tmp_path, train=tmp_path, test=tmp_path, words=["data.test.cont=1"])


def _scored(seed: int, layer: int, held_out: float | None, test: float, number: int = 100) -> Scored:
    return Scored(Draw(number, None, seed), Row(layer, "patches"), "k-NN", Score(held_out, test))


def test_the_best_layer_is_chosen_by_held_out_features() -> None:
    scored = [
        _scored(0, 1, 0.5, 0.9),
        _scored(0, 2, 0.7, 0.6),
        _scored(0, 3, 0.7, 0.8),
        _scored(1, 1, 0.6, 0.5),
        _scored(1, 2, 0.2, 0.9),
        _scored(1, 3, 0.5, 0.9),
        _scored(0, 1, None, 0.3, number=10),
        _scored(0, 2, None, 0.2, number=10),
    ]
    settings = {"sizes": Sizes((100,), 100, 50, 10), "checkpoint": Path("run"), "step": 4}
    best, few = json.loads(report(scored, **settings, as_json=True))["best"]
    assert best["test"] == pytest.approx(0.55)
    assert best["deviation"] == pytest.approx(0.1 / 2**0.5)
    assert [row["layer"] for row in best["rows"]] == [2, 1]
    assert few["test"] == 0.2  # nothing to choose by: the last one
    text = report(scored, **settings, as_json=False)
    assert "55.00 ± 7.07 (block 2 patches in 1, block 1 patches in 1)" in text
    assert "nothing to hold out, on test:  k-NN: 20.00 (block 2 patches)" in text


@pytest.mark.parametrize(
    ("drawn", "train", "told"),
    [
        ((1200,), 1200, "1,200 training and 50 test images, 10 classes"),
        ((50, 50), 97, "50 training images of each draw, 97 in all, and 50 test images, 10 classes"),
        (
            (5, 5, 50, 50),
            97,
            "5 or 50 training images of each draw, 97 in all, and 50 test images, 10 classes",
        ),
    ],
)
def test_images_of_a_draw_and_of_all_are_told_apart(drawn: tuple[int, ...], train: int, told: str) -> None:
    assert str(Sizes(drawn, train, 50, 10)) == told


def test_draws_are_every_size_with_every_seed() -> None:
    assert draws_of([], [], [3, 3]) == [Draw(None, 1.0, 3)]
    assert [str(draw) for draw in draws_of([1000], [0.01], [0, 1])] == [
        "1,000 labels, seed 0",
        "1,000 labels, seed 1",
        "1 % of the labels, seed 0",
        "1 % of the labels, seed 1",
    ]
