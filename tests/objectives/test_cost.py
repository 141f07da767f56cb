import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mpm.objectives.cost import masked_macs
from mpm.objectives.masked import MaskedInputs, MaskedPrediction
from tests.networks import make_backbone, make_masked, random_images, random_mask, randomize, targets_of

TRUNKS = {
    "vit": {},
    "cait": {"attention": "talking_heads", "num_prefix": 0},
    "parallel": {"branches": 2, "num_prefix": 3},
}


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stem", ["linear", "hmlp-all", "hmlp-visible", "conv-layer"])
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("method", ["mae", "simmim", pytest.param("beitv2", marks=pytest.mark.slow)])
def test_masked_objectives_cost_what_torch_counts(method: str, trunk: str, stem: str, training: bool) -> None:
    objective = randomize(make_masked(method, make_backbone(stem, **TRUNKS[trunk]))).train(training)
    if method == "beitv2" and not objective.backbone.num_prefix:
        pytest.skip("class pretraining needs a class token")
    inputs = MaskedInputs(random_images(1), random_mask(1, 12, 7), targets_of(method, 1, 7))
    with FlopCounterMode(display=False) as counter:
        objective(inputs, torch.zeros(()))
    assert masked_macs(objective, num_masked=7) == counter.get_total_flops() / 2


def test_a_predictor_of_unknown_cost_is_told() -> None:
    predictor = nn.Identity()
    predictor.encoder_mask_token = None
    objective = MaskedPrediction(make_backbone(), predictor, loss=torch.sub)
    with pytest.raises(ValueError, match=r"the cost of Identity is unknown; count it in mpm\.objectives"):
        masked_macs(objective, num_masked=7)
