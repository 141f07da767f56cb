"""Whole runs that learn from a teacher, and a teacher that the same script trains."""

import json
from pathlib import Path

import pytest
import torch

import mpm
from mpm import checkpoint
from mpm.commands.teaching import teach
from mpm.finetuning import finetune
from mpm.trunk import read_trunk
from tests.integration.runs import assert_identical, everything_saved, metrics
from tests.integration.settings import DISTILLED, finetune_config

CONVNET = ["init=null", "readout=null", "network={kind: timm, model: test_resnet}", "optim.layer_decay=1"]
QUIET = ["data.test=null", "data.val=null"]
TAUGHT = "distillation.teacher={kind: checkpoint, checkpoint: %s}"


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a timm convnet."""
    folder = tmp_path_factory.mktemp("convnet") / "run"
    finetune(finetune_config(folder, *CONVNET, "optim.steps=4", "optim.warmup_steps=0", "evaluate_every=2"))
    return folder


def stopped_and_not(folder: Path, *words: str) -> tuple[Path, Path]:
    """Folders of the same run, stopped after 3 steps and continued, and in one go."""
    stopped, one_go = folder / "stopped", folder / "one_go"
    finetune(finetune_config(one_go, *words))
    finetune(finetune_config(stopped, *words), stop_after=3)
    finetune(finetune_config(stopped, *words))
    return stopped, one_go


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["data.erasing=0.5"], id="hard, token, mixed and erased"),
        pytest.param(
            [
                "readout={kind: class_attention, depth: 1, queries: 2}",
                "backbone={patch_size: 8, dim: 16, depth: 1, heads: 2, attention: talking_heads, "
                "class_token: false, layer_scale: 0.1}",
                "distillation.kind=soft",
            ],
            id="soft, second query",
        ),
    ],
)
def test_a_stopped_run_ends_as_an_uninterrupted_one(words: list[str], tmp_path: Path) -> None:
    stopped, one_go = stopped_and_not(tmp_path, *DISTILLED, *words, "optim.steps=6", "evaluate_every=3")
    assert metrics(stopped) == metrics(one_go)
    assert_identical(everything_saved(stopped), everything_saved(one_go))
    results = [json.loads((folder / "result.json").read_text()) for folder in (stopped, one_go)]
    assert results[0] == results[1]
    assert results[0]["heads"]["top1"].keys() == {"class", "distillation", "both"}
    assert results[0]["heads"]["top1"]["both"] == results[0]["test"]["top1"]
    assert -1 <= results[0]["heads"]["cosine"]["pooled"] <= 1
    saved = checkpoint.load(stopped)
    state = saved.model | (saved.ema or {})
    assert all(name.startswith("classifier.") for name in state)
    classifier = mpm.load(stopped).classifier
    assert sum(t.numel() for t in saved.model.values()) == sum(
        t.numel() for t in classifier.state_dict().values()
    )  # the student's, nothing else


@pytest.mark.slow
def test_another_teacher_is_noticed(convnet: Path, tmp_path: Path) -> None:
    words = [*DISTILLED, *QUIET, "optim.steps=6"]
    finetune(finetune_config(tmp_path / "run", *words, TAUGHT % convnet), stop_after=1)
    moved = convnet.rename(convnet.with_name("moved"))
    try:
        one_step = ["optim.steps=1", "optim.warmup_steps=0"]
        finetune(finetune_config(convnet, *CONVNET, *QUIET, *one_step))
        with pytest.raises(
            ValueError, match=r"distillation\.teacher\.checkpoint .* has other weights than when"
        ):
            finetune(finetune_config(tmp_path / "run", *words, TAUGHT % convnet))
    finally:
        convnet.rename(convnet.with_name("other"))
        moved.rename(convnet)


@pytest.mark.slow
def test_a_convnet_of_timm_is_trained_and_loaded(convnet: Path) -> None:
    network = mpm.load(convnet)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(network.predict(images).sum(1), torch.ones(2))
    own = network.classifier.backbone.forward_head(
        network.classifier.backbone.forward_features(network.normalize(images / 255)), pre_logits=True
    )
    torch.testing.assert_close(network.features(images), own)
    assert json.loads((convnet / "result.json").read_text())["test"]["count"] == 64
    with pytest.raises(ValueError, match="is timm's test_resnet, whose weights have no place in a backbone"):
        read_trunk(convnet)


@pytest.mark.slow
def test_teachers_of_other_classes_are_refused(convnet: Path, tmp_path: Path) -> None:
    words = [*DISTILLED, *QUIET, TAUGHT % convnet, "data.train.classes=5"]
    with pytest.raises(ValueError, match="knows 4 classes, and the data has 5; give a teacher of these"):
        finetune(finetune_config(tmp_path, *words))


@pytest.mark.slow
def test_a_checkpoint_of_mpm_teaches_at_another_resolution(tmp_path: Path) -> None:
    """DeiT's fine-tuning at 384: the teacher is evaluated there, too."""
    few = ["optim.steps=2", "optim.warmup_steps=0", *QUIET]
    plain = ["distillation=null", *few]
    finetune(finetune_config(tmp_path / "teacher", *DISTILLED, *plain))
    taught = [TAUGHT % (tmp_path / "teacher"), *few]
    finetune(finetune_config(tmp_path / "larger", *DISTILLED, *taught, "data.image_size=48"))
    assert mpm.load(tmp_path / "larger").image_size == (48, 48)
    assert any("train/teacher_loss" in record for record in metrics(tmp_path / "larger"))
    odd = finetune_config(
        tmp_path / "odd", *DISTILLED, *taught, "backbone.patch_size=4", "data.image_size=44"
    )
    with pytest.raises(ValueError, match="image_size 44 is not a multiple of the teacher's patch_size 8"):
        finetune(odd)


@pytest.mark.slow
def test_cached_answers_are_those_of_the_teacher(convnet: Path, tmp_path: Path) -> None:
    """A run on them learns what it would have learned; RandAugment belongs to the crop."""
    words = [*DISTILLED, *QUIET, TAUGHT % convnet, "distillation.crops=1", "mixup=null", "optim.steps=14"]
    words.append("data.rand_augment=rand-m9-mstd0.5-inc1")
    cached = [*words, f"distillation.cache={tmp_path / 'answers'}"]
    with pytest.raises(FileNotFoundError, match=r"there are no cached answers at .*; run mpm teach CONFIG"):
        finetune(finetune_config(tmp_path / "cached", *cached))
    told = teach(finetune_config(tmp_path / "unused", *cached))
    assert "the teacher's answers to 256 crops" in told
    finetune(finetune_config(tmp_path / "asked", *words))
    finetune(finetune_config(tmp_path / "cached", *cached))
    for asked, read in zip(metrics(tmp_path / "asked"), metrics(tmp_path / "cached"), strict=True):
        assert read == pytest.approx(asked, rel=1e-4)  # the convnet's rounding differs with the batch
    with pytest.raises(
        ValueError, match=r"distillation\.cache .* was filled with data\.flip true, not false"
    ):
        finetune(finetune_config(tmp_path / "other", *cached, "data.flip=false"))
