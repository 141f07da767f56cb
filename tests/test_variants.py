"""Every published architecture, built as deep as it is and as thin as it can be."""

import pytest
import torch
from torch import nn

from mpm.backbones.attention import TalkingHeads
from mpm.backbones.blocks import Block, DropPath, LayerScale, ParallelBlock
from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_classifier, variants
from mpm.config import Backbone
from mpm.variants import variant
from tests.networks import randomize

# start value of LayerScale, drop path and its rule: by the papers' tables, which mpm.variants cites
DEIT, NONE = (None, 0.1, "linear"), (None, 0.0, "linear")
STARTS = {
    **{f"vit_{size}": NONE for size in ("ti", "s", "b", "l", "h")},
    "debug": NONE,
    **{f"deit_{size}{kind}": DEIT for size in ("ti", "s", "b") for kind in ("", "_distilled")},
    "deit3_s": (1e-4, 0.05, "constant"),
    "deit3_m": (1e-4, 0.0, "constant"),
    "deit3_b": (1e-4, 0.2, "constant"),
    "deit3_l": (1e-4, 0.45, "constant"),
    "deit3_h": (1e-4, 0.6, "constant"),
    "cait_xxs24": (1e-5, 0.05, "constant"),
    "cait_xxs36": (1e-6, 0.1, "constant"),
    "cait_xs24": (1e-5, 0.05, "constant"),
    "cait_xs36": (1e-6, 0.1, "constant"),
    "cait_s24": (1e-5, 0.1, "constant"),
    "cait_s36": (1e-6, 0.2, "constant"),
    "cait_s48": (1e-6, 0.3, "constant"),
    "cait_m24": (1e-5, 0.2, "constant"),
    "cait_m36": (1e-6, 0.3, "constant"),
    "cait_m48": (1e-6, 0.4, "constant"),
    **{f"{family}_b": (0.1, 0.1, "linear") for family in ("beit", "beitv2", "simmim")},
    **{f"{family}_l": (1e-5, 0.1, "linear") for family in ("beit", "beitv2")},
    **{f"mae_{size}": NONE for size in ("b", "l", "h")},
}
THREE_THINGS = {"ti": 0.0, "s": 0.05, "b": 0.1, "l": 0.4}


def thin(name: str, **overrides) -> Classifier:
    """Heads of width 4, images of 2x2 patches."""
    sizes = variant(name).architecture
    return create_classifier(
        name, dim=4 * sizes.heads, image_size=2 * sizes.patch_size[0], num_classes=7, **overrides
    )


def tables(classifier: Classifier) -> list[torch.Tensor]:
    """Learned positions and class-attention tokens."""
    positions, tokens = classifier.backbone.positions, getattr(classifier.readout, "tokens", None)
    return [table for table in (getattr(positions, "table", None), tokens) if table is not None]


def start_of(name: str) -> tuple[float | None, float, str]:
    return STARTS[name] if name in STARTS else (None, THREE_THINGS[name.split("_")[1]], "constant")


def by_depth(name: str) -> object:
    """Those that take their time to build are slow tests."""
    return pytest.param(name, marks=[pytest.mark.slow] * (variant(name).architecture.depth > 24))


@pytest.mark.parametrize("name", [by_depth(name) for name in variants()])
def test_layer_scale_drop_path_and_distributions_after_construction(name: str) -> None:
    scale, rate, rule = start_of(name)
    classifier = thin(name)
    blocks = classifier.backbone.blocks
    depth = len(blocks)
    rates = [rate if rule == "constant" else rate * i / max(depth - 1, 1) for i in range(depth)]
    assert [block.drop_path.rate for block in blocks] == pytest.approx(rates)
    readout_rates = [part.rate for part in classifier.readout.modules() if isinstance(part, DropPath)]
    assert not any(readout_rates)  # class attention drops nothing

    scales = [part for part in classifier.modules() if isinstance(part, LayerScale)]
    branches = sum(len(block.attns) if isinstance(block, ParallelBlock) else 1 for block in blocks)
    readers = len(getattr(classifier.readout, "blocks", ()))
    assert len(scales) == (0 if scale is None else 2 * (branches + readers))
    assert all(part.gamma.eq(torch.tensor(scale)).all() for part in scales)

    # BEiT's code divides what ends a branch of block l by sqrt(2 l), and its head by a thousand
    is_rescaled = name.startswith(("beit", "simmim"))
    drawn, heads = [], []
    for place, part in classifier.named_modules():
        if not isinstance(part, nn.Linear) or place.startswith("backbone.stem"):
            continue
        weight = part.weight.detach().flatten()
        if place.startswith("heads"):
            heads.append(weight)
        elif is_rescaled and place.endswith(("attn.proj", "mlp.fc2")):
            drawn.append(weight * (2 * (int(place.split(".")[2]) + 1)) ** 0.5)
        else:
            drawn.append(weight)
    tokens = [
        t.detach().flatten()
        for t in (classifier.backbone.prefix_tokens, *tables(classifier))
        if t is not None
    ]
    head_std = 2e-5 if name.startswith(("beit", "mae", "simmim")) else 0.02
    for parts, std in ((drawn, 0.02), (heads, head_std), (tokens, 0.02)):
        numbers = torch.cat(parts) if parts else torch.empty(0)
        if len(numbers) > 100:
            assert numbers.std().item() == pytest.approx(std, rel=4 / (2 * len(numbers)) ** 0.5)
            assert numbers.mean().item() == pytest.approx(0, abs=4 * std / len(numbers) ** 0.5)
    for name_, parameter in classifier.named_parameters():
        if name_.endswith("bias") and "stem" not in name_:
            assert not parameter.any(), name_
        if "norm" in name_ and name_.endswith("weight"):
            assert parameter.eq(1).all(), name_


@pytest.mark.parametrize(
    "name", [name for name in variants() if not name.startswith("vit_")] + ["vit_s_18x2"]
)
def test_every_variant_classifies_and_learns(name: str) -> None:
    """Shapes, and a gradient for every parameter."""
    classifier = thin(name, **{"depth": 1, "drop_path": 0.0})
    sizes = classifier.backbone
    images = torch.randn(
        2, 3, *(side * patch for side, patch in zip(sizes.grid, sizes.stem.patch_size, strict=True))
    )
    logits = classifier(images)
    assert logits.shape == (2, 2 if "distilled" in name else 1, 7)
    assert classifier.predict(images).shape == (2, 7)
    randomize(classifier)  # from LayerScale's small start gradients are small, too
    classifier(images).square().sum().backward()
    without = [n for n, p in classifier.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_beit_starts_as_timms_does() -> None:
    """Deviations of each weight, at timm's names: another library's initialisation as the oracle."""
    from timm.models.beit import Beit

    ours = create_classifier("beit_b", dim=192, heads=3, depth=4, image_size=64)
    theirs = Beit(
        img_size=64,
        embed_dim=192,
        depth=4,
        num_heads=3,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=0.1,
    )
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        for block in range(4):
            weights = (
                module.get_submodule(f"blocks.{block}.{part}").weight for module in (ours.backbone, theirs)
            )
            mine, other = (weight.std().item() for weight in weights)
            assert mine == pytest.approx(other, rel=0.02), (part, block)
    assert ours.heads[0].weight.std().item() == pytest.approx(theirs.head.weight.std().item(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "start"), [("mae_b", "mae"), ("beit_l", "beit"), ("simmim_b", "beit"), ("cait_s24", "vit")]
)
def test_a_variant_brings_its_initialization(name: str, start: str) -> None:
    assert Backbone(variant=name).in_full(classifier=False).initialization == start
    assert Backbone(variant=name, initialization="vit").in_full(classifier=False).initialization == "vit"


@pytest.mark.parametrize("name", variants())
def test_in_full_an_architecture_needs_no_table(name: str) -> None:
    full = Backbone(variant=name).in_full(classifier=False)
    assert full.resolved() == Backbone(variant=name).resolved()
    again = Backbone.model_validate(full.model_dump(mode="json") | {"variant": None})
    assert again.resolved() == full.resolved()


def test_cait_has_talking_heads_in_its_trunk_and_one_or_two_queries() -> None:
    one = thin("cait_xxs24", depth=2)
    assert all(isinstance(block.attn.attend, TalkingHeads) for block in one.backbone.blocks)
    assert one.backbone.prefix_tokens is None
    assert len(one.heads) == 1
    two = thin("cait_xxs24", depth=2, readout={"kind": "class_attention", "queries": 2})
    assert two(torch.randn(2, 3, 32, 32)).shape == (2, 2, 7)


@pytest.mark.parametrize(
    ("name", "kind"), [("vit_s_3x1", Block), ("vit_s_3x2", ParallelBlock), ("vit_ti_1x5", ParallelBlock)]
)
def test_any_stages_by_branches(name: str, kind: type) -> None:
    depth, branches = map(int, name.rpartition("_")[2].split("x"))
    blocks = thin(name).backbone.blocks
    assert len(blocks) == depth
    assert all(isinstance(block, kind) for block in blocks)
    if branches > 1:
        assert {len(block.attns) for block in blocks} == {len(block.ffns) for block in blocks} == {branches}


def test_an_override_replaces_the_variants_value() -> None:
    classifier = thin(
        "deit_b", registers=2, positions={"bias": "per_block"}, stem={"kind": "hmlp", "norm": "layer"}
    )
    assert classifier.backbone.num_prefix == 3
    assert classifier.backbone.positions is not None  # the variant's table stays
    assert len(classifier.backbone.relative_biases) == 12
    assert type(classifier.backbone.stem).__name__ == "HierarchicalMLPStem"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"name": "cait_s25"}, 'variant "cait_s25" is unknown; did you mean cait_s24'),
        ({"name": "vit_b", "layerscale": 1e-4}, "layerscale is unknown"),
        ({"name": "vit_b", "stem": {"kind": "mlp"}}, "stem.kind mlp is unknown; use linear, hmlp or conv"),
        ({"name": "vit_b", "readout": {"kind": "cls"}}, "readout.kind cls is unknown; use token"),
        (
            {"name": "cait_s24", "readout": {"kind": "token"}},
            "reads the class token, but class_token is false; use class_attention",
        ),
    ],
)
def test_a_mistake_is_told(words: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_classifier(**words)
