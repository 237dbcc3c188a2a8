"""Losses of kdkernels.nn."""

import pytest
import torch
import torch.nn.functional as F

from kdkernels import reference, temperature_kl
from kdkernels.nn import TemperatureKLLoss, kd_loss


def test_module_equals_the_op(device):
    s, t = torch.randn(2, 5, 3, device=device), torch.randn(2, 5, 3, device=device)
    mask = torch.tensor([[True, False, True], [True, True, True]], device=device)
    module = TemperatureKLLoss(3.0, dim=1, direction="reverse")
    assert torch.equal(module(s, t, mask), temperature_kl(s, t, 3.0, dim=1, direction="reverse", mask=mask))
    assert repr(module) == "TemperatureKLLoss(temperature=3, dim=1, direction='reverse')"
    assert not list(module.parameters())


def test_learnable_temperature(device):
    module = TemperatureKLLoss(2.0, learnable=True).to(device)
    s, t = torch.randn(4, 5, device=device), torch.randn(4, 5, device=device)
    loss = module(s, t)
    assert torch.allclose(loss, temperature_kl(s, t, 2.0), rtol=1e-5)
    loss.backward()
    assert module.log_temperature.grad.abs() > 0
    assert list(module.state_dict()) == ["log_temperature"]


def test_invalid_options_raise_at_construction():
    with pytest.raises(TypeError, match="no option 'axis'"):
        TemperatureKLLoss(2.0, axis=1)
    with pytest.raises(ValueError, match="direction must be one of"):
        TemperatureKLLoss(2.0, direction="sideways")
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        TemperatureKLLoss(0.0)


@pytest.mark.parametrize("dim", [1, -3, 2, -1])
def test_kd_loss_of_pixels(dim):
    """For [B, K, H, W] with the classes in any dimension but the first, both terms are means over
    the pixels.
    """
    s, t = torch.randn(2, 5, 5, 5, dtype=torch.float64), torch.randn(2, 5, 5, 5, dtype=torch.float64)
    labels = torch.randint(5, (2, 5, 5))
    rows_s, rows_t = (x.movedim(dim, -1).reshape(-1, 5) for x in (s, t))
    expected = 0.1 * F.cross_entropy(rows_s, labels.flatten()) + 0.9 * reference.temperature_kl(rows_s, rows_t, 4.0)
    torch.testing.assert_close(kd_loss(s, t, labels, dim=dim), expected)
    soft = torch.softmax(torch.randn_like(s), dim)
    expected = 0.1 * F.cross_entropy(rows_s, soft.movedim(dim, -1).reshape(-1, 5)) + 0.9 * reference.temperature_kl(rows_s, rows_t, 4.0)
    torch.testing.assert_close(kd_loss(s, t, soft, dim=dim), expected)
    with pytest.raises(ValueError, match="pass dim, the dimension of the classes"):
        kd_loss(s, t, labels)
    with pytest.raises(ValueError, match=r"labels must have the shape \(2, 5, 5\) for student \(2, 5, 5, 5\) with the classes in dim="):
        kd_loss(s, t, labels[:, :3], dim=dim)


def test_kd_loss_of_columns_and_of_one_sample():
    s, t, labels = torch.randn(6, 4), torch.randn(6, 4), torch.randint(6, (4,))
    torch.testing.assert_close(kd_loss(s, t, labels, dim=0), kd_loss(s.T, t.T, labels))
    torch.testing.assert_close(kd_loss(s[:, 0], t[:, 0], labels[0]), kd_loss(s[:, :1].T, t[:, :1].T, labels[:1]))
    with pytest.raises(ValueError, match="dim must lie in"):
        kd_loss(s, t, labels, dim=2)


def test_kd_loss_is_the_sum_of_its_terms(device):
    s, t = torch.randn(6, 10, device=device, requires_grad=True), torch.randn(6, 10, device=device, requires_grad=True)
    labels = torch.randint(10, (6,), device=device)
    loss = kd_loss(s, t, labels, 4.0, gamma=0.3, alpha=0.5)
    expected = 0.3 * F.cross_entropy(s, labels) + 0.5 * reference.temperature_kl(s, t.detach(), 4.0)
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0
