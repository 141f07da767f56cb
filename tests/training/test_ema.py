import torch
from torch import nn

from mpm.training.ema import create_ema


def test_parameters_are_averaged_and_buffers_copied() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = create_ema(module, decay=0.9)
    expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.add_(torch.randn_like(parameter))
                expected[name] = 0.9 * expected[name] + 0.1 * parameter
        module(torch.randn(4, 2))
        ema.update(module)
    for name, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-6)
    for name, buffer in ema.module.named_buffers():
        assert torch.equal(buffer, module.get_buffer(name)), name
    assert not ema.module.training
    assert module.training


def test_it_resumes_from_its_state_dict() -> None:
    module = nn.Linear(2, 2)
    ema = create_ema(module, decay=0.5)
    module.weight.data.add_(1)
    ema.update(module)
    resumed = create_ema(module, decay=0.5)
    resumed.module.load_state_dict(ema.module.state_dict())
    for average in (ema, resumed):
        average.update(module)
    assert torch.equal(ema.module.weight, resumed.module.weight)
