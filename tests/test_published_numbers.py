"""Rates and scales of the recipes under configs/finetune against the released code's, step by step."""

import math
from typing import NamedTuple

import pytest

from mpm import build
from mpm.configfile import load
from tests.test_build import ROOT, FinetuneConfig, fine_tuning_config

IMAGES = 1_281_167


class Published(NamedTuple):
    """A column of a paper's table of fine-tuning."""

    lr: float
    layer_decay: float
    epochs: int
    warmup: int
    smallest: float
    batch: int
    depth: int


MASKED = {
    "vitb_beit_in1k": Published(4e-3, 0.65, 100, 20, 1e-6, 1024, 12),
    "vitl_beit_in1k": Published(1e-3, 0.75, 50, 5, 1e-6, 1024, 24),
    "vitb_beitv2_in1k": Published(5e-4, 0.6, 100, 20, 1e-6, 1024, 12),
    "vitl_beitv2_in1k": Published(2e-4, 0.8, 50, 5, 1e-6, 1024, 24),
    "vitb_in1k": Published(5e-4 * 1024 / 256, 0.65, 100, 5, 1e-6, 1024, 12),
    "vitl_mae_in1k": Published(1e-3 * 1024 / 256, 0.75, 50, 5, 1e-6, 1024, 24),
    "vitb_simmim_in1k": Published(1.25e-3 * 2048 / 512, 0.65, 100, 20, 2.5e-7 * 2048 / 512, 2048, 12),
    "vitb_mae_linear_in1k": Published(0.1 * 16384 / 256, 1.0, 90, 10, 0.0, 16384, 12),
}
SUPERVISED = {
    "deit_in1k": Published(5e-4 * 1024 / 512, 1.0, 300, 5, 1e-5, 1024, 12),
    "cait_in1k": Published(5e-4 * 1024 / 512, 1.0, 400, 5, 1e-5, 1024, 24),
    "deit3_in1k": Published(3e-3, 1.0, 800, 5, 1e-5, 2048, 12),
    "three_things_in1k": Published(3e-3, 1.0, 300, 5, 1e-5, 2048, 12),
    "inat18": Published(7.5e-5, 1.0, 360, 5, 1e-5, 768, 12),
}


def official_layer(name: str, depth: int) -> int:
    """`get_num_layer_for_vit` of BEiT's optim_factory.py, MAE's `get_layer_id_for_vit`."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return depth + 1


def official_name(name: str) -> str:
    """The part of ours that a parameter belongs to, as the released code calls it."""
    name = name.removeprefix("classifier.").removeprefix("backbone.")
    ours = {"stem": "patch_embed", "prefix_tokens": "cls_token", "positions": "pos_embed"}
    part, _, rest = name.partition(".")
    if part == "relative_biases":  # a table of each block
        return f"blocks.{rest.partition('.')[0]}.attn.relative_position_bias_table"
    return ours.get(part, name)


@pytest.mark.parametrize("name", MASKED)
def test_layers_learn_at_the_published_scales(name: str) -> None:
    """Of a network of the recipe's depth, made thin; scale = decay^(depth + 1 - layer)."""
    published, config = MASKED[name], fine_tuning_config(f"finetune/{name}")
    assert config.backbone is not None
    thin = config.backbone.model_copy(update={"dim": 8, "heads": 2, "mlp_ratio": 1.0})
    network = build.classifier(config, thin, image_size=config.data.image_size, channels=3, num_classes=3)
    optimizer = build.optimizer(config.optim, build.supervised(config, network))
    scales = {key: group["lr_scale"] for group in optimizer.param_groups for key in group["names"]}
    assert len(scales) == len(list(network.parameters()))
    for key, scale in scales.items():
        layer = official_layer(official_name(key), published.depth)
        expected = published.layer_decay ** (published.depth + 1 - layer)
        assert scale == pytest.approx(expected, rel=1e-12), key
    assert len(set(scales.values())) == (1 if published.layer_decay == 1 else published.depth + 2)


def schedule_of(name: str) -> build.Schedule:
    return build.Schedule(load(ROOT / f"finetune/{name}.yaml", [], FinetuneConfig).config.optim, IMAGES)


@pytest.mark.parametrize("name", [name for name in MASKED if "simmim" not in name])
def test_every_steps_rate_is_beits_and_maes(name: str) -> None:
    """BEiT's list and, after the warm-up, MAE's function of the fractional epoch."""
    published, schedule = MASKED[name], schedule_of(name)
    per_epoch = IMAGES // published.batch
    steps, warmup = published.epochs * per_epoch, published.warmup * per_epoch
    assert (schedule.steps, schedule.per_epoch) == (steps, per_epoch)
    for step in [*range(0, steps, 97), warmup - 1, warmup, steps - 1]:
        if step < warmup:
            expected = published.lr * step / (warmup - 1)
        else:
            epoch = step // per_epoch + step % per_epoch / per_epoch
            half = 1 + math.cos(math.pi * (epoch - published.warmup) / (published.epochs - published.warmup))
            expected = published.smallest + (published.lr - published.smallest) * 0.5 * half
        assert schedule.lr_at(step) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [*SUPERVISED, "vitb_simmim_in1k"])
def test_every_steps_rate_is_timms(name: str) -> None:
    """timm's cosine over the whole run, under a warm-up from 1e-6."""
    published, schedule = (SUPERVISED | MASKED)[name], schedule_of(name)
    per_epoch = schedule.per_epoch
    steps, warmup = published.epochs * per_epoch, published.warmup * per_epoch
    assert schedule.steps == steps
    for step in [*range(0, steps, 997), warmup - 1, warmup, steps - 1]:
        if step < warmup:
            expected = 1e-6 + (published.lr - 1e-6) * step / (warmup - 1)
        else:
            half = 1 + math.cos(math.pi * step / steps)
            expected = published.smallest + (published.lr - published.smallest) * 0.5 * half
        assert schedule.lr_at(step) == pytest.approx(expected, rel=1e-9)


def test_deit_at_384_is_constant_and_cait_halves_every_ten_epochs() -> None:
    deit3, cait = schedule_of("deit3_384_in1k"), schedule_of("cait_384_in1k")
    assert deit3.lr_at(0) == cait.lr_at(0) == 1e-6
    assert {deit3.lr_at(step) for step in range(5 * deit3.per_epoch, deit3.steps, 1000)} == {1e-5}
    for epoch in range(5, 60):
        assert cait.lr_at(epoch * cait.per_epoch) == pytest.approx(5e-6 * 0.5 ** (epoch // 10))


@pytest.mark.parametrize("name", [*MASKED, *SUPERVISED])
def test_a_recipe_states_the_published_batch_and_rate(name: str) -> None:
    published = (MASKED | SUPERVISED)[name]
    optim = load(ROOT / f"finetune/{name}.yaml", [], FinetuneConfig).config.optim
    assert (optim.batch_size, optim.layer_decay) == (published.batch, published.layer_decay)
    assert optim.lr == pytest.approx(published.lr)
