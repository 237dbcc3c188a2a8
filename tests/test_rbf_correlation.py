"""rbf_correlation and its loss against the definitions in higher precision, for every backend, and
known values.
"""

import decimal
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import DEVICES
from correlation_cases import CORRELATION_CASES, CorrelationCase
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, sum_error

from kdkernels import rbf_correlation, rbf_correlation_loss, reference
from kdkernels.options import Reduction

BACKENDS = [*DEVICES, "triton"]


def _device(backend):
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


def _operators(backend):
    """Return the module or namespace that contains the four ops."""
    if backend == "triton":
        from kdkernels.triton import rbf_correlation as kernels

        return kernels
    return torch.ops.kdkernels


def _case(backend, case):
    return case if backend == "cpu" or torch.cuda.is_available() else case.shrink()


def _compute(*features):
    return torch.float64 if torch.float64 in [x.dtype for x in features] else torch.float32


def _exact_loss(inputs, beta):
    """Return the loss of each sample, its gradients, and the sums of the magnitudes of their terms.

    They are computed in numpy's longdouble, and S - T as max(S, T) expm1(-|log S - log T|), because
    a subtraction is inaccurate if S is close to T (even of longdoubles: to 4e-11 for S - T = 1e-9).
    """
    sx, sy, tx, ty = (x.detach().cpu().double().numpy().astype(np.longdouble) for x in inputs)
    with np.errstate(invalid="ignore"):
        ds, dt = sx[:, :, None] - sy[:, None], tx[:, :, None] - ty[:, None]
        s, t = np.exp(-ds * ds / beta), np.exp(-dt * dt / beta)
        log_quotient = ((tx - sx)[:, :, None] - (ty - sy)[:, None]) * (ds + dt) / beta  # log S - log T
        difference = np.sign(log_quotient) * np.maximum(s, t) * -np.expm1(-np.abs(log_quotient))
        to_s, to_t = difference * s * ds * (-4 / np.longdouble(beta)), difference * t * dt * (4 / np.longdouble(beta))
    loss = (difference**2).sum((1, 2, 3))
    gradients = [to_s.sum(2), -to_s.sum(1), to_t.sum(2), -to_t.sum(1)]
    sizes = [np.abs(g).sum(axis) for g, axis in ((to_s, 2), (to_s, 1), (to_t, 2), (to_t, 1))]

    def tensors(arrays):
        return [torch.from_numpy(a.astype(np.float64)) for a in arrays]

    return tensors([loss])[0], tensors(gradients), tensors(sizes)


def test_expected_loss_is_accurate_for_close_correlations():
    torch.manual_seed(0)
    tx, ty = (torch.rand(2, 50, 1, 1, dtype=torch.float64) - 0.5) / 64
    inputs = [tx * (1 + 1e-5 * torch.randn_like(tx)), ty * (1 + 1e-5 * torch.randn_like(ty)), tx, ty]
    for sample, loss in enumerate(_exact_loss(inputs, 0.25)[0].tolist()):
        with decimal.localcontext(decimal.Context(prec=60)):
            sx, sy, tx, ty = (decimal.Decimal(x[sample].item()) for x in inputs)
            exact = ((-4 * (sx - sy) ** 2).exp() - (-4 * (tx - ty) ** 2).exp()) ** 2
        assert loss == pytest.approx(float(exact), rel=1e-13, abs=0)


def _nan_where_not_finite(inputs, loss, gradients):
    """Return the loss and gradients that are specified for columns with a NaN or an infinity."""
    bad = torch.stack([~x.detach().cpu().isfinite().all(1) for x in inputs]).any(0)  # [B, K]
    nan = float("nan")
    return torch.where(bad.any(1), nan, loss), [torch.where(bad[:, None], nan, g) for g in gradients]


@pytest.mark.parametrize("case", CORRELATION_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_of_every_case(case, backend):
    case = _case(backend, case)
    inputs = case.make(_device(backend))
    ops = _operators(backend)
    loss, gradients, sizes = _exact_loss(inputs, case.beta)
    loss, gradients = _nan_where_not_finite(inputs, loss, gradients)
    compute = _compute(*inputs)
    rtol = 1e-6 if compute == torch.float32 else 1e-12
    results = ops.rbf_correlation_loss(*inputs, case.beta, Reduction.NONE, [True] * 4)
    assert results[0].dtype == compute
    # If S = T up to the last digit of a float, the loss consists of rounding errors of its terms.
    assert_close("loss", results[0], loss, rtol=rtol, atol=1e-30)
    if case.edit in ("equal", "constant", "zeros"):
        assert not results[0].any()
    for name, x, got, want, size in zip(("sx", "sy", "tx", "ty"), inputs, results[1:], gradients, sizes, strict=True):
        assert got.dtype == compute
        assert got.stride() == torch.empty_like(x).stride()
        assert_close(f"gradient of {name}", got, want, rtol=rtol, scale=size.nan_to_num(), atol=1e-22)

    total = loss.sum()
    assert_close("sum", ops.rbf_correlation_loss(*inputs, case.beta, Reduction.SUM, [False] * 4)[0], total, rtol=rtol, atol=1e-30)
    upstream = torch.tensor(-1.5, dtype=compute, device=inputs[0].device)
    wanted = [False, True, True, False]
    *partial, _ = (None, *ops.rbf_correlation_loss_backward(upstream, *inputs, case.beta, Reduction.BATCHMEAN, wanted), None)
    for x, got, want, size, required in zip(inputs, partial[1:], gradients, sizes, wanted, strict=True):
        if not required:
            assert got.numel() == 0
            continue
        assert got.dtype == x.dtype
        factor = -1.5 / max(len(x), 1)
        truncated = backend == "triton" and _device(backend) == "cpu"
        assert_close("scaled gradient", got, factor * want, rtol=2 * rtol, scale=size.nan_to_num() * abs(factor), atol=1e-22, truncated=truncated)


@pytest.mark.parametrize("case", CORRELATION_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_correlation_of_every_case(case, backend):
    case = _case(backend, case)
    x, y = case.make(_device(backend))[:2]
    ops = _operators(backend)
    compute = _compute(x, y)
    exact = [v.detach().double().cpu().requires_grad_() for v in (x, y)]
    expected = reference.rbf_correlation(*exact, case.beta)
    out = ops.rbf_correlation(x, y, case.beta)
    assert out.dtype == compute
    assert out.is_contiguous()
    # The exponent has some rounding errors. Below e^-87 the result is denormal in float32.
    exponent = -expected.detach().log().nan_to_num(posinf=0)
    assert_close("correlation", out, expected, rtol=1.0, scale=None, atol=0) if not expected.numel() else None
    limit = sum_error(compute, 1, 8) * (1 + exponent) * expected.detach().nan_to_num()
    floor = 1e-37 if compute == torch.float32 else 1e-300
    assert torch.equal(out.isnan().cpu(), expected.isnan())
    assert ((out.detach().double().cpu() - expected).abs().nan_to_num() <= limit + floor).all()

    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(compute)
    got = ops.rbf_correlation_backward(g.to(out.device), x, y, case.beta)
    want = torch.autograd.grad(expected, exact, g.double())
    terms = (g.double() * expected.detach() * (exact[0][:, :, None] - exact[1][:, None]) * (2 / case.beta) * (1 + exponent)).detach().abs()
    for name, v, grad, expected_gradient, size in zip("xy", (x, y), got, want, (terms.sum(2), terms.sum(1)), strict=True):
        assert grad.dtype == v.dtype
        assert grad.stride() == torch.empty_like(v).stride()
        truncated = backend == "triton" and _device(backend) == "cpu"
        rtol = 2 * sum_error(compute, max(case.shape[1:3]), 16)
        assert_close(f"gradient of {name}", grad, expected_gradient, rtol=rtol, scale=size.nan_to_num(posinf=0), atol=1e-30, truncated=truncated)


# Known values, see docs/rbf_correlation.md.

F1, H1 = (torch.tensor(v, dtype=torch.float64).view(1, 2, 1) for v in ([1.0, 0.0], [0.0, 1.0]))
F2, H2 = (torch.tensor(v, dtype=torch.float64).view(1, 2, 1) for v in ([0.6, 0.8], [0.8, 0.6]))


@pytest.mark.parametrize("correlation", [rbf_correlation, reference.rbf_correlation])
def test_known_correlations(correlation):
    def flat_correlation(x, y):
        return correlation(x, y).flatten().tolist()

    assert flat_correlation(F1, H1) == pytest.approx([math.exp(-1 / 8), 1, 1, math.exp(-1 / 8)], rel=1e-15, abs=0)
    assert flat_correlation(F2, H2) == pytest.approx([0.9950124792, 1, 1, 0.9950124792], rel=1e-9, abs=0)
    assert flat_correlation(F1, -H1) == pytest.approx([math.exp(-1 / 8), math.exp(-1 / 2), 1, math.exp(-1 / 8)], rel=1e-15, abs=0)


@pytest.mark.parametrize("loss", [rbf_correlation_loss, reference.rbf_correlation_loss])
def test_known_losses(loss):
    f, h = F1.clone().requires_grad_(), H1.clone().requires_grad_()
    value = loss(f, h, F2, H2)
    value.backward()
    assert value.item() == pytest.approx(0.0253195100, rel=1e-8, abs=0)
    assert f.grad.flatten().tolist() == pytest.approx([0.0496473239, -0.0496473239], rel=1e-8, abs=0)
    assert h.grad.flatten().tolist() == pytest.approx([-0.0496473239, 0.0496473239], rel=1e-8, abs=0)
    assert loss(F1, H1, F2, H2, reduction="none").tolist() == [value.item()]
    assert loss(*(v.expand(3, 2, 1) for v in (F1, H1, F2, H2)), reduction="batchmean").item() == pytest.approx(value.item(), rel=1e-15, abs=0)


def test_loss_of_half_precision_unit_vectors_is_accurate(device):
    """For unit vectors most correlations round to 1 in half precision, so the loss computed in half
    precision would be 0.
    """
    x = [torch.nn.functional.normalize(torch.randn(1, 512, 1, device=device), dim=1).to(torch.bfloat16) for _ in range(4)]
    assert (reference.rbf_correlation(x[0], x[1]).to(torch.bfloat16) == 1).float().mean() > 0.9
    assert rbf_correlation_loss(*x).item() == pytest.approx(_exact_loss(x, 8.0)[0].item(), rel=1e-6, abs=0)


@pytest.mark.parametrize(("backend", "distance"), list(itertools.product(BACKENDS, [1e-2, 1e-4, 1e-5])))
def test_loss_is_accurate_where_the_direct_sum_cancels(backend, distance):
    case = _case(backend, CorrelationCase("", (2, 256, 128, 2), distance=distance, layout="rows"))
    inputs = case.make(_device(backend))
    exact = _exact_loss(inputs, 8.0)[0].sum().item()
    loss = _operators(backend).rbf_correlation_loss(*inputs, 8.0, Reduction.SUM, [False] * 4)[0].item()
    assert abs(loss / exact - 1) < 1e-6
    if case.shape[1] == 256:  # the direct sum is inaccurate
        direct = abs(reference.rbf_correlation_loss(*inputs).item() / exact - 1)
        assert direct > {1e-2: 0, 1e-4: 0.01, 1e-5: 0.5}[distance]


# The algorithm for a column is chosen by speed alone, so both algorithms must be accurate near the
# threshold.


@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    radius=st.floats(1e-3, 30),
    distance=st.sampled_from([1e-5, 1e-3, 0.1, 1.0]),
    beta=st.sampled_from([0.3, 8.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_loss_and_gradient_for_any_range_of_values(seed, m, n, radius, distance, beta, dtype):
    torch.manual_seed(seed)
    tx, ty = radius * (torch.rand(2, m, 1, dtype=torch.float64) - 0.3), radius * (torch.rand(2, n, 1, dtype=torch.float64) - 0.6)
    inputs = [x.to(dtype) for x in (tx * (1 + distance * torch.randn_like(tx)), ty * (1 + distance * torch.randn_like(ty)), tx, ty)]
    loss, gradients, sizes = _exact_loss(inputs, beta)
    got, *grads = torch.ops.kdkernels.rbf_correlation_loss(*inputs, beta, Reduction.NONE, [True] * 4)
    rtol = 1e-6 if dtype == torch.float32 else 1e-11
    assert_close("loss", got, loss, rtol=rtol, atol=1e-30)
    for grad, want, size in zip(grads, gradients, sizes, strict=True):
        assert_close("gradient", grad, want, rtol=rtol, scale=size, atol=1e-25)


# Properties.


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 20.0]))
def test_symmetries_and_invariances(seed, scale):
    torch.manual_seed(seed)
    sx, sy, tx, ty = (scale * torch.rand(3, n, 2, dtype=torch.float64) for n in (20, 30, 20, 30))
    loss = rbf_correlation_loss(sx, sy, tx, ty)
    close = dict(rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(rbf_correlation_loss(tx, ty, sx, sy), loss, **close)
    torch.testing.assert_close(rbf_correlation_loss(sy, sx, ty, tx), loss, **close)
    torch.testing.assert_close(rbf_correlation_loss(-sx, -sy, -tx, -ty), loss, **close)
    torch.testing.assert_close(rbf_correlation_loss(*(x + 0.7 for x in (sx, sy, tx, ty))), loss, **close)
    order = torch.randperm(20)
    torch.testing.assert_close(rbf_correlation_loss(sx[:, order], sy, tx[:, order], ty), loss, **close)
    torch.testing.assert_close(rbf_correlation_loss(*(2 * x for x in (sx, sy, tx, ty)), beta=32.0), loss, **close)
    assert rbf_correlation_loss(tx, ty, tx, ty) == 0
    twice = [x.repeat(2, 1, 1) for x in (sx, sy, tx, ty)]
    torch.testing.assert_close(rbf_correlation_loss(*twice), 2 * loss, **close)
    torch.testing.assert_close(rbf_correlation_loss(*twice, reduction="batchmean"), loss / 3, **close)
    correlation = rbf_correlation(sx, sy)
    assert ((correlation > 0) & (correlation <= 1)).all()
    torch.testing.assert_close(rbf_correlation(sy, sx), correlation.transpose(1, 2))


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_invalid_sample_does_not_affect_other_samples(scale, device):
    inputs = CorrelationCase("", (3, 150, 140, 2), scale=scale, unit=scale == 1).make(device)
    results = []
    for bad in (False, True):
        sx = inputs[0].clone()
        if bad:
            sx[1, 5, 0] = float("nan")
        sx.requires_grad_()
        loss = rbf_correlation_loss(sx, *inputs[1:], reduction="none")
        kept = torch.where(loss.isfinite(), loss, 0)
        results.append((loss, torch.autograd.grad(kept.sum(), sx)[0]))
    (good_loss, good), (bad_loss, bad) = results
    assert bad_loss.isnan().tolist() == [False, True, False]
    for i in (0, 2):
        assert torch.equal(good_loss[i], bad_loss[i])
        assert torch.equal(good[i], bad[i])
    assert not bad[1].any()  # a sample omitted from the loss has zero gradient


def test_result_does_not_depend_on_the_number_of_threads():
    for scale in (1.0, 40.0):
        inputs = CorrelationCase("", (3, 400, 300, 2), scale=scale, unit=scale == 1).make()
        results, threads = [], torch.get_num_threads()
        for n in (1, 2):
            torch.set_num_threads(n)
            upstream = torch.randn(3, 400, 300, 2, generator=torch.Generator().manual_seed(0))
            loss = torch.ops.kdkernels.rbf_correlation_loss(*inputs, 8.0, Reduction.SUM, [True] * 4)
            results.append([*loss, rbf_correlation(*inputs[:2]), *torch.ops.kdkernels.rbf_correlation_backward(upstream, *inputs[:2], 8.0)])
        torch.set_num_threads(threads)
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


def test_loss_of_2_to_the_32_pairs_fits_in_memory():
    """For 2^16 x 2^16 pairs of one column, each of S, T and their gradients would need 16 GiB."""
    inputs = [x.requires_grad_() for x in CorrelationCase("", (1, 2**16, 2**16, 1), distance=1e-2).make()]
    loss = rbf_correlation_loss(*inputs)
    loss.backward()
    rows = torch.randperm(2**16)[:64]  # estimate the loss from these rows
    part = _exact_loss([inputs[0][:, rows], inputs[1], inputs[2][:, rows], inputs[3]], 8.0)
    assert loss.item() == pytest.approx(part[0].item() * 2**16 / 64, rel=0.5, abs=0)
    assert_close("gradient", inputs[0].grad[:, rows], part[1][0], rtol=1e-6, scale=part[2][0])
