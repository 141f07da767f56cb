import io
from functools import partial

import pytest
import torch
from torch import nn

from mpm.training.optimizer import create_adamw, create_lamb, create_lars, create_sgd, parameter_groups


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


def trained(create, steps: int, *, resume_at: int | None = None) -> list[torch.Tensor]:
    """Parameters of a small network after some steps; maybe saved to a file and loaded on the way."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    optimizer = create(parameter_groups(network, lr=0.1, weight_decay=0.3))
    for step in range(steps):
        if step == resume_at:
            file = io.BytesIO()
            torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            network = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
            network.load_state_dict(saved["model"])
            optimizer = create(parameter_groups(network, lr=0.1, weight_decay=0.3))
            optimizer.load_state_dict(saved["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1) * group["lr_scale"]
        images = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        network(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in network.parameters()]


OPTIMIZERS = {
    "adamw": partial(create_adamw, lr=0.1, betas=(0.9, 0.99)),
    "lamb": partial(create_lamb, lr=0.1, betas=(0.9, 0.99), eps=1e-6),
    "lars": partial(create_lars, lr=0.1, momentum=0.9),
    "sgd": partial(create_sgd, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_optimizer_continues_to_the_last_bit(name: str) -> None:
    straight, resumed = trained(OPTIMIZERS[name], 5), trained(OPTIMIZERS[name], 5, resume_at=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def lamb_by_hand(p: torch.Tensor, gradients, *, decay: float) -> torch.Tensor:
    """arXiv:1904.00962, algorithm 2, with Adam's bias correction; what does not decay is not adapted."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, gradient in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.99 * v + 0.01 * gradient**2
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-6) + decay * p
        trust = p.norm() / update.norm() if decay else 1.0
        p = p - 0.1 * trust * update
    return p


def lars_by_hand(p: torch.Tensor, gradients, *, decay: float) -> torch.Tensor:
    """mae/util/lars.py, for a decay of 0: matrices' gradients are scaled to 1/1000 of the weights' norm."""
    assert not decay
    momentum = torch.zeros_like(p)
    for gradient in gradients:
        scale = 0.001 * p.norm() / gradient.norm() if p.ndim > 1 else 1.0
        momentum = 0.9 * momentum + scale * gradient
        p = p - 0.1 * momentum
    return p


def sgd_by_hand(p: torch.Tensor, gradients, *, decay: float) -> torch.Tensor:
    """Nesterov's momentum with the decay in the gradient, as timm's `sgd`."""
    momentum = torch.zeros_like(p)
    for gradient in gradients:
        gradient = gradient + decay * p
        momentum = 0.9 * momentum + gradient
        p = p - 0.1 * (gradient + 0.9 * momentum)
    return p


@pytest.mark.parametrize(
    ("name", "by_hand", "weight_decay"),
    [("lamb", lamb_by_hand, 0.3), ("lars", lars_by_hand, 0.0), ("sgd", sgd_by_hand, 0.3)],
)
def test_an_optimizer_takes_the_published_steps(name: str, by_hand, weight_decay: float) -> None:
    """On a matrix, a vector, and a token, which is a matrix that does not decay."""
    network = nn.Linear(3, 4).double()
    network.mask_token = nn.Parameter(torch.randn(1, 4, dtype=torch.float64))
    start = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    groups = parameter_groups(network, lr=0.1, weight_decay=weight_decay, undecayed={"mask_token"})
    optimizer = OPTIMIZERS[name](groups)
    gradients = [{key: torch.randn_like(value) for key, value in start.items()} for _ in range(4)]
    for step in gradients:
        for key, parameter in network.named_parameters():
            parameter.grad = step[key].clone()
        optimizer.step()
    for key, parameter in network.named_parameters():
        decay = weight_decay if key == "weight" else 0.0
        expected = by_hand(start[key], [step[key] for step in gradients], decay=decay)
        # timm adds 1e-8 to the norm that LARS divides by
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-7, atol=0, msg=key)


def test_lamb_leaves_clipping_to_the_loop() -> None:
    optimizer = OPTIMIZERS["lamb"](parameter_groups(nn.Linear(2, 2), lr=0.1, weight_decay=0.1))
    assert optimizer.defaults["max_grad_norm"] is None
