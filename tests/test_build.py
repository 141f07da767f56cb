"""Every file under configs/ builds and runs at full size (on meta), with the published parameters."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from mpm import build, distributed, launch
from mpm.backbones.classifier import Classifier
from mpm.config import Backbone as BackboneConfig
from mpm.config import FinetuneConfig, PretrainConfig, TokenizerConfig
from mpm.configfile import load
from mpm.data.datasets import SyntheticImages
from mpm.inheritance import inherit
from mpm.objectives.masked import MaskedInputs, MaskedPrediction
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.patchify.masks import PatchMask
from mpm.patchify.pixels import Normalize
from mpm.trunk import Trunk
from tests.integration.settings import SCRATCH, finetune_config

ROOT = Path(__file__).parents[1] / "configs"
NAMES = [str(path.relative_to(ROOT).with_suffix("")) for path in sorted(ROOT.rglob("*.yaml"))]
CONVNET = "quickstart/fashion_mnist_finetune_teacher"  # of timm
FINETUNE = [name for name in NAMES if "finetune" in name and name != CONVNET]
TOKENIZERS = [name for name in NAMES if "tokenizer" in name]
PRETRAIN = [name for name in NAMES if "finetune" not in name and name not in TOKENIZERS]
CODES = 8192


@cache
def pretrain_config(name: str, *words: str) -> PretrainConfig:
    return load(ROOT / f"{name}.yaml", words, PretrainConfig).config


def masked_prediction(config: PretrainConfig) -> MaskedPrediction:
    moments = (0.5,) * config.data.channels
    with torch.device("meta"):
        if config.objective.target.kind == "codes":
            return build.objective(config, CODES)
        return build.objective(config, build.target(config, Normalize(moments, moments)).out_dim)


def fine_tuning_config(name: str, *words: str) -> FinetuneConfig:
    """With what it takes from the checkpoint it starts from, which another file or a published one makes."""
    config = load(ROOT / f"{name}.yaml", words, FinetuneConfig).config
    return inherit(config, trunk_for(config))


def trunk_for(config: FinetuneConfig) -> Trunk | None:
    """What it starts from, without weights; None: from scratch."""
    if config.init is None:
        return None
    for theirs in map(pretrain_config, PRETRAIN):
        if str(theirs.run.output_dir) == config.init.checkpoint:
            return trunk_of(theirs.backbone, theirs.data.image_size, theirs.data.channels)
    for other in FINETUNE:
        if folder_of(other) == config.init.checkpoint:
            before = fine_tuning_config(other)
            assert before.backbone is not None
            trunk = trunk_of(before.backbone, before.data.image_size, before.data.channels)
            return trunk._replace(readout=before.readout)
    assert config.backbone is not None
    assert Path(config.init.checkpoint).suffix == ".pth"
    return trunk_of(BackboneConfig(variant=config.backbone.variant), (224, 224), 3)


@cache
def folder_of(name: str) -> str:
    return str(load(ROOT / f"{name}.yaml", [], FinetuneConfig).config.run.output_dir)


def trunk_of(backbone: BackboneConfig, image_size: tuple[int, int], channels: int) -> Trunk:
    """Of a checkpoint without weights."""
    return Trunk(
        path=Path(),
        step=0,
        backbone=backbone,
        image_size=image_size,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        interpolation="bicubic",
        readout=None,
        classes=(),
        num_classes=0,
        state={},
    )


def classifier(name: str, num_classes: int, *words: str) -> tuple[Classifier, torch.Tensor]:
    """On meta, and a batch of images for it."""
    config = fine_tuning_config(name, *words)
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


UNLIKE_OTHERS = (
    "finetune/debug",
    "finetune/deit_in1k",
    "finetune/cait_in1k",
    "finetune/vitb_mae_linear_in1k",
)


@pytest.mark.parametrize(
    "name",
    [name if name in UNLIKE_OTHERS else pytest.param(name, marks=pytest.mark.slow) for name in FINETUNE],
)
def test_fine_tuning_builds_and_runs(name: str) -> None:
    network, images = classifier(name, num_classes=7)
    assert network(images).shape == (2, network.readout.num_vectors, 7)


def test_the_teacher_of_the_quickstart_builds_and_runs() -> None:
    config = load(ROOT / f"{CONVNET}.yaml", [], FinetuneConfig).config
    data = config.data
    with torch.device("meta"):
        network = build.timm_classifier(
            config.network, image_size=data.image_size, channels=data.channels, num_classes=10
        )
        assert network(torch.empty(2, data.channels, *data.image_size)).shape == (2, 1, 10)


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


# our class and distillation tokens carry their own position: a row less for each than DeiT and MAE count
SLOT = 768
CLASSIFIERS = [
    ("vitb_in1k", "", 86_567_656 - SLOT),
    ("vitl_mae_in1k", "", 304_325_608),
    ("vitl_mae_in1k", "init.checkpoint=runs/vith_mae", 630_764_800 + 1280 * 1000 + 1000 - 1280),
    ("vitb_mae_linear_in1k", "", 86_567_656 - SLOT),
    ("vitb_beit_in1k", "", 86_530_984),
    ("vitb_beit_in1k", "data.image_size=384", 86_744_104),
    ("vitl_beit_in1k", "", 304_430_568),
    ("vitb_beitv2_in1k", "", 86_530_984),
    ("vitl_beitv2_in1k", "", 304_430_568),
    ("vitb_simmim_in1k", "", 86_530_984),
    ("deit_in1k", "", 86_567_656 - SLOT),
    ("deit_in1k", "backbone.variant=deit_s", 22_050_664 - 384),
    ("deit_in1k", "backbone.variant=deit_ti", 5_717_416 - 192),
    ("deit_384_in1k", "", 86_859_496 - SLOT),
    ("deit_distilled_in1k", "", 87_338_192 - 2 * SLOT),
    ("deit_distilled_in1k", "backbone.variant=deit_s_distilled", 22_436_432 - 2 * 384),
    ("deit_distilled_in1k", "backbone.variant=deit_ti_distilled", 5_910_800 - 2 * 192),
    ("deit_distilled_384_in1k", "", 87_630_032 - 2 * SLOT),
    ("deit3_in1k", "data.image_size=224", 86_585_320),
    ("deit3_in1k", "backbone.variant=deit3_s data.image_size=224", 22_059_496),
    ("deit3_in1k", "backbone.variant=deit3_l data.image_size=224", 304_374_760),
    ("deit3_384_in1k", "", 86_877_160),
    ("deit3_in21k", "", 86_585_320),
    ("deit3_in21k_to_in1k", "", 86_585_320),
    ("cait_in1k", "", 46_916_200),
    ("cait_in1k", "backbone.variant=cait_m36", 270_929_512),
    ("cait_384_in1k", "", 47_062_120),
    ("cait_384_in1k", "data.image_size=448", 47_141_992),
    ("three_things_in1k", "", 86_566_888),
    ("three_things_in1k", "backbone.layer_scale=1e-4", 86_585_320),
    ("three_things_in1k", "backbone.stem.kind=hmlp", 86_726_248),
    ("three_things_in1k", "backbone.variant=vit_b_18x2", 256_675_816),
    ("three_things_in1k", "backbone.variant=vit_b_36x1 backbone.layer_scale=1e-4", 256_731_112),
    ("three_things_in1k", "backbone.variant=vit_s_18x2", 64_637_416),
]
QUICK_TO_BUILD = ("vitb_in1k", "vitb_beit_in1k")


@pytest.mark.parametrize(
    ("name", "words", "parameters"),
    [row if row[0] in QUICK_TO_BUILD else pytest.param(*row, marks=pytest.mark.slow) for row in CLASSIFIERS],
)
def test_a_recipes_network_has_the_published_number_of_parameters(
    name: str, words: str, parameters: int
) -> None:
    """With 1,000 classes, as their words in the header make it."""
    network, _ = classifier(f"finetune/{name}", 1000, *words.split())
    assert count(network) == parameters


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


@pytest.mark.parametrize(
    ("workers", "told"), [(2, "2 loader(s) a process"), (3, "3 loader(s) on 2 core(s) a process")]
)
def test_facts_tell_loaders_that_have_no_core(
    workers: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "available_cores", lambda: 2)
    config = load(ROOT / "debug.yaml", [f"run.workers={workers}"], PretrainConfig).config
    schedule = build.Schedule(config.optim, 256)
    facts = build.facts(config, schedule, num_images=256, device=torch.device("cpu"), start=0)
    assert facts["device"].endswith(f"thread(s) and {told}")


def test_processes_whose_share_mixup_cannot_pair_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(tmp_path, *SCRATCH, "optim.batch_size=6")
    images = SyntheticImages(16, image_size=(32, 32), channels=3, num_classes=2)
    data = config.data.model_copy(update={"mean": (0.5,) * 3})
    view = build.train_view(data, (32, 32))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="each of the 2 processes 3 images, and mixup pairs images; use 8"):
        build.training_loader(config, images, view, start=0, stop=1, pin_memory=False)


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
