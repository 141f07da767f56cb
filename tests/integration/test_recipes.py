"""Steps of every recipe of fine-tuning as it is written, on generated images of its size, with two blocks.

All but the number of blocks, the batch and the teacher (a small one with random weights) is the recipe's:
what is trained, eval mode, the norm before the heads, the average, a checkpoint of the kind it starts from.
"""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mpm import build
from mpm.backbones.classifier import Classifier
from mpm.backbones.initialization import initialize
from mpm.backbones.tuning import tune
from mpm.config import FinetuneConfig, TimmTeacher, TokenReadout
from mpm.configfile import load
from mpm.data.datasets import SyntheticImages
from mpm.distillation import read_teacher
from mpm.inheritance import has_fresh_readout, inherit, start_from, with_statistics
from mpm.patchify.norms import TokenBatchNorm
from mpm.patchify.pixels import Normalize
from mpm.training.ema import create_ema
from mpm.training.loop import train_steps
from mpm.trunk import Trunk
from tests.test_build import FINETUNE, ROOT, trunk_for

CPU = torch.device("cpu")
BATCH, STEPS = 2, 2
CLASSES = {
    "cifar10": 10,
    "cifar100": 100,
    "vitb_beit_cifar100": 100,
    "flowers102": 102,
    "stanford_cars": 196,
    "inat18": 8142,
    "deit3_in21k": 21_841,
}
TAUGHT = "distillation={kind: hard, through: class, teacher: {kind: timm}}"
MORE = [
    ("finetune/deit3_384_in1k", "tune=attention"),
    ("finetune/deit3_384_in1k", "tune=mlp"),
    ("finetune/cait_384_in1k", "tune=attention"),
    ("finetune/cait_in1k", TAUGHT),
    ("finetune/deit_in1k", "ema={decay: 0.99996}"),
    ("finetune/vitb_mae_linear_in1k", "ema={decay: 0.9}"),
]


class Prepared(NamedTuple):
    """A recipe before its first step.

    Attributes:
        config: with two blocks and a batch of two.
        network: what it trains.
        trunk: what it started from.
        classes: of the images.
    """

    config: FinetuneConfig
    network: Classifier
    trunk: Trunk | None
    classes: int


def with_weights(trunk: Trunk, num_classes: int) -> Trunk:
    """As a checkpoint holds it, of two blocks."""
    thin = trunk.backbone.model_copy(update={"depth": 2})
    written = Classifier(
        build.backbone(thin, image_size=trunk.image_size, channels=trunk.channels),
        build.readout(trunk.readout or TokenReadout(), thin),
        num_classes=num_classes,
    )
    initialize(written, "vit")
    for name, parameter in written.named_parameters():  # as after training, where LayerScale has grown
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    written.reset_heads()
    parts: dict[str, dict[str, Tensor]] = {
        part: written.get_submodule(part).state_dict() for part in ("backbone", "readout", "heads")
    }
    if trunk.readout is None:
        norm = written.readout.norm.state_dict()
        parts = {
            "backbone": parts["backbone"],
            "predictor": {f"norm.{name}": tensor for name, tensor in norm.items()},
            "readout": {},
            "heads": {},
        }
    known = num_classes if trunk.readout else 0
    return trunk._replace(backbone=thin, num_classes=known, state={"predictor": {}} | parts)


def prepared(name: str, *words: str) -> Prepared:
    """As `mpm.finetuning` does it."""
    config = load(ROOT / f"{name}.yaml", words, FinetuneConfig).config
    trunk = trunk_for(config)
    config = inherit(config, trunk)
    assert config.backbone is not None
    thin = config.backbone.model_copy(update={"depth": 2}).in_full(classifier=True)
    update: dict[str, Any] = {
        "backbone": thin,
        "optim": config.optim.model_copy(update={"batch_size": BATCH}),
        "run": config.run.model_copy(update={"workers": 0}),
    }
    if config.distillation is not None:
        teacher = TimmTeacher(kind="timm", model="test_resnet", random=True)
        update["distillation"] = config.distillation.model_copy(update={"teacher": teacher})
    config = config.model_copy(update=update)
    classes = CLASSES.get(name.rpartition("/")[2], 1000)
    size, channels = config.data.image_size, config.data.channels
    assert size is not None
    assert channels is not None
    network = build.classifier(config, thin, image_size=size, channels=channels, num_classes=classes)
    if trunk is not None:
        assert config.init is not None
        trunk = with_weights(trunk, CLASSES.get(Path(config.init.checkpoint).name, 1000))
    tune(network, config.tune, readout_too=has_fresh_readout(trunk, config), eval_mode=config.eval_mode)
    if trunk is not None:
        start_from(trunk, network, config, tuple(map(str, range(classes))))
    return Prepared(config, network, trunk, classes)


def is_trained(part: str, name: str) -> bool:
    """By names, as the released code has it."""
    kept = {
        "all": ("",),
        "attention": (".attn.", "positions", "relative_biases"),
        "mlp": (".mlp.", "positions"),
    }
    return name.startswith("heads") or any(word in name for word in kept.get(part, ()))


def learns(config: FinetuneConfig, name: str) -> bool:
    """Whether a statistic of a batch norm does: none in eval mode, nor one of a frozen trunk."""
    place = name.partition(".")[0]
    return "norm" in name and not config.eval_mode and (place == "head_norms" or config.tune == "all")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [*((name, None) for name in FINETUNE), *MORE], ids=str)
def test_a_recipe_takes_its_steps_as_it_is_written(name: str, words: str | None) -> None:
    config, network, trunk, classes = prepared(name, *([words] if words else []))
    size, channels = config.data.image_size, config.data.channels
    if trunk is not None and size == trunk.image_size:
        for key, tensor in trunk.weights_for(network.backbone, channels=channels).items():
            assert torch.equal(network.backbone.state_dict()[key], tensor), key
    images = SyntheticImages(4, image_size=size, channels=channels, num_classes=classes)
    taught = read_teacher(config, tuple(map(str, range(classes))))
    assert (taught is None) == (config.distillation is None)
    objective = build.supervised(config, network)
    ema = create_ema(objective, decay=config.ema.decay) if config.ema else None
    config, moments = with_statistics(config, images)
    before = copy.deepcopy(network.state_dict())
    averages = {f"classifier.{key}": p.detach().clone() for key, p in network.named_parameters()}
    reports = train_steps(
        objective,
        build.training_loader(
            config, images, build.train_view(config.data, size), start=0, stop=STEPS, pin_memory=False
        ),
        prepare=build.prepare_labelled(
            config,
            normalize=Normalize(*moments),
            num_classes=classes,
            device=CPU,
            teacher=taught.teacher if taught else None,
        ),
        optimizer=build.optimizer(config.optim, objective),
        lr_at=lambda step: config.optim.lr,
        start=0,
        stop=STEPS,
        clip_norm=config.optim.clip_norm,
        dtype=build.dtype(config.optim),
        ema=ema,
    )
    losses = []
    for report in reports:
        losses.append(report.loss.item())
        if taught is not None:
            assert report.metrics["teacher_loss"].isfinite()
        if ema is not None:
            assert config.ema is not None
            decay = config.ema.decay
            for key, parameter in objective.named_parameters():
                averages[key] = decay * averages[key] + (1 - decay) * parameter.detach()
    # heads start near 0: every class is as likely as any other, up to logits of deviation 0.02 * sqrt(768)
    is_binary = config.loss == "binary_cross_entropy"
    expected, apart = (math.log(2), 0.2) if is_binary else (math.log(classes), 1.5)
    assert losses[0] == pytest.approx(expected, abs=apart)
    after = network.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    learned = {key for key, _ in network.named_parameters() if is_trained(config.tune, key)}
    statistics = {key for key, _ in network.named_buffers() if learns(config, key)}
    assert moved == learned | statistics
    assert any("head_norms" in key for key in statistics) == (config.head_norm == "batch")
    still = {key for key, module in network.named_modules() if not module.training}
    assert still == expected_in_eval_mode(network, config)
    if ema is not None:
        for key, average in ema.module.named_parameters():
            torch.testing.assert_close(average.detach(), averages[key], rtol=1e-6, atol=1e-8)
        for key, buffer in ema.module.named_buffers():
            assert torch.equal(buffer, objective.get_buffer(key)), key


def expected_in_eval_mode(network: Classifier, config: FinetuneConfig) -> set[str]:
    """All of it; a backbone and a readout that nothing of is trained in; else batch norms that are frozen."""
    names = [name for name, _ in network.named_modules()]
    if config.eval_mode:
        return set(names)
    if config.tune == "all":
        return set()
    if config.tune == "head":
        return {name for name in names if name.partition(".")[0] in ("backbone", "readout")}
    trunk = [(name, module) for name, module in network.named_modules() if name.startswith("backbone")]
    norms = {name for name, module in trunk if isinstance(module, TokenBatchNorm)}
    readout = {name for name in names if name.partition(".")[0] == "readout"}
    return norms if config.readout.kind == "class_attention" else norms | readout
