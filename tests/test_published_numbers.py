"""Recipes under configs/finetune against the papers and the released code, and their rates step by step."""

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from mpm import build
from mpm.configfile import load
from tests.published_recipes import OPEN, RECIPES
from tests.recipes import Cosine, recipe_of
from tests.test_build import FINETUNE, ROOT, FinetuneConfig, fine_tuning_config

IMAGES = 1_281_167
PUBLISHED = [name for name in FINETUNE if name.startswith("finetune/") and name != "finetune/debug"]
# blocks of those that learn at a rate for each layer, and of the probe
DEPTHS = {
    "vitb_beit_in1k": 12,
    "vitl_beit_in1k": 24,
    "vitb_beitv2_in1k": 12,
    "vitl_beitv2_in1k": 24,
    "vitb_in1k": 12,
    "vitl_mae_in1k": 24,
    "vitb_simmim_in1k": 12,
    "vitb_mae_linear_in1k": 12,
    "vitb_beit_cifar100": 12,
}


def cosines(over: str) -> list[str]:
    """Recipes whose half cosine is over these steps."""
    shapes = {name: recipe["schedule"] for name, recipe in RECIPES.items()}
    return [name for name, shape in shapes.items() if isinstance(shape, Cosine) and shape.over == over]


def same(found: object, expected: object) -> bool:
    """Numbers up to rounding."""
    if isinstance(expected, tuple) and isinstance(found, tuple):
        return (
            type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
        )
    return found == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_states_what_its_paper_states(name: str) -> None:
    """Every column, with what comes from the checkpoint and from the variant."""
    found, expected = recipe_of(fine_tuning_config(name)), RECIPES[name.removeprefix("finetune/")]
    assert found.keys() == expected.keys()
    columns = [key for key in expected if expected[key] is not OPEN]
    wrong = {key: (found[key], expected[key]) for key in columns if not same(found[key], expected[key])}
    assert not wrong, "found, expected"


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


def thin_optimizer(name: str) -> torch.optim.Optimizer:
    """Of a network of the recipe's depth, made thin."""
    config = fine_tuning_config(f"finetune/{name}")
    assert config.backbone is not None
    thin = config.backbone.model_copy(update={"dim": 8, "heads": 2, "mlp_ratio": 1.0})
    network = build.classifier(config, thin, image_size=config.data.image_size, channels=3, num_classes=3)
    optimizer = build.optimizer(config.optim, build.supervised(config, network))
    assert optimizer is not None
    assert sum(len(group["names"]) for group in optimizer.param_groups) == len(list(network.parameters()))
    return optimizer


@pytest.mark.parametrize("name", DEPTHS)
def test_layers_learn_at_the_published_scales(name: str) -> None:
    """scale = decay^(depth + 1 - layer)."""
    depth, decay = DEPTHS[name], RECIPES[name]["layer_decay"]
    scales = {key: group["lr_scale"] for group in thin_optimizer(name).param_groups for key in group["names"]}
    for key, scale in scales.items():
        expected = decay ** (depth + 1 - official_layer(official_name(key), depth))
        assert scale == pytest.approx(expected, rel=1e-12), key
    assert len(set(scales.values())) == (1 if decay == 1 else depth + 2)


def test_simmims_layers_end_at_a_rate_of_their_own_and_not_at_one_for_all() -> None:
    """timm's scheduler, as SimMIM builds it, tends to one `lr_min` in every group; the gap is below 1e-6."""
    recipe = RECIPES["vitb_simmim_in1k"]
    shape, scales = recipe["schedule"], [0.65**i for i in range(14)]
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": recipe["lr"] * scale} for scale in scales
    ]
    theirs = CosineLRScheduler(
        torch.optim.SGD(groups), t_initial=100, lr_min=shape.final, warmup_t=20, warmup_lr_init=shape.start
    )
    ours = build.Schedule(fine_tuning_config("finetune/vitb_simmim_in1k").optim, 2048)  # a step is an epoch
    assert ours.steps == 100
    gaps = []
    for step in range(20, 101):
        theirs.step(step)
        rates = [group["lr"] for group in theirs.optimizer.param_groups]
        lr = ours.lr_at(step)
        assert rates[0] == pytest.approx(lr)
        gaps.append([rate - lr * scale for rate, scale in zip(rates, scales, strict=True)])
    for last, scale in zip(gaps[-1], scales, strict=True):
        assert last == pytest.approx((1 - scale) * 1e-6, abs=1e-12)
    assert all(-1e-12 < gap < 1e-6 for step in gaps for gap in step)


def schedule_of(name: str) -> build.Schedule:
    return build.Schedule(load(ROOT / f"finetune/{name}.yaml", [], FinetuneConfig).config.optim, IMAGES)


@pytest.mark.parametrize("name", cosines("rest"))
def test_every_steps_rate_is_beits_and_maes(name: str) -> None:
    """BEiT's list and, after the warm-up, MAE's function of the fractional epoch; on ImageNet-1k."""
    published, schedule = RECIPES[name], schedule_of(name)
    peak, smallest, epochs = published["lr"], published["schedule"].final, published["epochs"]
    per_epoch = IMAGES // published["batch_size"]
    steps, warmup = epochs * per_epoch, published["warmup_epochs"] * per_epoch
    assert (schedule.steps, schedule.per_epoch) == (steps, per_epoch)
    for step in [*range(0, steps, 97), warmup - 1, warmup, steps - 1]:
        if step < warmup:
            expected = peak * step / (warmup - 1)
        else:
            epoch = step // per_epoch + step % per_epoch / per_epoch
            first = published["warmup_epochs"]
            half = 1 + math.cos(math.pi * (epoch - first) / (epochs - first))
            expected = smallest + (peak - smallest) * 0.5 * half
        assert schedule.lr_at(step) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", cosines("run"))
def test_every_steps_rate_is_timms(name: str) -> None:
    """timm's cosine over the whole run, under a warm-up from 1e-6; on ImageNet-1k."""
    published, schedule = RECIPES[name], schedule_of(name)
    peak, smallest = published["lr"], published["schedule"].final
    per_epoch = IMAGES // published["batch_size"]
    steps, warmup = published["epochs"] * per_epoch, published["warmup_epochs"] * per_epoch
    assert (schedule.steps, schedule.per_epoch) == (steps, per_epoch)
    for step in [*range(0, steps, 997), warmup - 1, warmup, steps - 1]:
        if step < warmup:
            expected = 1e-6 + (peak - 1e-6) * step / (warmup - 1)
        else:
            half = 1 + math.cos(math.pi * step / steps)
            expected = smallest + (peak - smallest) * 0.5 * half
        assert schedule.lr_at(step) == pytest.approx(expected, rel=1e-9)


def test_deit_at_384_is_constant_and_cait_halves_every_ten_epochs() -> None:
    deit3, cait = schedule_of("deit3_384_in1k"), schedule_of("cait_384_in1k")
    assert deit3.lr_at(0) == cait.lr_at(0) == 1e-6
    assert {deit3.lr_at(step) for step in range(5 * deit3.per_epoch, deit3.steps, 1000)} == {1e-5}
    for epoch in range(5, 60):
        assert cait.lr_at(epoch * cait.per_epoch) == pytest.approx(5e-6 * 0.5 ** (epoch // 10))
