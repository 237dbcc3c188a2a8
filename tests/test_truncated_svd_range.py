"""truncated_svd with denormal and huge matrices, whose squares, sums or singular values underflow
or overflow.
"""

import math

import pytest
import testing_ops  # noqa: F401  registers the implementation "cuda" on CPU tensors
import torch
from matrix_cases import with_singular_values
from svd_checks import check_signs
from tolerances import rounding

from kdkernels import reference, truncated_svd
from kdkernels.testing import implementation

IMPLEMENTATIONS = ["fastest", "cuda", "torch"]
# Powers of two, so that scaling is exact unless entries are denormal.
SCALES = {torch.float32: [2.0**-133, 2.0**-110, 2.0**-60, 2.0**70, 2.0**125, 2.0**127], torch.float64: [2.0**-1030, 2.0**-700, 2.0**600, 2.0**1023]}


def _case(m, n, dtype, scale):
    """Return a matrix of `dtype` with this scale, the same matrix in float64 divided by the scale,
    and log2 of the scale.
    """
    s = torch.linspace(1.0, 0.4, min(m, n)) ** 2
    base = torch.stack([with_singular_values(s, m, n, seed) for seed in range(3)])
    base = base / base.abs().max() * 0.99
    x = base.to(dtype) * torch.tensor(scale, dtype=dtype)
    assert x.isfinite().all()
    assert (x != 0).any()
    e = round(math.log2(scale))
    return x, _times_power_of_two(x.double(), -e), e


def _times_power_of_two(t, e):
    """Return t 2^e, multiplied in two steps because 2^e may be out of range."""
    for part in (e // 2, e - e // 2):
        t = t * 2.0**part
    return t


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(SCALES), ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(9, 6, 2), (6, 9, 6), (1, 4, 1), (110, 120, 1)])
def test_vectors_values_and_gradients_at_extreme_scales(m, n, k, dtype, kernels):
    if max(m, n) > 50 and kernels != "fastest":
        pytest.skip("one size shows it")
    g = torch.Generator().manual_seed(1)
    gu0, gs, gv0 = (torch.randn(3, *shape, generator=g, dtype=torch.float64) for shape in ((m, k), (k,), (n, k)))
    for scale in SCALES[dtype]:
        x, unit, e = _case(m, n, dtype, scale)
        small = 2.0**-20 if scale < 1 else 1.0  # gradients of vectors are proportional to 1 / scale: keep them from overflowing
        gu, gv = small * gu0, small * gv0
        squares = torch.linalg.svdvals(unit) ** 2
        gaps = (squares[..., :k, None] - squares[..., None, :]).abs() / squares[..., :1, None]
        gaps[..., torch.arange(k), torch.arange(k)] = 1
        gap = min(gaps.min().item(), (squares[..., k - 1] / squares[..., 0]).min().item())
        limit = rounding(dtype) * (64 + (m + n) ** 0.5) / gap * (8 if dtype == torch.float64 else 1)
        digits = 2.0 ** -min(24 if dtype == torch.float32 else 53, e + (149 if dtype == torch.float32 else 1074))
        leaf = x.clone().requires_grad_()
        u, s, v = implementation(kernels)(truncated_svd)(leaf, k, return_u=True)
        float64_input = unit.requires_grad_()
        wu, ws, wv = reference.truncated_svd(float64_input, k, return_u=True)
        largest = torch.finfo(dtype).max
        expected = _times_power_of_two(ws.detach(), e)
        torch.testing.assert_close(s.detach().double(), expected.to(dtype).double(), rtol=100 * rounding(dtype) + 4 * digits, atol=0)
        check_signs(v)
        close = {"rtol": 0, "atol": limit}
        torch.testing.assert_close(v.detach().double(), wv.detach(), **close)
        torch.testing.assert_close(u.detach().double(), wu.detach(), **close)
        for upstream in ("v", "s", "usv"):
            actual = [t for name, t in zip("usv", (u, s, v), strict=True) if name in upstream]
            cotangents = [t for name, t in zip("usv", (gu, gs, gv), strict=True) if name in upstream]
            (got,) = torch.autograd.grad(actual, leaf, [t.to(dtype) for t in cotangents], retain_graph=True)
            # The gradient through vectors is divided by the scale, that of the values is not.
            vectors = [(t, c) for name, t, c in zip("uv", (wu, wv), (gu, gv), strict=True) if name in upstream]
            true = torch.zeros_like(unit)
            if vectors:
                (part,) = torch.autograd.grad([t for t, _ in vectors], float64_input, [c for _, c in vectors], retain_graph=True)
                true = true + _times_power_of_two(part, -e)
            if "s" in upstream:
                true = true + torch.autograd.grad(ws, float64_input, gs, retain_graph=True)[0]
            true = true.clamp(-largest, largest).to(dtype).double()
            assert got.isfinite().all(), f"{scale:.0e} {upstream}"
            magnitude = true.abs().amax((-2, -1), keepdim=True)
            # The result is rounded once more, to a multiple of the smallest denormal number.
            allowed = (limit + 30 * digits / gap) * magnitude + 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert ((got.double() - true).abs() <= allowed).all(), f"{scale:.0e} {upstream}: {((got.double() - true).abs() / magnitude).max():.1e}"


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_overflowing_singular_value(kernels):
    """Entries of 3e38 fit into float32, but the singular value overflows to infinity.

    Vectors and gradients are still correct.
    """
    base = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5 + 0.5
    x = (3e38 * base).float().requires_grad_()
    _, s, v = implementation(kernels)(truncated_svd)(x, 2)
    assert s[:, 0].isinf().all()
    float64_input = x.detach().double().requires_grad_()
    _, _ws, wv = reference.truncated_svd(float64_input, 2)
    torch.testing.assert_close(v.detach().double(), wv.detach(), rtol=0, atol=1e-4)
    upstream = torch.zeros_like(v)
    upstream[..., 0] = torch.arange(5)
    (got,) = torch.autograd.grad(v, x, upstream * 1e20)
    (true,) = torch.autograd.grad(wv, float64_input, upstream.double() * 1e20)
    assert got.isfinite().all()
    if kernels != "cuda":  # not "cuda": the second value is small here, and these kernels compute the gradient's G from s
        assert (got.double() - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("dtype", list(SCALES), ids=str)
@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_matrices_of_a_batch_with_many_scales_are_independent(dtype, kernels):
    """Matrices of other scales in the batch do not change a single bit."""
    base = torch.rand(6, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = torch.tensor([*SCALES[dtype][:2], 1.0, 1.0, *SCALES[dtype][-2:]], dtype=torch.float64)
    x = (base.to(dtype) * (scales / 2).to(dtype)[:, None, None]).requires_grad_()
    u, s, v = implementation(kernels)(truncated_svd)(x, 2, return_u=True)
    (u.sum() + v.sum()).backward()
    assert x.grad.isfinite().all()
    for i in range(6):
        own = x[i : i + 1].detach().requires_grad_()
        one = implementation(kernels)(truncated_svd)(own, 2, return_u=True)
        (one[0].sum() + one[2].sum()).backward()
        for a, b in zip((u, s, v, x.grad), (*one, own.grad), strict=True):
            if kernels != "torch":
                assert torch.equal(a[i : i + 1], b)
