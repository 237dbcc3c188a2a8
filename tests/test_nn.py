"""Module losses."""

import pytest
import torch

from kdkernels import temperature_kl
from kdkernels.nn import TemperatureKL


def test_module_is_the_op(device):
    s, t = torch.randn(2, 5, 3, device=device), torch.randn(2, 5, 3, device=device)
    mask = torch.tensor([[True, False, True], [True, True, True]], device=device)
    module = TemperatureKL(3.0, dim=1, direction="reverse")
    assert torch.equal(module(s, t, mask), temperature_kl(s, t, 3.0, dim=1, direction="reverse", mask=mask))
    assert repr(module) == "TemperatureKL(temperature=3, dim=1, direction='reverse')"
    assert not list(module.parameters())


def test_learnable_temperature(device):
    module = TemperatureKL(2.0, learnable=True).to(device)
    s, t = torch.randn(4, 5, device=device), torch.randn(4, 5, device=device)
    loss = module(s, t)
    assert torch.allclose(loss, temperature_kl(s, t, 2.0), rtol=1e-5)
    loss.backward()
    assert module.log_temperature.grad.abs() > 0
    assert list(module.state_dict()) == ["log_temperature"]


def test_options_are_refused_at_construction():
    with pytest.raises(TypeError, match="no option 'axis'"):
        TemperatureKL(2.0, axis=1)
    with pytest.raises(ValueError, match="direction must be one of"):
        TemperatureKL(2.0, direction="sideways")
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        TemperatureKL(0.0)
