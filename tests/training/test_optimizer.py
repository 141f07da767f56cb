import pytest
import torch
from torch import nn

from mpm.training.optimizer import create_adamw, parameter_groups


class Network(nn.Module):
    """Names and shapes of a small transformer of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 4))
        self.positions = nn.Parameter(torch.zeros(9, 4), requires_grad=False)
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 2, bias=False)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.ones(()))

    @staticmethod
    def layer_of(name: str) -> int:
        layers = {"mask_token": 0, "stem": 0, "blocks.0": 1, "blocks.1": 2, "head": 3, "scale": 3}
        return layers[".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])]


def test_each_trainable_parameter_is_in_exactly_one_group() -> None:
    network = Network()
    groups = parameter_groups(network, lr=1.0, weight_decay=0.1, layer_of=Network.layer_of, num_layers=3)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [g["names"] for g in groups]


def test_layer_decay_equals_the_closed_form() -> None:
    groups = parameter_groups(
        Network(), lr=2.0, weight_decay=0.1, layer_of=Network.layer_of, num_layers=3, layer_decay=0.5
    )
    by_name = {name: group for group in groups for name in group["names"]}
    scales = {
        name: by_name[name]["lr_scale"]
        for name in ("stem.weight", "blocks.0.1.weight", "blocks.1.0.bias", "head.bias")
    }
    assert scales == {
        "stem.weight": 0.125,
        "blocks.0.1.weight": 0.25,
        "blocks.1.0.bias": 0.5,
        "head.bias": 1.0,
    }
    assert all(group["lr"] == 2.0 * group["lr_scale"] for group in groups)
    assert by_name["stem.weight"]["group"] == "layer 0, decay"


def test_vectors_biases_and_named_leaves_do_not_decay() -> None:
    groups = parameter_groups(
        Network(), lr=1.0, weight_decay=0.1, decayed={"scale"}, undecayed={"mask_token", "absent"}
    )
    decays = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert decays == {"stem.weight", "blocks.0.1.weight", "blocks.1.1.weight", "head.weight", "scale"}


def test_a_name_without_a_layer_raises() -> None:
    network = Network()
    network.unknown = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(KeyError, match="unknown"):
        parameter_groups(network, lr=1.0, weight_decay=0.1, layer_of=Network.layer_of, num_layers=3)


def test_a_layer_out_of_range_raises() -> None:
    with pytest.raises(ValueError, match=r"parameter scale is in layer 3, but layers are 0 to 2"):
        parameter_groups(Network(), lr=1.0, weight_decay=0.1, layer_of=Network.layer_of, num_layers=2)


def test_nothing_to_train_raises() -> None:
    with pytest.raises(ValueError, match="no parameter is trainable"):
        parameter_groups(Network().requires_grad_(False), lr=1.0, weight_decay=0.1)


def test_adamw_takes_one_step_as_published() -> None:
    linear = nn.Linear(2, 2)
    before = linear.weight.detach().clone()
    groups = parameter_groups(linear, lr=0.1, weight_decay=0.5)
    optimizer = create_adamw(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    linear(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    # the first step of Adam is lr times the gradient's sign; decay multiplies by 1 - lr * weight_decay
    torch.testing.assert_close(linear.weight.detach(), before * (1 - 0.1 * 0.5) - 0.1)
    assert optimizer.param_groups[0]["fused"]
