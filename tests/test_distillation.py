"""Which teacher a configuration gets, and which are refused; nothing is downloaded."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from mpm.config import FinetuneConfig
from mpm.configfile import ConfigError, validate
from mpm.distillation import ReadTeacher, read_teacher
from tests.networks import randomize

CLASSES = ("cat", "dog", "emu")
SMALL = {"kind": "timm", "model": "test_resnet"}  # of 0.4 M parameters
UNTRAINED = {"kind": "timm", "model": "ghostnet_050"}  # timm has no weights of it


def config_of(teacher: dict[str, Any], *, kind: str = "hard", **changes: Any) -> FinetuneConfig:
    data = {"image_size": 32, "channels": 3, "train": {"kind": "synthetic"}}
    raw = {
        "run": {"output_dir": "unused"},
        "data": data | changes.pop("data", {}),
        "backbone": {"patch_size": 8, "dim": 16, "depth": 1, "heads": 2, "distillation_token": True},
        "readout": {"kind": "token"},
        "distillation": {"kind": kind, "teacher": teacher} | changes.pop("distillation", {}),
        "optim": {"steps": 1, "batch_size": 2, "lr": 1e-3, "dtype": "fp32"},
    }
    return validate(raw | changes, FinetuneConfig, name="test")


def read(teacher: dict[str, Any], classes: tuple[str, ...] = CLASSES, **changes: Any) -> ReadTeacher:
    taught = read_teacher(config_of(teacher, **changes), classes)
    assert taught is not None
    return taught


def test_the_papers_numbers_are_the_defaults() -> None:
    hard, soft = (config_of({"kind": "timm"}, kind=kind).distillation for kind in ("hard", "soft"))
    assert (hard.weight, hard.through, hard.teacher.model) == (0.5, "token", "regnety_160.deit_in1k")
    assert (soft.weight, soft.temperature, soft.reduction) == (0.1, 3.0, "batch_mean")
    assert not hard.teacher.random


def test_a_teacher_with_random_weights_must_be_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="timm gives no weights for ghostnet_050"):
        read(UNTRAINED)
    with caplog.at_level("WARNING", "mpm.distillation"):
        taught = read(SMALL | {"random": True})
    assert "random weights, as was asked for" in caplog.text
    images = torch.rand(2, 3, 32, 32)
    assert taught.teacher(images).shape == (2, 3)
    state = torch.get_rng_state()
    again = read(SMALL | {"random": True})
    assert again.identity == taught.identity  # drawn with the run's seed, so that it can be resumed
    assert torch.equal(torch.get_rng_state(), state)  # and the student's draws stay as without a teacher
    assert read(SMALL | {"random": True}, seed=1).identity != taught.identity
    with pytest.raises(ConfigError, match=r"random weights and weights .* are asked for; leave one out"):
        read(SMALL | {"random": True, "weights": "some.pth"})


def test_a_local_file_is_the_teacher(tmp_path: Path) -> None:
    network = randomize(timm.create_model("test_resnet", num_classes=3)).eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    taught = read(SMALL | {"weights": str(tmp_path / "teacher.pth"), "image_size": 48})
    images = torch.rand(2, 3, 32, 32)
    published = network.pretrained_cfg
    larger = F.interpolate(images, (48, 48), mode=published["interpolation"], antialias=True)
    mean, std = (torch.tensor(published[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(taught.teacher(images), network((larger - mean) / std))
    with pytest.raises(ValueError, match=r"timm gives no weights for test_resnet: .*size mismatch"):
        read(SMALL | {"weights": str(tmp_path / "teacher.pth")}, classes=("one", "two"))
    with pytest.raises(FileNotFoundError, match=r"distillation\.teacher.weights: there is no file"):
        read(SMALL | {"weights": str(tmp_path / "other.pth")})


def test_a_vit_of_timm_is_resampled_to_the_students_resolution() -> None:
    taught = read({"kind": "timm", "model": "test_vit", "random": True}, data={"image_size": [48, 32]})
    assert taught.teacher(torch.rand(1, 3, 48, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"distillation.teacher.image_size 40 is not a multiple of the"):
        read({"kind": "timm", "model": "test_vit", "random": True, "image_size": 40})


@pytest.mark.slow
def test_a_teacher_of_one_size_names_it() -> None:
    fixed = {"kind": "timm", "model": "cait_xxs24_224", "random": True}
    with pytest.raises(ValueError, match=r"takes images of 224x224 only, not 32x32; set .*=\[224, 224\]"):
        read(fixed)


def test_other_channels_are_refused() -> None:
    grey = {"channels": 1, "mean": [0.5], "std": [0.5]}
    read(SMALL | {"random": True}, data=grey)
    with pytest.raises(ValueError, match=r"takes 3 channel.*, and data.channels is 5; set .*=3, or 1"):
        read(SMALL | {"random": True}, data={"channels": 5, "mean": [0.5] * 5, "std": [0.5] * 5})


RULES: list[tuple[dict[str, Any], str]] = [
    (
        {"backbone": {"patch_size": 8, "dim": 16, "depth": 1, "heads": 2}},
        "set backbone.distillation_token to true, or through to class",
    ),
    ({"readout": {"kind": "class_attention"}}, "set readout.queries to 2, or through to class"),
    ({"readout": {"kind": "mean"}}, "readout.kind mean has one; set through to class"),
    ({"distillation": {"cache": "answers"}}, "crops is null; give it"),
    (
        {"distillation": {"cache": "answers", "crops": 2}, "mixup": {}},
        "mixup changes what the teacher sees of them anew each time; set mixup to null, or cache to null",
    ),
    ({"distillation": {"cache": "answers", "crops": 2}, "data": {"erasing": 0.1}}, "set data.erasing to 0"),
    ({"distillation": {"temperature": 2.0}}, "temperature"),  # hard has none
]


@pytest.mark.parametrize(("changes", "message"), RULES)
def test_what_does_not_fit_is_told_with_what_to_set(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of({"kind": "timm"}, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"readout": {"kind": "class_attention", "queries": 2}},
        {"readout": {"kind": "mean"}, "distillation": {"through": "class"}},
        {
            "distillation": {"cache": "answers", "crops": 2},
            "data": {"rand_augment": "rand-m9-mstd0.5-inc1"},  # drawn from the crop's own generator
        },
    ],
)
def test_what_fits_is_accepted(changes: dict[str, Any]) -> None:
    config_of({"kind": "timm"}, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "network is a whole classifier and takes no backbone"),
        ({"backbone": None, "readout": None, "distillation": None}, None),
        ({"backbone": None, "readout": None}, "and network has one; set through to class"),
        (
            {
                "backbone": None,
                "readout": None,
                "distillation": None,
                "optim": {"steps": 1, "batch_size": 2, "lr": 1e-3, "layer_decay": 0.5},
            },
            "optim.layer_decay 0.5 needs the layers of a backbone",
        ),
    ],
)
def test_a_whole_network_takes_no_parts(changes: dict[str, Any], message: str | None) -> None:
    raw = {"network": {"model": "test_resnet"}, **changes}
    if "distillation" in changes:
        base = config_of({"kind": "timm"}).model_dump(mode="json")
        given = base | raw
        if message is None:
            assert validate(given, FinetuneConfig, name="test").network is not None
            return
        with pytest.raises(ConfigError, match=message):
            validate(given, FinetuneConfig, name="test")
        return
    with pytest.raises(ConfigError, match=message):
        config_of({"kind": "timm"}, **raw)
