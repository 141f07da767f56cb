"""What tokenizers are trained on: networks of others, as teachers and as features."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from mpm import checkpoint
from mpm.pretraining import pretrain
from mpm.tokenization import read_tokenizer
from mpm.tokenizer_training import TokenizerTraining
from tests.integration.settings import pretrain_config, tokenizer_config
from tests.networks import randomize

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 192, "depth": 1, "num_heads": 3, "num_classes": 4}
TAUGHT = [
    "objective={kind: vqkd, codes: 16, code_dim: 4, teacher: {kind: network, checkpoint: '%s'}}",
    "backbone={patch_size: 4, dim: 12, depth: 1, heads: 3}",
    "data.image_size=16",
    "optim.lr=1e-2",
    "optim.steps=4",
]


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def taught_by(teacher: str, *words: str) -> list[str]:
    return [TAUGHT[0] % teacher, *TAUGHT[1:], *words]


def teacher_folder(folder: Path, *, mean: tuple[float, ...] = (0.4, 0.5, 0.6), **options: Any) -> str:
    """A tiny ViT of timm by its name."""
    folder.mkdir(exist_ok=True)
    network = randomize(VisionTransformer(**SIZES, **options))
    save_file(network.state_dict(), folder / "model.safetensors")
    facts = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "model_args": SIZES | options}
    pretrained_cfg = {"input_size": [3, 16, 16], "num_classes": 4, "mean": mean}
    (folder / "config.json").write_text(json.dumps(facts | {"pretrained_cfg": pretrained_cfg}))
    return f"timm:local-dir:{folder}"


# Teachers


@pytest.mark.parametrize("kind", ["timm", "run"])
@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_teacher_computes_in_the_precision_of_the_run(
    kind: str, dtype: str, expected: torch.dtype, tmp_path: Path
) -> None:
    teacher = teacher_folder(tmp_path / "teacher")
    if kind == "run":
        teacher = str(tmp_path / "network")
        pretrain(pretrain_config(tmp_path / "network", "optim.steps=1", "optim.warmup_steps=0"))
    words = taught_by(teacher, f"optim.dtype={dtype}")
    experiment = TokenizerTraining(tokenizer_config(tmp_path / "run", *words))
    prepare: Any = experiment.create(torch.device("cpu"), is_new=True).prepare
    assert prepare._teacher.dtype == expected


def test_file_of_a_teacher_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm 1.0.22 loads with weights_only=False."""
    teacher = teacher_folder(tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    torch.save({"x": Shell(f"touch {tmp_path / 'ran'}")}, tmp_path / "teacher" / "pytorch_model.bin")
    builder = timm.models._builder
    loader = functools.partial(builder.load_state_dict_from_path, weights_only=False)
    monkeypatch.setattr(builder, "load_state_dict_from_path", loader)
    with pytest.raises(ValueError, match="would run code, and mpm reads plain tensors only"):
        TokenizerTraining(tokenizer_config(tmp_path / "run", *taught_by(teacher)))
    assert not (tmp_path / "ran").exists()


def test_unknown_teacher_is_told_with_near_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights for resnet5O.*did you mean resnet50 or ") as error:
        TokenizerTraining(tokenizer_config(tmp_path, *taught_by("timm:resnet5O")))
    assert "\n" not in str(error.value)


def test_teacher_that_cannot_be_fetched_is_told_with_those_that_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    told = (
        r"no weights for test_vit: they are not on this .*; objective\.teacher\.kind=hog and pixels need no"
    )
    with pytest.raises(ValueError, match=told):
        TokenizerTraining(tokenizer_config(tmp_path, *taught_by("timm:test_vit")))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_have_the_teachers_channels_or_are_grey(channels: int, tmp_path: Path) -> None:
    teacher = teacher_folder(tmp_path / "teacher")
    numbers = [0.5] * channels
    words = [f"data.channels={channels}", f"data.mean={numbers}", f"data.std={numbers}"]
    config = tokenizer_config(tmp_path / "run", *taught_by(teacher, *words))
    if channels == 2:
        told = r"takes 3 channel\(s\), and data.channels is 2; set data.channels=3, or 1: grey images are"
        with pytest.raises(ValueError, match=told):
            TokenizerTraining(config)
    else:
        prepare: Any = TokenizerTraining(config).create(torch.device("cpu"), is_new=True).prepare
        assert prepare._teacher(torch.rand(2, channels, 16, 16)).shape == (2, 16, 192)


@pytest.mark.parametrize(
    ("channels", "mean", "fitting"),
    [
        (1, (0.4, 0.5, 0.6), (0.5,)),
        (1, (0.4,), (0.4,)),
        (3, (0.4,), (0.4, 0.4, 0.4)),
    ],
    ids=str,
)
def test_mean_of_other_channels_than_the_teachers_is_averaged(
    channels: int, mean: tuple[float, ...], fitting: tuple[float, ...], tmp_path: Path
) -> None:
    """timm keeps what was published of 3 channels where a network was made for one."""
    source = teacher_folder(tmp_path / "teacher", mean=mean, in_chans=channels)
    numbers = [0.5] * channels
    words = [f"data.channels={channels}", f"data.mean={numbers}", f"data.std={numbers}"]
    config = tokenizer_config(tmp_path / "run", *taught_by(source, *words))
    prepare: Any = TokenizerTraining(config).create(torch.device("cpu"), is_new=True).prepare
    teacher = prepare._teacher
    assert teacher.channels == channels
    images = torch.rand(2, channels, 16, 16)
    network = timm.create_model(source.removeprefix("timm:"), pretrained=True).eval()
    normal = (images - torch.tensor(fitting)[:, None, None]) / teacher.normalize.std
    torch.testing.assert_close(teacher(images), network.forward_features(normal)[:, 1:])
    five = ["data.channels=5", "data.mean=measured", "data.std=measured"]
    with pytest.raises(ValueError, match=rf"takes {channels} channel\(s\), and data.channels is 5"):
        TokenizerTraining(tokenizer_config(tmp_path / "run", *taught_by(source, *five)))


@pytest.mark.parametrize("kind", ["timm", "run"])
def test_identity_is_that_of_the_teachers_weights_before_they_are_resampled(
    kind: str, tmp_path: Path
) -> None:
    teachers = []
    for name in ("one", "other"):
        if kind == "timm":
            teachers.append(teacher_folder(tmp_path / name))
        else:
            seed = f"seed={len(name)}"
            pretrain(pretrain_config(tmp_path / name, seed, "optim.steps=1", "optim.warmup_steps=0"))
            teachers.append(str(tmp_path / name))
    one, larger, other = (
        TokenizerTraining(tokenizer_config(tmp_path / "run", *taught_by(teacher, f"data.image_size={side}")))
        for teacher, side in ((teachers[0], 16), (teachers[0], 24), (teachers[1], 16))
    )
    assert one.identity == larger.identity != other.identity
    assert len(one.identity["objective.teacher.checkpoint"]) == 64


def test_without_a_network_that_teaches_there_is_nothing_to_remember(tmp_path: Path) -> None:
    words = [*taught_by(""), "objective.teacher={kind: hog}"]
    assert TokenizerTraining(tokenizer_config(tmp_path, *words)).identity == {}
    assert TokenizerTraining(tokenizer_config(tmp_path)).identity == {}


def test_run_is_not_continued_with_another_teacher(tmp_path: Path) -> None:
    teacher = teacher_folder(tmp_path / "teacher")
    config = tokenizer_config(tmp_path / "run", *taught_by(teacher))
    pretrain(config, stop_after=2)
    weights = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    torch.manual_seed(1)  # the run has set it to 0
    teacher_folder(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"^objective\.teacher\.checkpoint .* has other weights than when"):
        pretrain(config)
    (tmp_path / "teacher" / "model.safetensors").write_bytes(weights)
    pretrain(config)
    assert checkpoint.load(tmp_path / "run").step == 4


# Codes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.count=20", "objective.codes=128"], "128, 8x8 for an image"),
        (
            ["data.count=20", "objective.codes=129"],
            "129, 8x8 for an image; that is more than 10% of the 1,280 patches there are, "
            "objective.codes=null would take 32",
        ),
        (["data.count=1", "objective.codes=null"], "32, 8x8 for an image"),
    ],
)
def test_more_codes_than_the_images_can_tell_apart_are_told(
    words: list[str], told: str, tmp_path: Path
) -> None:
    training = TokenizerTraining(tokenizer_config(tmp_path, *words))
    assert training.create(torch.device("cpu"), is_new=True).facts["codes"] == told


# Features


def test_features_of_a_network_that_norms_no_patches_are_standardised(tmp_path: Path) -> None:
    """A mean readout norms the mean."""
    network = teacher_folder(tmp_path / "network", global_pool="avg")
    words = [
        f"objective={{kind: kmeans, codes: 8, input: {{kind: features, network: '{network}'}}}}",
        "data.image_size=16",
        "optim.steps=2",
    ]
    pretrain(tokenizer_config(tmp_path / "run", *words))
    tokenizer: Any = read_tokenizer(tmp_path / "run")
    images = torch.rand(2, 3, 16, 16)
    tokens = tokenizer.backbone(tokenizer.normalize(images)).patches
    torch.testing.assert_close(tokenizer.vectors(images), F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6))
