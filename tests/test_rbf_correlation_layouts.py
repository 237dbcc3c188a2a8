"""rbf_correlation and rbf_correlation_loss with any strides and dtypes, and direct calls of their
ops.
"""

import random

import pytest
import torch
from layouts import random_layout

from kdkernels import rbf_correlation, rbf_correlation_loss, reference
from kdkernels.options import Reduction

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _close(name, got, want, dtype, scale):
    rtol = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    error = (got.double() - want).abs().max().item()
    assert error <= rtol * max(want.abs().max().item(), scale) + 1e-13, f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("seed", range(3))
def test_any_layout_and_dtypes(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(30):
        b, m, n, k = (rng.choice((1, 1, 2, 3, 5)), rng.choice((1, 2, 7, 16, 33)), rng.choice((1, 3, 8, 17, 40)), rng.choice((1, 1, 2, 4)))
        spread, beta = rng.choice((0.1, 1.0, 4.0)), rng.choice((0.5, 8.0))
        x, y, tx, ty = (random_layout(rng, (b, size, k), rng.choice(DTYPES), spread) for size in (m, n, m, n))
        inputs = [v.detach().requires_grad_() for v in (x, y, tx, ty)]
        wide = [v.detach().double().contiguous().requires_grad_() for v in (x, y, tx, ty)]
        case = " ".join(f"{v.dtype} {tuple(v.shape)} {v.stride()}" for v in (x, y, tx, ty)) + f" beta={beta}"
        got, want = rbf_correlation(*inputs[:2], beta), reference.rbf_correlation(*wide[:2], beta)
        _close(f"correlation of {case}", got.detach(), want.detach(), got.dtype, 1.0)
        upstream = random_layout(rng, got.shape, got.dtype)
        pairs = zip(torch.autograd.grad(got, inputs[:2], upstream), torch.autograd.grad(want, wide[:2], upstream.double()), strict=True)
        largest_gradient = 4 * spread / beta * upstream.abs().max().item() * max(m, n) ** 0.5
        for a, exact in pairs:
            assert a.stride() == torch.empty_like(a).stride()
            _close(f"gradient of {case}", a, exact, max((a.dtype, got.dtype), key=lambda d: torch.finfo(d).eps), largest_gradient)
        got, want = rbf_correlation_loss(*inputs, beta), reference.rbf_correlation_loss(*wide, beta)
        _close(f"loss of {case}", got.detach(), want.detach(), got.dtype, 0.0)
        for a, exact in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, wide), strict=True):
            coarser = max((a.dtype, got.dtype), key=lambda d: torch.finfo(d).eps)
            _close(f"gradient of the loss of {case}", a, exact, coarser, largest_gradient / max(1.0, upstream.abs().max().item()))


def test_raw_ops_raise_for_unsupported_inputs():
    ops = torch.ops.kdkernels
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    grad, one = torch.ones(2, 5, 4, 3), torch.ones(())
    bad = [x.to(torch.float8_e5m2), x.long(), x.to(torch.complex64), x[:, :0], x[..., :0], x[0], x[:1], x[..., :2], torch.zeros(2, 5, 3, 1)]
    for w in bad:
        for call in (
            lambda w: ops.rbf_correlation(w, y, 8.0),
            lambda w: ops.rbf_correlation(y, w, 8.0),
            lambda w: ops.rbf_correlation_backward(w, x, y, 8.0),
            lambda w: ops.rbf_correlation_backward(grad, w, y, 8.0),
            lambda w: ops.rbf_correlation_loss(w, y, x, y, 8.0, Reduction.SUM, [True] * 4),
            lambda w: ops.rbf_correlation_loss(x, y, w, y, 8.0, Reduction.SUM, [True] * 4),
            lambda w: ops.rbf_correlation_loss_backward(w, x, y, x, y, 8.0, Reduction.SUM, [True] * 4),
            lambda w: ops.rbf_correlation_loss_backward(one, x, w, x, y, 8.0, Reduction.SUM, [True] * 4),
            lambda w: ops.rbf_correlation_loss_rescale_(x.clone(), w),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                call(w)
