"""The derivative of truncated_svd, and the op with PyTorch's features (compile, functorch,
autocast).
"""

import pytest
import testing_ops  # noqa: F401  registers the implementation "cuda" on CPU tensors
import torch
from conftest import SVD
from hypothesis import given
from hypothesis import strategies as st
from matrix_cases import LAYOUTS, named_matrices, with_layout, with_singular_values
from svd_checks import check_omitted_matrices
from tolerances import rounding

from kdkernels import reference, truncated_svd
from kdkernels.ops import truncated_svd_torch as plain
from kdkernels.options import Sign
from kdkernels.testing import implementation

OP = torch.ops.kdkernels
DTYPES = [torch.float32, torch.float64]
# Tall and wide shapes. The large ones use the Krylov algorithm in float32.
SHAPES = [(1, 1, 1), (6, 1, 1), (1, 6, 1), (5, 4, 2), (4, 5, 2), (17, 16, 3), (16, 33, 4), (60, 20, 9), (20, 60, 5), (140, 120, 2), (115, 150, 1)]


def _cotangents(x, k, dtype):
    g = torch.Generator().manual_seed(5)
    m, n = x.shape[-2:]
    shapes = {"u": (*x.shape[:-2], m, k), "s": (*x.shape[:-2], k), "v": (*x.shape[:-2], n, k)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(x.device) for name, shape in shapes.items()}


def _gradient(function, x, k, upstream, names, **options):
    x = x.detach().requires_grad_()
    outputs = dict(zip("usv", function(x, k, return_u="u" in names, **options), strict=True))
    sum((outputs[name] * upstream[name].to(outputs[name].dtype)).sum() for name in names).backward()
    return x.grad


def _with_separated_values(m, n, seed=0):
    """Return matrices whose singular values are well separated, and none of them small."""
    p = min(m, n)
    s = torch.linspace(2.0, 1.0, p + 1)[:p] ** 2 * torch.linspace(1, 0.7, p)
    return torch.stack([with_singular_values(s, m, n, seed + i) for i in range(3)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_against_float64_autograd(m, n, k, dtype, svd):
    """Functions of s, of v, and of u, s and v, in every layout."""
    device = svd.device
    for name, exact in (("relu", named_matrices(m, n)["relu"] + 1e-3 * named_matrices(m, n)["gauss"]), ("distinct", _with_separated_values(m, n))):
        x = exact.to(dtype).to(device)
        upstream = _cotangents(x, k, dtype)
        squares = torch.linalg.svdvals(x.double()) ** 2
        relative = squares / squares[..., :1]
        gaps = (relative[..., :k, None] - relative[..., None, :]).abs()
        gaps[..., torch.arange(k), torch.arange(k)] = 1
        gap = min(gaps.min().item(), relative[..., k - 1].min().item())
        limit = rounding(dtype) * (64 + (m + n) ** 0.5) / gap * (8 if dtype == torch.float64 else 1)
        gap_eps = 1e-6 if dtype == torch.float32 else 1e-12
        limit += (gap_eps / gap) ** 2
        for names in ("s", "v", "usv"):
            expected = _gradient(reference.truncated_svd, x.double(), k, upstream, names)
            # Upstream gradients are about 1, so the gradient through vectors is about 1 / sigma.
            scale = torch.maximum(torch.linalg.matrix_norm(expected), squares[..., 0] ** -0.5)[..., None, None]
            for layout in LAYOUTS:
                given = with_layout(x, layout)
                got = _gradient(svd, given, k, upstream, names)
                error = (torch.linalg.matrix_norm((got.double() - expected) / scale)).max().item()
                if expected.abs().max() > 1e-9:  # a vector of one entry has no derivative
                    assert error <= limit, f"{name} {names} {layout}: {error:.2e}, allowed {limit:.2e}"
                if layout in ("rows", "columns") and min(m, n) > 1:
                    assert got.stride() == given.stride()


@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40), (130, 140), (64, 16)])
def test_unused_small_values_do_not_reduce_accuracy(m, n, svd):
    """A small second singular value does not reduce the accuracy if only the first triplet is used.

    In SVD-KD the student has a spare vector that is seldom used. Here the second value is a
    hundredth of the first. Some samples use the second triplet too.
    """
    p = min(m, n)
    values = torch.cat([torch.tensor([1.0, 0.01]), 0.005 * torch.linspace(1, 0.5, p - 2)])
    x = torch.stack([with_singular_values(values, m, n, seed) for seed in range(6)]).float().to(svd.device)
    upstream = {name: g.clone() for name, g in _cotangents(x, 2, torch.float32).items()}
    for g in upstream.values():
        g[:4, ..., 1] = 0
    for names in ("s", "v", "usv"):
        expected = _gradient(reference.truncated_svd, x.double(), 2, upstream, names)
        got = _gradient(svd, x, 2, upstream, names).double()
        scale = torch.linalg.matrix_norm(expected).clamp_min(1.0)
        error = torch.linalg.matrix_norm(got - expected) / scale
        limit = rounding(torch.float32) * (64 + (m + n) ** 0.5)
        assert (error[:4] <= limit).all(), f"{names}: {error[:4].max():.2e}"
        assert (error[4:] <= limit / (0.01**2 - 0.005**2)).all(), f"{names}: {error[4:].max():.2e}"


@pytest.mark.parametrize(("m", "n", "k"), [(40, 24, 4), (24, 40, 4), (200, 180, 4)])
def test_error_is_comparable_to_torch_in_float32(m, n, k, svd):
    device = svd.device
    x = named_matrices(m, n)["relu"].float().to(device)
    upstream = _cotangents(x, k, torch.float32)
    for names in ("s", "v", "usv"):
        exact = _gradient(reference.truncated_svd, x.double(), k, upstream, names)
        actual = _gradient(svd, x, k, upstream, names)
        by_torch = _gradient(reference.truncated_svd, x, k, upstream, names)
        assert (actual - exact).norm() <= 3 * (by_torch - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize(("m", "n"), [(5, 3), (3, 5), (4, 4)])
def test_gradcheck(m, n, svd):
    device = svd.device
    x = _with_separated_values(m, n).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: svd(x, 2, return_u=True), x)
    assert torch.autograd.gradgradcheck(lambda x: svd(x, 2, return_u=True), x)
    assert torch.autograd.gradgradcheck(lambda x: svd(x, 1)[2], x)

    def unsigned(x):  # functions that do not depend on signs
        u, s, v = svd(x, 2, sign=None, return_u=True)
        return v @ v.mT, u * s[..., None, :] @ v.mT, s

    assert torch.autograd.gradcheck(unsigned, x)


def test_known_values(svd):
    device = svd.device
    for x, g, expected in [
        ([[3.0, 0], [0, 2], [0, 0]], [0.0, 1], [[0, 0.6], [0.4, 0], [0, 0]]),
        ([[3.0, 0, 0], [0, 2, 0]], [0.0, 1, 1], [[0, 0.6, 1 / 3], [0.4, 0, 0]]),
    ]:
        x = torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True)
        (svd(x, 1)[2][:, 0] @ torch.tensor(g, dtype=torch.float64, device=device)).backward()
        torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float64, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9), (8, 8), (130, 115)])
def test_gradient_is_finite_for_every_named_matrix(m, n, dtype, svd):
    device = svd.device
    for name, exact in named_matrices(m, n).items():
        x = exact.to(dtype).to(device)
        for k in {1, 4, min(m, n)} if m < 100 else {1, 2}:
            for size in (1.0, 1e30):
                upstream = {key: size * value for key, value in _cotangents(x, k, dtype).items()}
                for names in ("s", "v", "usv"):
                    got = _gradient(svd, x, k, upstream, names)
                    assert got.isfinite().all(), f"{name}, k = {k}, upstream {size}, {names}"


@pytest.mark.parametrize("kernels", ["fastest", "cuda"])
@given(seed=st.integers(0, 10_000), m=st.integers(1, 12), n=st.integers(1, 12), data=st.data())
def test_gradient_is_finite_for_any_matrix(kernels, seed, m, n, data):
    """Matrices of small integers have many zero and repeated singular values."""
    k, levels, exponent = data.draw(st.integers(1, min(m, n))), data.draw(st.integers(1, 3)), data.draw(st.integers(-35, 35))
    g = torch.Generator().manual_seed(seed)
    x = (torch.randint(-levels, levels + 1, (2, m, n), generator=g).double() * 10.0**exponent).float()
    got = _gradient(implementation(kernels)(truncated_svd), x, k, _cotangents(x, k, torch.float32), "usv")
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-7, 0.0])
def test_function_of_the_span_is_exact_at_any_gap(gap, dtype, svd):
    """The projector on span(v) does not depend on the gaps between the kept values, while torch's
    derivative divides by them.
    """
    device = svd.device
    s = torch.tensor([1.0 + gap, 1.0, 0.5, 0.4, 0.3])
    for m, n in ((12, 5), (5, 12)):
        x = with_singular_values(s, m, n)
        target = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

        def distance(v, target=target):
            return (v @ v.mT * target.to(v)).sum()

        # The derivative of the projector P on the span: the Daleckii-Krein formula over pairs of a
        # kept and a discarded value.
        lam, q = torch.linalg.eigh(x.mT @ x)
        kept = lam > 0.6
        weight = torch.zeros(n, n, dtype=torch.float64)
        weight[kept[:, None] & ~kept] = (1 / (lam[:, None] - lam))[kept[:, None] & ~kept]
        weight = weight + weight.mT
        symmetric = q @ (weight * (q.mT @ (target + target.mT) / 2 @ q)) @ q.mT
        expected = 2 * x @ symmetric
        given = x.to(dtype).to(device).requires_grad_()
        distance(svd(given, 2)[2]).backward()
        error = (given.grad.double().cpu() - expected).norm() / expected.norm()
        assert error <= 100 * rounding(dtype), f"{m} x {n}: {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gap_eps_bounds_the_derivative(dtype, svd):
    """The factor of a pair of values with gap d is d / (d^2 + eps^2), which is continuous and
    bounded.
    """
    device = svd.device
    upstream = torch.tensor([[0.0, 1], [0, 0], [0, 0]], dtype=dtype, device=device)  # the component of v_2 along v_1
    for gap_eps in (1e-1, 1e-2, 1e-3):
        for second in (0.5, 0.9, 0.99, 0.999, 1.0):
            x = torch.diag(torch.tensor([1.0, second, 0.1], dtype=dtype, device=device)).requires_grad_()
            _, _, v = svd(x, 2, gap_eps=gap_eps)
            v.backward(upstream.mT.contiguous().mT)
            eps, d = gap_eps * max(1.0, gap_eps), second**2 - 1
            # dv_2 along v_1 is f(lambda_2 - lambda_1) (v_1' dG v_2), dG = x' dx + dx' x
            factor = d / (d**2 + eps**2)
            if second == 1.0:  # the vectors are not unique: check only that the gradient is finite and small
                assert x.grad.abs().max() <= 1e-3 / gap_eps
                continue
            expected = torch.zeros(3, 3, dtype=dtype, device=device)
            expected[0, 1], expected[1, 0] = factor, factor * second
            torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
            assert x.grad.abs().max() <= 1 / gap_eps
    x = torch.randn(4, 6, dtype=dtype, device=device)
    smallest_eps = rounding(dtype)
    for small_eps in (0.0, smallest_eps / 10):
        torch.testing.assert_close(
            _gradient(svd, x, 2, _cotangents(x, 2, dtype), "v", gap_eps=small_eps),
            _gradient(svd, x, 2, _cotangents(x, 2, dtype), "v", gap_eps=smallest_eps),
        )


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (150, 120)], ids=str)
def test_properties_of_the_gradient(shape, svd):
    """Gradient through v: <gradient, x> = 0 because scaling x does not change v, and upstream
    gradients parallel to v_j give 0. Gradient of s: <gradient, x> = s.
    """
    device = svd.device
    x = torch.randn(4, *shape, device=device).relu().requires_grad_()
    _, s, v = svd(x, 2)
    (gradient_of_v,) = torch.autograd.grad(v, x, torch.randn_like(v), retain_graph=True)
    assert ((gradient_of_v * x).sum((1, 2)).abs() <= 1e-4 * gradient_of_v.flatten(1).norm(dim=1) * x.flatten(1).norm(dim=1)).all()
    (parallel,) = torch.autograd.grad(v, x, v.detach() * torch.tensor([2.0, -3.0], device=device), retain_graph=True)
    assert parallel.abs().max() <= 1e-5
    (gradient_of_s,) = torch.autograd.grad(s[..., 1].sum(), x)
    torch.testing.assert_close((gradient_of_s * x).sum((1, 2)), s[..., 1].detach(), rtol=1e-5, atol=0)


def test_invalid_matrix_omitted_by_a_loss_gets_no_gradient_in_plain_torch():
    check_omitted_matrices(SVD("cpu", "torch"), 3, (12, 8), 2, torch.float32)
    check_omitted_matrices(SVD("cpu", "torch"), 3, (8, 12), 2, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(9, 6, 3), (6, 9, 3), (8, 8, 8), (1, 4, 1)])
def test_implementation_in_plain_torch(m, n, k, dtype):
    """The implementation in plain torch gives the same results and the same derivative as the
    kernels.
    """
    for name, exact in named_matrices(m, n).items():
        x = exact.to(dtype)
        u, s, v, state = OP.truncated_svd(x, k, Sign.MAX_ABS, True, 1e-6, True)
        pu, ps, pv, _ = plain.truncated_svd(x, k, Sign.MAX_ABS, True, 1e-6, True)
        assert (pu.shape, pv.shape) == (u.shape, v.shape)
        assert pu.mT.is_contiguous()
        assert pv.mT.is_contiguous()
        torch.testing.assert_close(ps, s, rtol=0, atol=100 * rounding(dtype) * float(s.max()) if s.max() > 0 else 0)
        upstream = _cotangents(x, k, dtype)
        for gap_eps in (1e-6, 1e-2):
            got = plain.truncated_svd_backward(upstream["u"], upstream["s"], upstream["v"], x, u, s, v, state, gap_eps)
            assert got.isfinite().all(), name
            if name in ("gauss", "relu") and k < min(m, n):
                expected = OP.truncated_svd_backward(upstream["u"], upstream["s"], upstream["v"], x, u, s, v, state, gap_eps)
                assert (expected - got).norm() <= 2e4 * rounding(dtype) * got.norm()
    x = exact.clone()
    x[1, 0, 0] = float("nan")
    u, s, v, state = plain.truncated_svd(x, k, Sign.MAX_ABS, True, 1e-6, True)
    got = plain.truncated_svd_backward(None, torch.ones_like(s), torch.ones_like(v), x, u, s, v, state, 1e-6)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_gradient_of_expanded_matrices(svd):
    """The gradient of an expanded matrix is the sum over its copies."""
    device = svd.device
    x = _with_separated_values(9, 6)[:1].float().to(device).requires_grad_()
    upstream = torch.randn(5, 6, 2, device=device)
    (svd(x.expand(5, 9, 6), 2)[2] * upstream).sum().backward()
    wide = x.detach().double().requires_grad_()
    (reference.truncated_svd(wide, 2)[2] * upstream.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)


def test_gradient_of_single_outputs(svd):
    device = svd.device
    x = torch.randn(3, 8, 5, device=device, requires_grad=True)
    u, s, v = svd(x, 2, return_u=True)
    for output in (u, s, v):
        (one,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        assert one.isfinite().all()
        (two,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        assert torch.equal(one, two)
    assert not svd(x.detach(), 2)[1].requires_grad
    with torch.no_grad():
        assert not svd(x, 2)[1].requires_grad


@pytest.mark.parametrize(("m", "n"), [(12, 7), (7, 12), (130, 120)])
def test_opcheck_and_compile(m, n, device):
    svd = SVD(device, "fastest")
    x = torch.randn(3, m, n, device=device).relu().requires_grad_()
    for return_u in (False, True):
        torch.library.opcheck(OP.truncated_svd.default, (x, 2, Sign.MAX_ABS, return_u, 1e-6, False))
    u, s, v, state = OP.truncated_svd(x.detach(), 2, Sign.MAX_ABS, True, 1e-6, True)
    torch.library.opcheck(OP.truncated_svd_backward.default, (u, s, v, x.detach(), u, s, v, state, 1e-6))

    def loss(x):
        _, s, v = svd.features(x.mT.unflatten(2, (-1, 1)), 2)
        return (s[:, None] * v).square().sum() + v[:, 0].sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected, got = loss(x), compiled(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])


def test_functorch(svd):
    device = svd.device
    x = _with_separated_values(6, 4).to(device)

    def value(x):
        _, s, v = svd(x, 2)
        return (s * v[..., 0, :]).sum()

    grad = torch.func.grad(value)(x)
    wanted = x.clone().requires_grad_()
    value(wanted).backward()
    torch.testing.assert_close(grad, wanted.grad)
    single = torch.func.vmap(lambda x: svd(x, 2, return_u=True))(x)
    for a, b in zip(single, svd(x, 2, return_u=True), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(x), wanted.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_change_the_dtype(dtype, svd):
    device = svd.device
    x = torch.randn(3, 9, 5, device=device)
    with torch.autocast(device, dtype=dtype):
        _, s, v = svd(x, 2)
    assert s.dtype == v.dtype == torch.float32
    torch.testing.assert_close(s, svd(x, 2)[1])
