"""The rules of a configuration, each with what it says when it is broken."""

import copy
import subprocess
import sys
from typing import Any

import pytest

from mpm import launch
from mpm.config import (
    Backbone,
    ConvStem,
    FinetuneConfig,
    HMLPStem,
    LinearStem,
    Positions,
    PretrainConfig,
    Section,
)
from mpm.configfile import ConfigError, validate
from mpm.variants import VARIANTS

PRETRAIN: dict[str, Any] = {
    "run": {"output_dir": "runs/test"},
    "data": {"kind": "synthetic", "image_size": 224},
    "mask": {"kind": "random", "ratio": 0.75},
    "backbone": {"variant": "vit_b"},
    "objective": {"kind": "masked", "predictor": {"kind": "linear"}, "target": {"kind": "pixels"}},
    "optim": {"epochs": 10, "batch_size": 4096, "lr": 1e-3},
}
FINETUNE: dict[str, Any] = {
    "run": {"output_dir": "runs/test"},
    "data": {"image_size": 224, "train": {"kind": "synthetic"}},
    "backbone": {"variant": "vit_b"},
    "readout": {"kind": "mean"},
    "optim": {"epochs": 10, "batch_size": 1024, "lr": 1e-3},
}


def build(base: dict[str, Any], **changes: Any) -> Any:
    """The configuration with changes, `data__mean` standing for data.mean."""
    raw = copy.deepcopy(base)
    for key, value in changes.items():
        *above, last = key.split("__")
        node = raw
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    model = PretrainConfig if base is PRETRAIN else FinetuneConfig
    return validate(raw, model, name="test")


def message(base: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(base, **changes)
    return str(caught.value)


def test_configuration_is_checked_without_heavy_imports() -> None:
    code = (
        "import sys, mpm.config, mpm.configfile, mpm.variants\n"
        "print([m for m in ('torch', 'numpy', 'timm', 'torchvision') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("mask", "masked"),
    [
        ({"kind": "random", "ratio": 0.75}, 147),  # MAE
        ({"kind": "random", "ratio": 0.6, "unit": 2}, 120),  # SimMIM: ceil(.6 * 49) units of 4
        ({"kind": "block", "count": 75}, 75),  # BEiT
        ({"kind": "random", "count": 1}, 1),
        ({"kind": "random", "ratio": 0.5}, 98),
    ],
)
def test_number_of_masked_patches_is_the_published_one(mask: dict[str, Any], masked: int) -> None:
    config = build(PRETRAIN, mask=mask)
    assert (config.grid, config.num_patches, config.num_masked) == ((14, 14), 196, masked)


def test_ratio_is_not_rounded_up_by_floating_point() -> None:
    assert (
        build(PRETRAIN, data__image_size=[16 * 5, 16], mask={"kind": "random", "ratio": 0.6}).num_masked == 3
    )


@pytest.mark.parametrize(("cores", "processes", "workers"), [(2, 1, 2), (16, 1, 8), (16, 4, 4), (2, 4, 1)])
def test_there_are_no_more_loaders_than_cores_unless_they_are_asked_for(
    cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert build(PRETRAIN).run.workers == workers
    assert build(PRETRAIN, run__workers=9).run.workers == 9


def test_grid_of_an_oblong_image() -> None:
    config = build(PRETRAIN, data__image_size=[64, 96], backbone__patch_size=[8, 16])
    assert config.grid == (8, 6)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_consistent_and_a_key_replaces_its_own(name: str) -> None:
    published = VARIANTS[name].architecture._replace(stem=LinearStem().model_dump())
    assert Backbone(variant=name).resolved() == published
    changed = Backbone(variant=name, depth=3, layer_scale="none", class_token=False, drop_path=0.0)
    changes = {"depth": 3, "layer_scale": None, "class_token": False, "drop_path": 0.0}
    assert changed.resolved() == published._replace(**changes)


@pytest.mark.parametrize(("name", "same_sizes"), [("vit_b_18x2", "deit_b"), ("vit_s_60x1", "deit_s")])
def test_any_number_of_parallel_blocks_has_a_name(name: str, same_sizes: str) -> None:
    depth, branches = map(int, name.rpartition("_")[2].split("x"))
    ours, theirs = Backbone(variant=name).resolved(), Backbone(variant=same_sizes).resolved()
    assert ours[:2] == theirs[:2]  # patch size and width
    assert (ours.depth, ours.branches, ours.heads) == (depth, branches, theirs.heads)


def test_a_position_key_replaces_its_own_and_leaves_the_other_to_the_variant() -> None:
    trunk = Backbone(variant="beit_b", positions=Positions(table="learned")).resolved()
    assert trunk.positions == {"table": "learned", "bias": "shared"}


def test_sizes_need_no_variant() -> None:
    trunk = Backbone(patch_size=(4, 4), dim=128, depth=6, heads=4).resolved()
    assert trunk[:5] == ((4, 4), 128, 6, 4, 4.0)
    assert (trunk.branches, trunk.attention, trunk.layer_scale, trunk.class_token) == (
        1,
        "softmax",
        None,
        True,
    )


PRETRAIN_RULES = [
    ({"backbone__patch_size": 15}, "image_size 224 is not a multiple of patch_size 15; use 210 or 225"),
    ({"backbone__patch_size": 300}, "image_size 224 is not a multiple of patch_size 300; use 300"),
    (
        {"data__image_size": [224, 220]},
        "image_size (width) 220 is not a multiple of patch_size (width) 16; use 208 or 224",
    ),
    ({"mask__ratio": 1.0}, "mask.ratio 1 hides all of 196 patches; use more than 0 and at most 0.994"),
    ({"mask__ratio": 0.0}, "mask.ratio 0 hides nothing of 196 patches; use more than 0 and at most 0.994"),
    ({"mask": {"kind": "random", "count": 196}}, "mask.count 196 hides all of 196 patches; use 1 to 195"),
    ({"mask": {"kind": "block", "count": 0}}, "mask.count 0 hides nothing of 196 patches; use 1 to 195"),
    ({"mask__unit": 4}, "mask.unit 4 does not divide the grid 14x14; use one of [1, 2, 7]"),
    ({"mask__unit": 14}, "mask.ratio 0.75 hides all or nothing of 1 masking unit; use a smaller mask.unit"),
    (
        {"mask": {"kind": "random", "count": 75, "unit": 2}},
        "mask.count 75 is not whole units of 4 patches; use 72 or 76",
    ),
    ({"mask__count": 75}, "mask: ratio 0.75 and count 75 are given; give exactly one"),
    ({"mask": {"kind": "random"}}, "mask: ratio None and count None are given; give exactly one"),
    (
        {"mask": {"kind": "block", "count": 10}},
        "mask.min_area 16 is above the 10 patches to hide; use 1 to 10",
    ),
    ({"backbone__dim": 770}, "backbone: dim 770 is not a multiple of heads 12; use 768 or 780"),
    (
        {"backbone": {"variant": "vit_b", "dim": 6, "heads": 1, "positions": {"table": "sincos"}}},
        "backbone: dim 6 is not a multiple of 4, which sincos positions need; use 4 or 8",
    ),
    (
        {"backbone": {"variant": "vit_b", "dim": 6, "heads": 1, "stem": {"kind": "hmlp"}}},
        "backbone: dim 6 is not a multiple of 4, which the hmlp stem needs; use 4 or 8",
    ),
    (
        {"backbone__patch_size": [16, 8], "backbone__stem": {"kind": "hmlp"}},
        "the hmlp stem needs square patches; use patch_size 16 or 8",
    ),
    (
        {"backbone__patch_size": 14, "backbone__stem": {"kind": "conv"}},
        "patch_size 14 is no power of two, which the conv stem needs; use 2, 4, 8, 16 or 32",
    ),
    (
        {"backbone": {"variant": "vit_b", "dim": 12, "stem": {"kind": "conv"}}},
        "dim 12 is not a multiple of 8, which a conv stem of patch_size 16 needs; use 8 or 16",
    ),
    ({"backbone": {"dim": 8}}, "backbone.patch_size is required without a variant"),
    ({"backbone__variant": "vit_x"}, 'variant "vit_x" is unknown; did you mean vit_s or'),
    (
        {"objective__predictor": {"kind": "decoder", "dim": 100, "heads": 16}},
        "dim 100 is not a multiple of heads 16; use 96 or 112",
    ),
    (
        {"objective__predictor": {"kind": "decoder", "dim": 6, "heads": 1}},
        "dim 6 is not a multiple of 4, which sincos positions need; use 4 or 8",
    ),
    ({"data__channels": 1}, "data.mean is null, so ImageNet's, which is for 3 channels, not 1; use measured"),
    ({"data__mean": [0.5, 0.5]}, "mean has 2 numbers for 3 channels; give 3"),
    ({"data__std": [0.5, 0.5, 0.0]}, "std [0.5, 0.5, 0.0] must be greater than 0 everywhere"),
    ({"data__crop_scale": [0.2, 1.5]}, "crop_scale [0.2, 1.5] is a share of the image's area; use at most 1"),
    ({"data__crop_scale": [1.0, 0.2]}, "[1.0, 0.2] does not ascend; use [0.2, 1]"),
    ({"optim__steps": 5}, "optim: epochs 10.0 and steps 5 are given; give exactly one"),
    ({"optim__warmup_epochs": 10}, "warmup_epochs 10 is not below epochs 10; use less"),
    (
        {"optim": {"steps": 5, "warmup_steps": 5, "batch_size": 2, "lr": 1.0}},
        "warmup_steps 5 is not below steps 5; use less",
    ),
    (
        {"optim__warmup_epochs": 1, "optim__warmup_steps": 5},
        "warmup_epochs 1 and warmup_steps 5 given; give one",
    ),
    (
        {"optim__schedule": {"kind": "cosine", "final": 0.1}},
        "schedule.final 0.1 is above the peak rate lr 0.001; use less",
    ),
    (
        {"optim__schedule": {"kind": "multistep", "milestones": [9, 12]}},
        "schedule.milestones [9.0, 12.0] must ascend, from the end of the warm-up (epoch 0) to before",
    ),
    ({"run__micro_batch": 48}, "run.micro_batch 48 does not divide batch_size 4096; use 32 or 64"),
    ({"run__micro_batch": 8192}, "run.micro_batch 8192 does not divide batch_size 4096; use 4096"),
    (
        {"monitor__train": {"kind": "synthetic"}},
        "monitor: test is null; give both train and test, or none",
    ),
]


@pytest.mark.parametrize(("changes", "text"), PRETRAIN_RULES, ids=[text[:50] for _, text in PRETRAIN_RULES])
def test_pretraining_rule_says_what_to_do_in_one_line(changes: dict[str, Any], text: str) -> None:
    line = message(PRETRAIN, **changes)
    assert text in line
    assert "\n" not in line


FINETUNE_RULES = [
    ({"backbone": None}, "backbone is null; give it, or init.checkpoint to fine-tune"),
    ({"data__image_size": None}, "data.image_size is null; give it, or init.checkpoint"),
    ({"data__image_size": 100}, "image_size 100 is not a multiple of patch_size 16; use 96 or 112"),
    ({"backbone": {"drop_path": 0.1}}, "backbone.patch_size is required without a variant"),
    ({"data__channels": 2}, "data.mean is null, so ImageNet's, which is for 3 channels, not 2"),
    ({"readout__kind": "token", "backbone__class_token": False}, "readout.kind token reads the class token"),
    ({"loss": "binary_cross_entropy"}, "loss binary_cross_entropy takes no label_smoothing; set 0.1 to 0"),
    ({"mixup": {"alpha": 0.0, "cutmix": 0.0}}, "mixup: alpha 0 and cutmix 0 mix nothing"),
    ({"mixup": {}, "optim__batch_size": 5}, "optim.batch_size 5 is odd, and mixup pairs images; use 6"),
    ({"mixup": {}, "run__micro_batch": 1}, "run.micro_batch 1 is odd, and mixup pairs images; use 2"),
    ({"eval_mode": True, "head_norm": "batch"}, "eval_mode keeps every batch norm from learning"),
    (
        {"backbone": None, "readout": None, "network": {"model": "resnet18"}, "tune": "head"},
        "set tune to all",
    ),
    (
        {
            "data__repeats": 3,
            "distillation": {"kind": "hard", "through": "class", "crops": 2, "teacher": {"kind": "timm"}},
        },
        "data.repeats 3 would show the same crop again in a batch, as distillation.crops is 2",
    ),
    ({"labels": {}}, "labels: count None and fraction None are given; give exactly one"),
    ({"data__rand_augment": "m9"}, 'rand_augment "m9" does not begin with rand'),
    (
        {
            "data__rand_augment": "rand-m9",
            "data__channels": 2,
            "data__mean": "measured",
            "data__std": "measured",
        },
        "rand_augment needs 1 or 3 channels, not 2; set rand_augment to null",
    ),
    ({"data__rand_augment": "rand-m9", "data__color_jitter": 0.4}, "rand_augment replaces color_jitter 0.4"),
    (
        {"data__rand_augment": "rand-m9", "data__three_augment": True},
        "rand_augment and three_augment take each other's place; set rand_augment to null, or three_augment",
    ),
    (
        {"data__three_augment": True, "data__channels": 2, "data__mean": "measured", "data__std": "measured"},
        "three_augment needs 1 or 3 channels, not 2; set three_augment to false",
    ),
    (
        {"data__crop": "simple", "data__crop_scale": [0.2, 1.0]},
        "crop simple has no crop_scale; leave out [0.2, 1.0]",
    ),
    (
        {"optim__momentum": 0.9},
        "unknown key optim.momentum in test; kind adamw does not have it, only lars and sgd",
    ),
    (
        {"optim__kind": "sgd", "optim__betas": [0.9, 0.95]},
        "unknown key optim.betas in test; kind sgd does not have it, only adamw and lamb",
    ),
    (
        {"optim__kind": "lars", "optim__nesterov": True},
        "unknown key optim.nesterov in test; kind lars does not have it, only sgd",
    ),
    ({"optim__kind": "sgd", "optim__nesterov": True, "optim__momentum": 0.0}, "set nesterov to false"),
    ({"optim__kind": "adam"}, 'optim.kind is "adam", expected one of adamw, lamb, lars, sgd'),
    (
        {"optim__schedule": {"kind": "constant", "start": 0.1}},
        "schedule.start 0.1 is above the peak rate lr 0.001; use less",
    ),
]


@pytest.mark.parametrize(("changes", "text"), FINETUNE_RULES, ids=[text[:50] for _, text in FINETUNE_RULES])
def test_finetuning_rule_says_what_to_do_in_one_line(changes: dict[str, Any], text: str) -> None:
    line = message(FINETUNE, **changes)
    assert text in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optim__lr": "fast"}, 'optim.lr is "fast", expected a number'),
        ({"optim__lr": True}, "optim.lr is true, expected a number"),
        ({"optim__lr": "1e-4"}, 'optim.lr is "1e-4", expected a number'),
        ({"optim__lr": float("nan")}, "optim.lr is NaN, expected a finite number"),
        ({"optim__lr": -1.0}, "optim.lr is -1.0, must be greater than 0"),
        ({"optim__batch_size": 2.5}, "optim.batch_size is 2.5, expected a whole number"),
        ({"data__flip": 1}, "data.flip is 1, expected true or false"),
        ({"data__image_size": "224"}, "data.image_size: '224' is neither a whole number nor [height, width]"),
        ({"data__image_size": [224]}, "data.image_size[1] is missing; give one more value"),
        ({"data__image_size": [1, 2, 3]}, "data.image_size has 3 values; give 2"),
        ({"data__image_size": [224, 0]}, "data.image_size[1] is 0, must be greater than or equal to 1"),
        (
            {"data__mean": "image"},
            'data.mean is "image", expected imagenet or inception or measured or a list',
        ),
        ({"data__mean": [1, "a", 2]}, 'data.mean[1] is "a", expected a number'),
        ({"run__compile": 1}, "run.compile is 1, expected auto or true or false"),
        ({"run__output_dir": 5}, "run.output_dir is 5, expected a path"),
        ({"optim": None}, "optim is null, expected a mapping of keys"),
        ({"mask__kind": "blok"}, 'mask.kind is "blok", expected one of random, block'),
        ({"mask": {"ratio": 0.5}}, "mask.kind is required; use one of random, block"),
        ({"backbone__qkv_bias": "q"}, 'backbone.qkv_bias is "q", expected all or query_value or none'),
    ],
)
def test_wrong_type_names_key_value_and_expectation(changes: dict[str, Any], text: str) -> None:
    assert message(PRETRAIN, **changes) == f"test: {text}"


@pytest.mark.parametrize("section", ["run", "data", "mask", "backbone", "objective", "optim"])
def test_missing_section_is_named(section: str) -> None:
    raw = {key: value for key, value in PRETRAIN.items() if key != section}
    with pytest.raises(ConfigError, match=f"test: {section} is required"):
        validate(raw, PretrainConfig, name="test")


def test_backbone_over_a_checkpoints_takes_only_its_drop_path() -> None:
    checkpoint = Backbone(variant="vit_b", stem=HMLPStem())
    assert Backbone(drop_path=0.2).over(checkpoint) == checkpoint.model_copy(update={"drop_path": 0.2})
    sizes = Backbone(patch_size=(16, 16), dim=768, depth=12, heads=12)
    assert sizes.over(checkpoint) == checkpoint
    with pytest.raises(ValueError, match=r"backbone\.stem .*is not the checkpoint's.*; leave it out"):
        Backbone(stem=ConvStem()).over(checkpoint)
    with pytest.raises(ValueError, match=r"backbone\.variant vit_l has depth 24, the checkpoint 12"):
        Backbone(variant="vit_l", dim=768, heads=12).over(checkpoint)


def test_finetuning_inherits_what_it_does_not_state() -> None:
    init = {"checkpoint": "runs/x"}
    whole = build(FINETUNE, init=init, backbone=None)
    assert whole.inherited == {"data.channels", "data.mean", "data.std", "backbone"}
    part = build(FINETUNE, init=init, backbone={"drop_path": 0.1}, data__channels=3, data__mean="measured")
    assert "backbone.stem" in part.inherited
    assert not part.inherited & {"backbone.drop_path", "data.channels", "data.mean"}
    assert build(FINETUNE).inherited == frozenset()


def sections(model: type[Section], seen: set[type[Section]]) -> set[type[Section]]:
    from mpm.config.schema import field_sections

    seen.add(model)
    for key in model.model_fields:
        for below in field_sections([model], key):
            sections(below, seen)
    return seen


@pytest.mark.parametrize(("kind", "eps"), [(None, 1e-8), ("adamw", 1e-8), ("lamb", 1e-6)])
def test_an_optimizer_is_adamw_unless_stated(kind: str | None, eps: float) -> None:
    optim = build(FINETUNE, **({"optim__kind": kind} if kind else {})).optim
    assert (optim.kind, optim.eps, optim.betas) == (kind or "adamw", eps, (0.9, 0.999))


@pytest.mark.parametrize("model", [PretrainConfig, FinetuneConfig])
def test_every_key_is_described(model: type[Section]) -> None:
    silent = [
        f"{section.__name__}.{key}"
        for section in sections(model, set())
        for key, field in section.model_fields.items()
        if key != "kind" and not field.description
    ]
    assert silent == []
    assert model.model_json_schema()["properties"]["optim"]
