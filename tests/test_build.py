"""Every file under configs/ builds and runs at full size (on meta), with the published parameters."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from mpm import build
from mpm.backbones.classifier import Classifier
from mpm.config import FinetuneConfig, PretrainConfig, TokenizerConfig
from mpm.configfile import load
from mpm.inheritance import inherit
from mpm.network import Trunk
from mpm.objectives.masked import MaskedInputs, MaskedPrediction
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.patchify.masks import PatchMask
from mpm.patchify.pixels import Normalize

ROOT = Path(__file__).parents[1] / "configs"
NAMES = [str(path.relative_to(ROOT).with_suffix("")) for path in sorted(ROOT.rglob("*.yaml"))]
FINETUNE = [name for name in NAMES if "finetune" in name]
TOKENIZERS = [name for name in NAMES if "tokenizer" in name]
PRETRAIN = [name for name in NAMES if name not in FINETUNE and name not in TOKENIZERS]
CODES = 8192


def pretrain_config(name: str) -> PretrainConfig:
    return load(ROOT / f"{name}.yaml", [], PretrainConfig).config


def masked_prediction(config: PretrainConfig) -> MaskedPrediction:
    moments = (0.5,) * config.data.channels
    with torch.device("meta"):
        if config.objective.target.kind == "codes":
            return build.objective(config, CODES)
        return build.objective(config, build.target(config, Normalize(moments, moments)).out_dim)


def classifier(name: str, num_classes: int) -> tuple[Classifier, torch.Tensor]:
    """And a batch of images for it."""
    config = load(ROOT / f"{name}.yaml", [], FinetuneConfig).config
    assert config.init is not None
    (theirs,) = (
        pretrained
        for pretrained in map(pretrain_config, PRETRAIN)
        if str(pretrained.run.output_dir) == str(config.init.checkpoint)
    )
    data = theirs.data
    moments = (0.5,) * data.channels
    trunk = Trunk(
        path=Path(),
        step=0,
        backbone=theirs.backbone,
        image_size=data.image_size,
        channels=data.channels,
        mean=moments,
        std=moments,
        interpolation="bicubic",
        readout=None,
        classes=(),
        num_classes=0,
        state={},
    )
    config = inherit(config, trunk)
    assert config.backbone is not None
    size, channels = config.data.image_size, config.data.channels
    with torch.device("meta"):
        return (
            build.classifier(
                config, config.backbone, image_size=size, channels=channels, num_classes=num_classes
            ),
            torch.empty(2, channels, *size),
        )


LIKE_OTHERS = ("vitl_", "vith_", "vitb_18x2", "quickstart/clipart")
SOME = [
    pytest.param(name, marks=pytest.mark.slow) if name.startswith(LIKE_OTHERS) else name for name in PRETRAIN
]


@pytest.mark.parametrize("name", SOME)
def test_pretraining_builds_and_runs(name: str) -> None:
    config = pretrain_config(name)
    objective = masked_prediction(config)
    N, M = config.num_patches, config.num_masked
    with torch.device("meta"):
        mask = PatchMask(torch.empty(2, N - M, dtype=torch.int64), torch.empty(2, M, dtype=torch.int64))
        if config.objective.target.kind == "codes":
            targets = torch.empty(2, M, dtype=torch.int64)
        else:
            moments = (0.5,) * config.data.channels
            targets = torch.empty(2, M, build.target(config, Normalize(moments, moments)).out_dim)
        images = torch.empty(2, config.data.channels, *config.data.image_size)
        output = objective(MaskedInputs(images, mask, targets), torch.empty(()))
    assert output.loss.shape == ()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_builds_and_runs(name: str) -> None:
    config = load(ROOT / f"{name}.yaml", [], TokenizerConfig).config
    codes = config.objective.codes or CODES
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"codes": codes})})
    moments = (0.5,) * config.data.channels
    height, width = config.data.image_size
    with torch.device("meta"):
        tokenizer = build.tokenizer(config, Normalize(moments, moments))
        training = build.tokenizer_objective(config, tokenizer, feature_dim=12)
        images = torch.empty(2, config.data.channels, height, width)
        if config.objective.kind == "dvae":
            assert training(TokenizerInputs(images, None), torch.empty(())).loss.shape == ()
        else:
            places = (height // config.stride[0]) * (width // config.stride[1])
            # autocast, which VQ-KD's task layer is kept out of, does not know the meta device
            is_vqkd = config.objective.kind == "vqkd"
            vectors = tokenizer.backbone(images).patches if is_vqkd else tokenizer.vectors(images)
            assert vectors.shape[:2] == (2, places)
    assert tokenizer.vocab_size == codes


@pytest.mark.parametrize("name", FINETUNE)
def test_fine_tuning_builds_and_runs(name: str) -> None:
    network, images = classifier(name, num_classes=7)
    assert network(images).shape == (2, 1, 7)


def count(module: nn.Module) -> int:
    """Parameters, and fixed position tables, which the papers' code counts among them."""
    tables = [buffer for name, buffer in module.named_buffers() if name.endswith("positions.table")]
    return sum(tensor.numel() for tensor in [*module.parameters(), *tables])


@pytest.mark.parametrize(
    ("name", "whole", "encoder"),
    [
        ("vitb_mae", 111_907_840, 85_798_656),
        ("vitl_mae", 329_541_888, 303_301_632),
        ("vith_mae", 657_074_508, 630_764_800),
    ],
)
def test_mae_has_the_published_number_of_parameters(name: str, whole: int, encoder: int) -> None:
    """Of `models_mae.py`, whose position tables have a slot for the class token, zeros; ours have none."""
    objective = masked_prediction(pretrain_config(name))
    slot, decoder_slot = objective.backbone.dim, objective.predictor.mask_token.numel()
    assert count(objective.backbone) + count(objective.predictor.norm) + slot == encoder
    assert count(objective) + slot + decoder_slot == whole


def test_simmim_has_the_published_number_of_parameters() -> None:
    """Of `simmim.py` with its ViT-B, whose encoder holds the mask token and the norm."""
    objective = masked_prediction(pretrain_config("vitb_simmim"))
    head = count(objective.predictor.head)
    assert count(objective) - head == 85_666_128
    assert count(objective) == 86_256_720


def test_the_fine_tuned_vit_b_has_the_published_number_of_parameters() -> None:
    """timm's `vit_base_patch16_224` with 1,000 classes, less the position of the class token."""
    network, _ = classifier("finetune/vitb_in1k", num_classes=1000)
    assert count(network) == 86_567_656 - 768


@pytest.fixture
def _memory_is_nan() -> Iterator[None]:
    """What `torch.empty` gives is NaN, so that a number nobody sets is loud."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory, by default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_memory_is_nan")
@pytest.mark.parametrize("initialization", ["vit", "mae", "beit"])
@pytest.mark.parametrize("stem", ["linear", "hmlp", "conv"])
@pytest.mark.parametrize("predictor", ["linear", "decoder"])
def test_no_number_is_left_unset(predictor: str, stem: str, initialization: str) -> None:
    words = [
        f"objective.predictor.kind={predictor}",
        f"backbone.stem.kind={stem}",
        "backbone.layer_scale=0.1",
    ]
    words += [
        f"backbone.initialization={initialization}",
        "backbone.positions={table: learned, bias: shared}",
    ]
    config = load(ROOT / "debug.yaml", words, PretrainConfig).config
    objective = build.objective(config, out_dim=48)
    finetune = load(ROOT / "finetune" / "debug.yaml", [], FinetuneConfig).config
    network = build.classifier(finetune, config.backbone, image_size=(16, 24), channels=5, num_classes=7)
    for module in (objective, network):
        for name, tensor in module.state_dict().items():
            assert tensor.isfinite().all(), name


def test_tokens_positions_and_vectors_do_not_decay() -> None:
    """CaiT's class token is two-dimensional, and a token all the same."""
    words = ["init=null", "data.image_size=32", "backbone={variant: cait_xxs24, depth: 1}"]
    words += ["readout={kind: class_attention, queries: 2}"]
    config = load(ROOT / "finetune" / "debug.yaml", words, FinetuneConfig).config
    assert config.backbone is not None
    network = build.classifier(config, config.backbone, image_size=(32, 32), channels=3, num_classes=4)
    optimizer = build.optimizer(config.optim, build.supervised(config, network))
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["names"]}
    expected = {name for name, p in network.named_parameters() if p.ndim == 2 and "weight" in name}
    assert {name.removeprefix("classifier.") for name in decayed} == expected
