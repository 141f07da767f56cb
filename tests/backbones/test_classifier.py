"""The whole network against timm's vision transformers and BEiT: logits and gradients."""

import pytest
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpm.backbones.backbone import Encoded
from mpm.backbones.classifier import Classifier, fold_head_norms
from mpm.backbones.readouts import ClassAttentionReadout, MeanReadout, TokenReadout
from tests.networks import DEPTH, DIM, GRID, HEADS, make_backbone, random_images, randomize

CLASSES = 5
SIZES = {"img_size": (12, 16), "patch_size": 4, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
READOUTS = {"token": TokenReadout, "avg": MeanReadout}
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to ours, of a state or of gradients."""
    mapped = {}
    for name, tensor in tensors.items():
        match name.split("."):
            case ["patch_embed", "proj", "weight"]:
                mapped["backbone.stem.proj.weight"] = tensor.permute(0, 2, 3, 1).flatten(1)
            case ["patch_embed", "proj", "bias"]:
                mapped["backbone.stem.proj.bias"] = tensor
            case ["pos_embed"]:
                mapped["backbone.positions.table"] = tensor[0]
            case ["blocks", index, "attn", "relative_position_bias_table"]:
                mapped[f"backbone.relative_biases.{index}.bias_table"] = tensor
            case ["rel_pos_bias", "relative_position_bias_table"]:
                mapped["backbone.relative_biases.0.bias_table"] = tensor
            case ["blocks", index, ("gamma_1" | "gamma_2") as gamma]:
                mapped[f"backbone.blocks.{index}.ls{gamma[-1]}.gamma"] = tensor
            case ["blocks", *_]:
                mapped[f"backbone.{name}"] = tensor
            case ["norm" | "fc_norm", leaf]:
                mapped[f"readout.norm.{leaf}"] = tensor
            case ["head", leaf]:
                mapped[f"heads.0.{leaf}"] = tensor
    prefix = [tensors[name][0] for name in ("cls_token", "reg_token") if name in tensors]
    return mapped | {"backbone.prefix_tokens": torch.cat(prefix)}


def assert_equal(ours: Classifier, theirs: nn.Module) -> None:
    """The same logits, and the same gradient for every parameter."""
    ours, theirs = ours.double(), randomize(theirs).double()
    ours.load_state_dict(from_timm(theirs.state_dict()))
    images = random_images(3).double()
    expected, found = theirs(images), ours(images)
    torch.testing.assert_close(found[:, 0], expected, **EXACT)
    assert torch.equal(ours.predict(images), ours(images)[:, 0])
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found[:, 0] * weights).sum().backward()
    gradients = from_timm({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **EXACT, msg=name)


@pytest.mark.parametrize("pool", READOUTS)
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_vit_equals_timm(layer_scale, registers: int, pool: str) -> None:
    """Prefix tokens in timm's order: class, registers, patches."""
    theirs = VisionTransformer(
        **SIZES,
        num_classes=CLASSES,
        init_values=layer_scale,
        reg_tokens=registers,
        no_embed_class=True,
        global_pool=pool,
    )
    backbone = make_backbone(layer_scale=layer_scale, num_prefix=1 + registers)
    randomize(backbone)
    assert_equal(Classifier(backbone, READOUTS[pool](DIM), num_classes=CLASSES), theirs)


def test_a_class_slot_in_timms_positions_is_part_of_our_prefix() -> None:
    theirs = randomize(VisionTransformer(**SIZES, num_classes=CLASSES)).double()
    ours = Classifier(make_backbone(), TokenReadout(DIM), num_classes=CLASSES).double()
    state = theirs.state_dict()
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    ours.load_state_dict(from_timm(state))
    images = random_images().double()
    torch.testing.assert_close(ours.predict(images), theirs(images), **EXACT)


@pytest.mark.parametrize("pool", READOUTS)
@pytest.mark.parametrize("relative_bias", ["shared", "per_block"])
@pytest.mark.parametrize("grid", [GRID, (3, 3)])
def test_beit_equals_timm(grid, relative_bias: str, pool: str) -> None:
    """Relative position bias, biases on queries and values only, LayerScale."""
    image_size = (4 * grid[0], 4 * grid[1])
    theirs = Beit(
        **SIZES | {"img_size": image_size},
        num_classes=CLASSES,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=relative_bias == "per_block",
        use_shared_rel_pos_bias=relative_bias == "shared",
        global_pool=pool,
    )
    backbone = make_backbone(
        grid=grid,
        learned_positions=None,
        relative_bias=relative_bias,
        qkv_bias="query_value",
        layer_scale=0.1,
    )
    randomize(backbone)
    ours = Classifier(backbone, READOUTS[pool](DIM), num_classes=CLASSES).double()
    theirs = randomize(theirs).double()
    ours.load_state_dict(from_timm(theirs.state_dict()))
    images = random_images(3, grid=grid).double()
    expected, found = theirs(images), ours(images)
    torch.testing.assert_close(found[:, 0], expected, **EXACT)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = from_timm({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **EXACT, msg=name)


class TwoVectors(nn.Module):
    """A readout of two prefix tokens."""

    num_vectors = 2

    def forward(self, encoded: Encoded) -> Tensor:
        return encoded.prefix


def test_every_vector_has_a_head_and_predictions_are_their_mean() -> None:
    classifier = randomize(Classifier(make_backbone(num_prefix=2), TwoVectors(), num_classes=CLASSES))
    images = random_images()
    prefix, logits = classifier.backbone(images).prefix, classifier(images)
    assert logits.shape == (2, 2, CLASSES)
    for q, head in enumerate(classifier.heads):
        torch.testing.assert_close(logits[:, q], head(prefix[:, q]))
    torch.testing.assert_close(classifier.predict(images), (logits[:, 0] + logits[:, 1]) / 2)


def test_the_mean_is_of_patches_only() -> None:
    encoded = Encoded(torch.full((2, 3, 8), torch.nan), torch.randn(2, 5, 8))
    readout = randomize(MeanReadout(8))
    torch.testing.assert_close(readout(encoded), readout.norm(encoded.patches.mean(1))[:, None])


def test_the_token_is_the_first_of_the_prefix() -> None:
    encoded = Encoded(torch.randn(2, 3, 8), torch.full((2, 5, 8), torch.nan))
    readout = randomize(TokenReadout(8))
    torch.testing.assert_close(readout(encoded), readout.norm(encoded.prefix[:, 0])[:, None])


@pytest.mark.parametrize("reader", ["mean", "token", "class_attention"])
def test_layer_of(reader: str) -> None:
    """BEiT's numbers. Class attention, which no released code has rates for, is the last layer, whole.

    CaiT's class token enters there, so that it is no part of layer 0, as other tokens are.
    """
    readouts = {
        "mean": MeanReadout(DIM),
        "token": TokenReadout(DIM),
        "class_attention": ClassAttentionReadout(DIM, HEADS, num_vectors=2),
    }
    readout = readouts[reader]
    classifier = Classifier(make_backbone(), readout, num_classes=CLASSES)
    expected = {"stem": 0, "positions": 0, "prefix_tokens": 0, "blocks.0": 1, "blocks.1": 2}
    last = set()
    for name, _ in classifier.named_parameters():
        inner = name.removeprefix("backbone.")
        layers = {layer for start, layer in expected.items() if inner.startswith(start)} or {DEPTH + 1}
        assert {classifier.layer_of(name)} == layers, name
        if layers == {DEPTH + 1}:
            last.add(".".join(name.split(".")[:2]))
    of_reader = {"readout.tokens", "readout.blocks"} if reader == "class_attention" else set()
    assert last == {f"heads.{q}" for q in range(readout.num_vectors)} | {"readout.norm"} | of_reader
    for unknown in ("norm.weight", "backbone.norm.weight", "head.weight"):
        with pytest.raises(KeyError, match="is no parameter of"):
            classifier.layer_of(unknown)


def test_heads_start_with_their_deviation() -> None:
    classifier = Classifier(make_backbone(dim=64), MeanReadout(64), num_classes=200, head_std=0.003)
    classifier.reset_heads()
    assert classifier.heads[0].weight.std().item() == pytest.approx(0.003, rel=0.03)
    assert not classifier.heads[0].bias.any()


def probe(head_norm: str = "batch") -> Classifier:
    torch.manual_seed(1)
    return randomize(
        Classifier(make_backbone(), MeanReadout(DIM), num_classes=CLASSES, head_norm=head_norm)  # type: ignore[arg-type]
    )


def test_a_norm_before_the_head_is_torchs_without_weights() -> None:
    """MAE's probe: BatchNorm1d(affine=False, eps=1e-6), of this batch in training, of all in evaluation."""
    network, images = probe(), random_images(8)
    theirs = nn.Sequential(nn.BatchNorm1d(DIM, affine=False, eps=1e-6), network.heads[0])
    theirs[0].load_state_dict(network.head_norms[0].state_dict())
    vectors = network.readout(network.backbone(images))[:, 0]
    for training in (True, False):
        network.train(training)
        theirs.train(training)
        torch.testing.assert_close(network(images)[:, 0], theirs(vectors), rtol=1e-5, atol=1e-6)
    assert {name for name, _ in network.named_parameters()} == {
        n for n, _ in probe("none").named_parameters()
    }
    assert not [name for name in probe("none").state_dict() if "head_norms" in name]  # older checkpoints fit


def test_norms_before_heads_fold_into_them() -> None:
    network, images = probe(), random_images(8)
    for _ in range(3):
        network(images * 3 + 1)
    network.eval()
    plain = probe("none").eval()
    plain.load_state_dict(fold_head_norms(network.state_dict()))
    torch.testing.assert_close(plain(images), network(images), rtol=1e-5, atol=1e-5)
    within = {f"classifier.{name}": tensor for name, tensor in network.state_dict().items()}
    folded = {f"classifier.{name}": tensor for name, tensor in plain.state_dict().items()}
    torch.testing.assert_close(fold_head_norms(within), folded)
    assert fold_head_norms(plain.state_dict()).keys() == plain.state_dict().keys()
