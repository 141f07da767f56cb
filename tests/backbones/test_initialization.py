"""No parameter is forgotten, and each starts as its scheme says."""

import math

import pytest
import torch
from scipy.stats import truncnorm
from torch import Tensor, nn

from mpm.backbones.attention import RelativePositionBias
from mpm.backbones.backbone import Backbone
from mpm.backbones.blocks import LayerScale
from mpm.backbones.classifier import Classifier
from mpm.backbones.initialization import initialize
from mpm.backbones.readouts import MeanReadout
from mpm.patchify.positions import sincos_table
from tests.networks import STEMS, make_backbone, make_masked

SCHEMES = ["vit", "mae", "beit"]
# standard deviation of a normal cut at one deviation, which BEiT's is
CUT_STD = 0.02 * float(truncnorm(-1, 1).std())
BEIT = {"learned_positions": None, "relative_bias": "shared", "qkv_bias": "query_value", "layer_scale": 0.1}


def filled_with_nan(module: nn.Module) -> nn.Module:
    """From meta to memory in which every forgotten number is loud."""
    module = module.to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else -(10**6))
    return module


def assert_filled(module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert tensor.isfinite().all(), name
        assert tensor.is_floating_point() or tensor.min() >= 0, name


@pytest.mark.parametrize("method", ["mae", "simmim"])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_number_of_a_masked_objective_is_forgotten(scheme, stem: str, method: str) -> None:
    options = (
        {"num_prefix": 2} if scheme == "vit" else {"learned_positions": False} if scheme == "mae" else BEIT
    )
    with torch.device("meta"):
        objective = make_masked(method, make_backbone(stem, **options))
    initialize(filled_with_nan(objective), scheme)
    assert_filled(objective)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_number_of_a_classifier_is_forgotten(scheme, stem: str) -> None:
    with torch.device("meta"):
        backbone = make_backbone(stem, relative_bias="per_block", layer_scale=1e-5)
        classifier = Classifier(backbone, MeanReadout(backbone.dim), num_classes=5)
    initialize(filled_with_nan(classifier), scheme)
    classifier.reset_heads()
    assert_filled(classifier)


def started(scheme: str, stem: str = "linear", **options) -> Backbone:
    """Wide enough for statistics: the smallest matrix has 4,096 numbers."""
    with torch.device("meta"):
        backbone = make_backbone(stem, dim=64, depth=3, **options)
    initialize(filled_with_nan(backbone), scheme)
    return backbone


def assert_normal(weight: Tensor, std: float) -> None:
    assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))
    assert weight.mean().item() == pytest.approx(0, abs=4 * std / math.sqrt(weight.numel()))


def assert_uniform(weight: Tensor, bound: float) -> None:
    assert weight.abs().max().item() == pytest.approx(bound, rel=20 / weight.numel())
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(weight.numel()))


def matrices(backbone: Backbone) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in backbone.blocks.named_parameters() if p.ndim == 2}


def test_vit_matrices_are_normal() -> None:
    for weight in matrices(started("vit")).values():
        assert_normal(weight, 0.02)
        assert weight.abs().max() > 0.06  # not cut


def test_mae_matrices_are_xavier_uniform_and_qkv_is_one() -> None:
    for name, weight in matrices(started("mae")).items():
        fan_out, fan_in = (192, 64) if "qkv" in name else weight.shape
        assert_uniform(weight, math.sqrt(6 / (fan_in + fan_out)))


def test_beit_matrices_are_cut_and_rescaled_by_depth() -> None:
    for name, weight in matrices(started("beit")).items():
        block = int(name.split(".")[0]) + 1
        scale = 1 / math.sqrt(2 * block) if "attn.proj" in name or "mlp.fc2" in name else 1.0
        assert weight.abs().max().item() == pytest.approx(0.02 * scale, rel=0.01)
        assert_normal(weight, CUT_STD * scale)


@pytest.mark.parametrize("stem", ["linear", "hmlp-layer", "conv-layer"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_stems(scheme: str, stem: str) -> None:
    for layer in started(scheme, stem).stem.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        fan_out, fan_in = layer.weight.flatten(1).shape
        if scheme == "beit":
            assert layer.weight.abs().max() <= 0.02
            assert_normal(layer.weight, CUT_STD)
            assert not layer.bias.any()
        elif scheme == "mae" and stem == "linear":
            assert_uniform(layer.weight, math.sqrt(6 / (fan_in + fan_out)))
        else:  # torch's own: uniform within 1 / sqrt(fan in)
            assert_uniform(layer.weight, 1 / math.sqrt(fan_in))
            assert 0 < layer.bias.abs().max() <= 1 / math.sqrt(fan_in)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_and_learned_positions_are_drawn_alike(scheme: str) -> None:
    objective = make_masked("simmim", started(scheme, num_prefix=64, grid=(8, 8)))
    initialize(objective, scheme)
    backbone, bound = objective.backbone, 0.02 if scheme == "beit" else 0.1
    for tensor in (backbone.prefix_tokens, backbone.positions.table):
        assert_normal(tensor, CUT_STD if scheme == "beit" else 0.02)
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > 0.9 * bound or scheme != "beit"
    token = objective.predictor.encoder_mask_token
    assert 0 < token.abs().max() <= bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_norms_scales_and_tables(scheme: str) -> None:
    backbone = started(
        scheme,
        "hmlp-all",
        learned_positions=False,
        relative_bias="per_block",
        qkv_bias="query_value",
        layer_scale=0.125,
    )
    for part in backbone.modules():
        if isinstance(part, nn.LayerNorm | nn.BatchNorm1d):
            assert part.weight.eq(1).all()
            assert part.bias.eq(0).all()
        if isinstance(part, nn.BatchNorm1d):
            assert part.running_mean.eq(0).all()
            assert part.running_var.eq(1).all()
            assert part.num_batches_tracked == 0
        if isinstance(part, LayerScale):
            assert part.gamma.eq(0.125).all()
        if isinstance(part, RelativePositionBias):
            assert part.bias_table.eq(0).all()
            assert part.index.unique().tolist() == list(range(35))  # every offset of a 3x4 grid
    for name, parameter in backbone.blocks.named_parameters():
        if name.endswith("bias") and "norm" not in name:
            assert parameter.eq(0).all(), name
    assert torch.equal(backbone.positions.table, sincos_table(backbone.grid, 64))


def test_two_starts_with_one_seed_are_equal() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(started("vit", "hmlp-all").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
