"""What is trained, against the published counts and the released code's rule by names, applied to timm."""

import pytest
import timm
import torch
from torch import Tensor, nn

from mpm.backbones.blocks import DropPath
from mpm.backbones.classifier import Classifier
from mpm.backbones.create import create_classifier
from mpm.backbones.readouts import ClassAttentionReadout, MeanReadout, TokenReadout
from mpm.backbones.tuning import Tune, tune
from mpm.patchify.norms import TokenBatchNorm
from mpm.training.ema import create_ema
from tests.networks import DIM, HEADS, make_backbone, random_images, randomize

CLASSES = 5
PARTS: tuple[Tune, ...] = ("attention", "mlp", "norm", "head")


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def published(name: str, part: Tune = "attention", **options) -> Classifier:
    with torch.device("meta"):
        network = create_classifier(name, **options)
    tune(network, part)
    return network


def tiny(stem: str = "linear", readout: nn.Module | None = None, **options) -> Classifier:
    network = Classifier(make_backbone(stem, **options), readout or MeanReadout(DIM), num_classes=CLASSES)
    randomize(network)
    return network


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deit3_s", 7_702_504),
        pytest.param("deit3_b", 29_559_784, marks=pytest.mark.slow),
        pytest.param("deit3_l", 102_376_424, marks=pytest.mark.slow),
    ],
)
def test_attention_only_trains_the_published_number(name: str, parameters: int) -> None:
    """At 384 pixels, counted on the official classes of the released code."""
    assert count(published(name, image_size=384)) == parameters


@pytest.mark.parametrize("part", PARTS)
def test_every_branch_of_parallel_blocks_is_trained(part: Tune) -> None:
    """The released rule finds `.attn.` and misses `.attn1.`: half of the attention."""
    sequential, parallel, wide = (
        published(name, part, layer_scale=1e-4) for name in ("vit_ti_6x1", "vit_ti_3x2", "vit_ti_2x3")
    )
    assert count(sequential) == count(parallel) == count(wide)


def by_name(network: nn.Module, part: str) -> int:
    """Parameters that the released code's rule finds by their names in timm's network."""
    kept = (f".{part}.", "pos_embed", "head", "rel_pos_bias")
    return sum(p.numel() for name, p in network.named_parameters() if any(word in name for word in kept))


@pytest.mark.parametrize(
    ("ours", "theirs", "slots"),
    [
        ("deit_ti", "deit_tiny_patch16_224", 1),
        ("deit_ti_distilled", "deit_tiny_distilled_patch16_224", 2),
        ("cait_xxs24", "cait_xxs24_224", 0),
        ("beit_b", "beit_base_patch16_224", 0),
    ],
)
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_what_is_trained_is_what_timm_s_names_say(ours: str, theirs: str, slots: int, part: Tune) -> None:
    """Of two blocks each. Our position tables have no slots for tokens."""
    with torch.device("meta"):
        reference = timm.create_model(theirs, depth=2)
    network = published(ours, part, depth=2)
    expected = by_name(reference, {"attention": "attn", "mlp": "mlp"}[part])
    assert count(network) == expected - slots * network.backbone.dim


@pytest.mark.parametrize("readout", ["mean", "class_attention"])
@pytest.mark.parametrize("branches", [1, 2])
def test_parts_leave_out_only_stem_and_tokens(branches: int, readout: str) -> None:
    """And share nothing but heads and positions."""
    found = {}
    for part in PARTS:
        reader = ClassAttentionReadout(DIM, HEADS, layer_scale=0.1) if readout == "class_attention" else None
        network = tiny(
            "hmlp-layer", reader, branches=branches, layer_scale=0.1, attention="talking_heads",
            relative_bias="per_block",
        )  # fmt: skip
        everything = trained(network)
        tune(network, part)
        found[part] = trained(network)
    heads = {"heads.0.weight", "heads.0.bias"}
    assert found["head"] == heads
    shared = found["attention"] & found["mlp"]
    assert shared == heads | {"backbone.positions.table"}
    assert found["norm"] & (found["attention"] | found["mlp"]) == heads
    left = everything - set().union(*found.values())
    assert {name.split(".")[-1] for name in left if "stem" not in name} <= {"prefix_tokens", "tokens"}
    assert all(".projs." in name for name in left if "stem" in name)


def test_all_freezes_nothing() -> None:
    network = tiny("hmlp-visible")
    everything = {name for name, _ in network.named_parameters()}
    tune(network, "all")
    assert trained(network) == everything


def test_a_readout_that_starts_afresh_is_trained_whole() -> None:
    network = tiny(readout=ClassAttentionReadout(DIM, HEADS))
    tune(network, "head", readout_too=True)
    assert trained(network) == {n for n, _ in network.named_parameters() if not n.startswith("backbone")}


def saved_bytes(network: Classifier, images: Tensor) -> int:
    """What autograd keeps for the backward pass, parameters and images left out."""
    storages: dict[int, int] = {}
    known = {p.untyped_storage().data_ptr() for p in [*network.parameters(), images]}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(images).sum()
    output.backward()
    return sum(storages.values())


def test_activations_are_kept_only_for_what_is_trained() -> None:
    images = random_images(8)
    memory = {}
    for part in ("all", *PARTS):
        network = tiny("hmlp-layer")
        tune(network, part)
        memory[part] = saved_bytes(network, images)
        reached = {name for name, p in network.named_parameters() if p.grad is not None}
        assert reached == trained(network)
        tokens = network.backbone.stem(images)
        assert tokens.requires_grad == (part in ("all", "norm"))
    assert memory["attention"] < memory["all"]
    assert memory["mlp"] < memory["all"]
    # a frozen trunk leaves the vectors that the head reads, and nothing else
    assert memory["head"] == 8 * DIM * 4


@pytest.mark.parametrize(("part", "moves"), [("all", True), ("norm", True), ("attention", False)])
def test_a_frozen_batch_norm_keeps_its_statistics(part: Tune, moves: bool) -> None:
    network = tiny("hmlp-visible")
    tune(network, part)
    network.eval().train()  # as an evaluation between two steps
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert any("running_mean" in name for name in before)
    network(random_images(8))
    changed = {name for name, buffer in network.named_buffers() if not buffer.equal(before[name])}
    assert bool(changed) == moves


@pytest.mark.parametrize("part", ["all", "attention"])
def test_training_in_eval_mode_drops_no_path_and_keeps_statistics(part: Tune) -> None:
    network = tiny("hmlp-visible", drop_path=0.9, readout=TokenReadout(DIM))
    assert any(isinstance(module, DropPath) and module.rate for module in network.modules())
    images = random_images(8)
    expected = network.eval()(images)
    tune(network, part, eval_mode=True)
    network.train()
    assert not any(isinstance(module, TokenBatchNorm) and module.training for module in network.modules())
    assert network(images).equal(expected)
    network(images).sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == trained(network)


@pytest.mark.parametrize("part", ["all", *PARTS])
def test_the_norm_before_a_head_learns_whatever_is_tuned(part: Tune) -> None:
    """MAE's linear probe is `head` with that norm, which has statistics and no weights."""
    network = Classifier(make_backbone(), MeanReadout(DIM), num_classes=CLASSES, head_norm="batch")
    tune(network, part)
    network.eval().train()
    randomize(network.backbone), randomize(network.readout)
    (norm,) = network.head_norms
    vectors = network.vectors(random_images(8))
    network.classify(vectors)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * vectors.detach().mean((0, 1)))


def test_a_trunk_that_is_frozen_whole_drops_no_path() -> None:
    network = tiny(drop_path=0.9)
    images = random_images(8)
    expected = network.eval().vectors(images)
    tune(network, "head")
    assert network.train().vectors(images).equal(expected)


def test_an_average_holds_no_copy_of_what_is_frozen() -> None:
    network = tiny()
    tune(network, "attention")
    ema = create_ema(network, decay=0.5)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    ema.update(network)
    for name, average in ema.module.named_parameters():
        if name in trained(network):
            torch.testing.assert_close(average.detach(), before[name] + 0.5)
        else:
            assert average is network.get_parameter(name)
            assert average.equal(before[name])
