"""The stages of the CPU kernel, each compared with float64."""

import pytest
import testing_ops  # noqa: F401  registers the ops
import torch
from matrix_cases import LAYOUTS, named_matrices, with_layout
from tolerances import rounding

OPS = torch.ops.kdkernels
SIZES = [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 49, 64, 100]
DTYPES = [torch.float32, torch.float64]


def _psd(batch: int, p: int, dtype: torch.dtype) -> torch.Tensor:
    """Return symmetric positive semi-definite matrices of trace 1: Gram matrices, one of rank 1,
    one of zeros, one diagonal, one identity.
    """
    g = torch.randn(batch, p, p + 1, dtype=torch.float64)
    g = g @ g.mT
    v = torch.randn(p, 1, dtype=torch.float64)
    g[0] = v @ v.mT
    g[-1] = 0
    if batch > 3:
        g[1] = torch.diag(torch.arange(1.0, p + 1))
        g[2] = torch.eye(p)
    trace = g.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)
    return (g / trace[:, None, None]).to(dtype)


def _tridiagonal(d, e):
    return torch.diag_embed(d) + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", SIZES)
def test_gram(p, dtype):
    for q in (p, p + 1, 3 * p + 5, 2100 if p == 17 else p + 16):
        x = torch.randn(3, p, q, dtype=dtype)
        for given in [with_layout(x, layout) for layout in LAYOUTS] + [with_layout(x, layout).mT for layout in LAYOUTS]:
            got = OPS._svd_gram(given)
            small = (given.mT if given.shape[1] >= given.shape[2] else given).double()  # smaller side first
            exact = (small @ small.mT).tril()
            scale = small.norm(dim=2)[:, :, None] * small.norm(dim=2)[:, None]
            assert ((got.double() - exact).abs() <= rounding(dtype) * (8 + q**0.5 / 2) * scale).all()
    if dtype == torch.float32:
        half = x.bfloat16()
        torch.testing.assert_close(OPS._svd_gram(half), (half.double() @ half.double().mT).tril().float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", SIZES)
def test_tridiagonal(p, dtype):
    """G = Q T Q^T with an orthogonal Q."""
    g = _psd(19, p, dtype)
    d, e, q = OPS._svd_tridiagonal(g)
    d, e, q = d.double(), e.double(), q.double()
    limit = rounding(dtype) * (8 + 2 * p)
    assert ((q @ q.mT - torch.eye(p, dtype=torch.float64)).abs() <= limit).all()
    assert ((q @ _tridiagonal(d, e) @ q.mT - g.double()).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", SIZES)
def test_bisection(p, dtype):
    d, e, _ = OPS._svd_tridiagonal(_psd(19, p, torch.float64))
    d, e = d.to(dtype), e.to(dtype)
    for k in sorted({1, min(2, p), min(7, p), p}):
        got = OPS._svd_bisection(d, e, k).double()
        exact = torch.linalg.eigvalsh(_tridiagonal(d.double(), e.double())).flip(-1)[:, :k]
        # Rounding errors of the pivots have the effect of a perturbation of the matrix by a few
        # roundings of its norm, which is about 1.
        assert ((got - exact.clamp_min(0)).abs() <= 8 * rounding(dtype)).all()


@pytest.mark.parametrize("p", SIZES)
def test_inverse_iteration(p):
    """The vectors are orthonormal, and T x = lambda x up to rounding, for any gaps."""
    d, e, _ = OPS._svd_tridiagonal(_psd(19, p, torch.float64))
    t = _tridiagonal(d, e)
    k = min(p, 9)
    exact = torch.linalg.eigvalsh(t).flip(-1)[:, :k].contiguous()
    for noise in (0.0, 6e-8):  # eigenvalues with the accuracy of bisection in float64 and in float32
        values, x = OPS._svd_inverse_iteration(d, e, exact * (1 + noise))
        assert ((x @ x.mT - torch.eye(k, dtype=torch.float64)).abs() <= 1e-13 * p).all()
        assert ((x @ t - values[..., None] * x).norm(dim=-1) <= (1e-14 if noise == 0 else 2e-8) * p).all()
        assert ((values - exact).abs() <= (1e-14 if noise == 0 else 1e-9) * p).all()


def test_close_eigenvalues():
    """Clusters of equal and of nearly equal eigenvalues: the vectors are orthonormal and accurate
    although each of them alone is not determined.
    """
    p = 24
    for spread in (0.0, 1e-14, 1e-9, 1e-6):
        cluster = torch.cat([1 + spread * torch.arange(10, 0, -1).double(), torch.full((8,), 0.3), torch.zeros(6)]).double()
        q = torch.linalg.qr(torch.randn(5, p, p, dtype=torch.float64))[0]
        d, e, _ = OPS._svd_tridiagonal((q * cluster / p) @ q.mT)
        t = _tridiagonal(d, e)
        exact = torch.linalg.eigvalsh(t).flip(-1)
        values, x = OPS._svd_inverse_iteration(d, e, exact)
        assert ((x @ x.mT - torch.eye(p, dtype=torch.float64)).abs() <= 1e-14 * p).all(), spread
        # The stage treats eigenvalues within 1e-4 of the largest as one cluster.
        assert ((x @ t - values[..., None] * x).norm(dim=-1) <= max(1e-15 * p, 2 * spread)).all(), spread


@pytest.mark.parametrize(("m", "n"), [(9, 5), (24, 24), (40, 130), (130, 60)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_krylov_algorithm_agrees_with_lapack(m, n, k):
    """The Krylov algorithm on small matrices: it converges or not, and some matrices are out of
    range or contain a NaN.
    """
    for name, exact in named_matrices(m, n).items():
        x = exact.float()
        s, _ = OPS._svd_tier(x, k, True)
        expected = torch.linalg.svdvals(exact.float().double())[:, :k]
        assert ((s - expected).abs() <= rounding(torch.float32) * (12 + (m + n) ** 0.5) * expected[:, :1]).all(), name
    x[1, 0, 0] = float("nan")
    s, v = OPS._svd_tier(x, k, True)
    assert s[1].isnan().all()
    assert v[[0, 2]].isfinite().all()


@pytest.mark.parametrize("upstream", ["random", "ones", "v", "nearly v"])
@pytest.mark.parametrize(("m", "n"), [(70, 100), (100, 70)])
def test_conjugate_gradients_converge_for_every_upstream_gradient(m, n, upstream):
    """Also if almost all of it lies in the span of the kept vectors, so that the right-hand side of
    the solve consists of rounding errors.
    """
    k = 3
    left, right = (torch.linalg.qr(torch.randn(7, side, 70, dtype=torch.float64))[0] for side in (m, n))
    sigma = torch.tensor([4.0, 2.0, 1.5] + [0.6] * 67, dtype=torch.float64) * torch.linspace(1, 0.8, 70, dtype=torch.float64)
    x = (left * sigma @ right.mT).float().requires_grad_()
    v = OPS._svd_tier(x.detach(), k, True)[1].view(7, k, n).mT
    grad = {"random": torch.randn(7, n, k), "ones": torch.ones(7, n, k), "v": v, "nearly v": v + 1e-4 * torch.randn(7, n, k)}[upstream]
    gradient, unsolved = OPS._svd_conjugate_gradients(grad, x.detach())
    assert unsolved == 0
    exact = x.detach().double().requires_grad_()
    of_svd = torch.linalg.svd(exact, full_matrices=False)[2][:, :k].mT
    flip = torch.where((of_svd.detach() * v).sum(1, keepdim=True) < 0, -1.0, 1.0)
    (expected,) = torch.autograd.grad(of_svd * flip, exact, grad.double())
    # Differences of singular values are at least 0.4; the gradient of a vector is about 1 / that.
    assert ((gradient - expected).norm(dim=(1, 2)) <= 100 * rounding(torch.float32) * grad.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("eps", [1e-2, 1e-6])
def test_resolvent(p, eps):
    """Re[(lambda + i eps - T)^-1] multiplies each eigenvector by x / (x^2 + eps^2), for lambda
    equal to, near and far from an eigenvalue.
    """
    d, e, _ = OPS._svd_tridiagonal(_psd(19, p, torch.float64))
    mu, q = torch.linalg.eigh(_tridiagonal(d, e))
    r = torch.randn(19, p, dtype=torch.float64)
    for shift in (mu[:, -1], mu[:, -1] + 1e-4, mu[:, 0] - 0.3):
        x = shift[:, None] - mu
        factor = x / (x**2 + eps**2)
        expected = (q @ (factor * (q.mT @ r[..., None])[..., 0])[..., None])[..., 0]
        got = OPS._svd_resolvent(d, e, shift.contiguous(), eps, r)
        # Rounding T changes x by 1e-16, and the factor by 1e-16 / eps^2.
        assert ((got - expected).norm(dim=1) <= (1e-13 + 4e-16 * p / eps) * expected.norm(dim=1) + 1e-15 * p / eps**2 * r.norm(dim=1)).all()
    zeros = torch.zeros(1, p, dtype=torch.float64)
    assert torch.equal(OPS._svd_resolvent(zeros, zeros[:, 1:], zeros[:, 0].contiguous(), 0.0, r[:1]), zeros)


def test_invalid_calls_raise():
    x, d, e, values = torch.randn(2, 4, 4), torch.rand(2, 4).double(), torch.rand(2, 3).double(), torch.rand(2, 2).double()
    eye = torch.eye(4).expand(2, 4, 4)
    for bad in (torch.randn(4, 4), torch.randn(4), torch.randn(2, 0, 4), torch.randn(2, 4, 0), torch.ones(2, 4, 4, dtype=torch.int64)):
        for call in (OPS._svd_gram, OPS._svd_tridiagonal, lambda bad: OPS._svd_tier(bad, 1, False), lambda bad: OPS._svd_tier(bad, 1, True)):
            with pytest.raises((TypeError, ValueError), match="must be"):
                call(bad)
    calls = [
        (OPS._svd_tier, (x, 0, True), "k"),
        (OPS._svd_tier, (x, -1, False), "k"),
        (OPS._svd_tier, (x, 5, False), "k"),
        (OPS._svd_tridiagonal, (torch.randn(2, 4, 5),), "g"),
        (OPS._svd_tridiagonal, (eye.half(),), "g"),
        (OPS._svd_bisection, (d, e, 0), "k"),
        (OPS._svd_bisection, (d, e, 5), "k"),
        (OPS._svd_bisection, (d, d, 1), "e"),
        (OPS._svd_bisection, (d, e.float(), 1), "e"),
        (OPS._svd_bisection, (d[:, :0], e, 1), "d"),
        (OPS._svd_inverse_iteration, (d, e, values[:1]), "lambda"),
        (OPS._svd_inverse_iteration, (d.float(), e.float(), values.float()), "d"),
        (OPS._svd_resolvent, (d, e, values, 1e-3, d), "lambda"),
        (OPS._svd_resolvent, (d, e, d[:, 0], 1e-3, e), "r"),
    ]
    for op, arguments, name in calls:
        with pytest.raises((TypeError, ValueError), match=f"{name} must"):
            op(*arguments)
    assert [t.shape[0] for t in OPS._svd_tier(x[:0], 1, False)] == [0, 0]
    strided = torch.rand(4, 4).double().T[::2]  # read in place with their strides
    assert torch.equal(OPS._svd_bisection(strided, e, 2), OPS._svd_bisection(strided.contiguous(), e, 2))
