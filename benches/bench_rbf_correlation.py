"""rbf_correlation_loss and rbf_correlation, forward and backward, against eager PyTorch and Inductor."""

import pytest
import torch
from conftest import DEVICE, SMOKE, copy_seconds
from correlation_cases import CorrelationCase

from kdkernels import rbf_correlation, rbf_correlation_loss, reference
from kdkernels.timing import forward_backward, time_interleaved

# name, [B, M, N, K], options of the inputs, seconds
LOSSES = [
    ("128 x 512 x 512 x 2", (128, 512, 512, 2), {}, 25),
    ("128 x 128 x 64 x 1", (128, 128, 64, 1), {}, 4),
    ("8 x 2048 x 2048 x 4", (8, 2048, 2048, 4), {}, 45),
    ("128 x 256 x 128 x 1", (128, 256, 128, 1), {}, 5),
    ("128 x 256 x 512 x 1", (128, 256, 512, 1), {}, 8),
    ("32 x 16 x 16 x 1, few pairs", (32, 16, 16, 1), {}, 2),
    ("16 x 512 x 512 x 2, pair by pair", (16, 512, 512, 2), {"unit": False, "scale": 40.0}, 8),
    *((f"32 x {n} x {n} x 1, sweep", (32, n, n, 1), {}, 4) for n in (128, 256, 512, 1024, 2048)),
]
CORRELATIONS = [
    (f"correlation {' x '.join(map(str, shape))}{', forward alone' * (not both)}", shape, both, seconds)
    for shape, seconds in (((128, 128, 64, 1), 3), ((32, 512, 512, 2), 8), ((8, 1024, 1024, 3), 10))
    for both in (False, True)
]


@pytest.mark.parametrize(("name", "shape", "options", "seconds"), LOSSES, ids=lambda v: v if isinstance(v, str) else "")
def bench_rbf_correlation_loss(name, shape, options, seconds, report):
    if SMOKE:
        shape, seconds = tuple(min(n, 20) for n in shape), 0.01
    inputs = CorrelationCase("", shape, layout="rows", **options).make(DEVICE)  # vectors as truncated_svd gives them
    for x in inputs[:2]:
        x.requires_grad_()
    few = [x.detach()[:1] for x in inputs]
    error = abs(rbf_correlation_loss(*few).item() / reference.rbf_correlation_loss(*(x.double() for x in few)).item() - 1)
    assert error < 1e-6
    functions = {"fused": rbf_correlation_loss, "eager": reference.rbf_correlation_loss}
    functions["Inductor"] = torch.compile(reference.rbf_correlation_loss, dynamic=False)
    calls = {k: forward_backward(f, *inputs) for k, f in functions.items()}
    times = time_interleaved(calls, seconds=seconds)
    report(name, calls["fused"], times, error=error)


@pytest.mark.parametrize(("name", "shape", "both", "seconds"), CORRELATIONS, ids=lambda v: v if isinstance(v, str) else "")
def bench_rbf_correlation(name, shape, both, seconds, report):
    if SMOKE:
        shape, seconds = tuple(min(n, 20) for n in shape), 0.01
    x, y = CorrelationCase("", shape).make(DEVICE)[:2]
    error = (rbf_correlation(x[:1], y[:1]) - reference.rbf_correlation(x[:1].double(), y[:1].double())).abs().max().item()
    assert error < 5e-7
    functions = {"fused": rbf_correlation, "eager": reference.rbf_correlation}
    functions["Inductor"] = torch.compile(reference.rbf_correlation, dynamic=False)
    if both:
        x.requires_grad_()
        y.requires_grad_()
        upstream = torch.randn(shape, device=DEVICE)
        calls = {k: (lambda f=f: torch.autograd.grad(f(x, y), (x, y), upstream)) for k, f in functions.items()}
        passes = 2  # written in the forward; the upstream gradient read
    else:
        calls = {k: (lambda f=f: f(x, y)) for k, f in functions.items()}
        passes = 1
    times = time_interleaved(calls, seconds=seconds)
    limit = passes / 2 * copy_seconds(x.element_size() * torch.Size(shape).numel())
    share = limit / sorted(times["fused"])[len(times["fused"]) // 2]
    report(name, calls["fused"], times, **{"of copy limit": share, "error": error})
