"""The Triton kernels of truncated_svd and align_singular_vectors.

The interpreter is slow, so there are few shapes, but every named matrix.
"""

import pytest
import torch
from conftest import SVD
from matrix_cases import named_matrices, with_layout, with_singular_values
from svd_checks import check_omitted_matrices, check_signs, check_triplets
from tolerances import rounding

from kdkernels import reference, truncated_svd
from kdkernels.options import Implementation, Sign
from kdkernels.testing import implementation

pytest.importorskip("triton")


@pytest.fixture
def svd():
    return SVD("cuda" if torch.cuda.is_available() else "cpu", "triton")


def _loss(upstream, outputs):
    return sum((output * upstream[name].to(output)).sum() for name, output in zip("usv", outputs, strict=True) if output is not None)


def _upstream(x, k):
    g = torch.Generator().manual_seed(5)
    m, n = x.shape[-2:]
    shapes = {"u": (len(x), m, k), "s": (len(x), k), "v": (len(x), n, k)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("m", "n", "k", "layout", "dtype"),
    [
        (8, 5, 3, "rows", torch.float32),
        (6, 11, 2, "columns", torch.float64),
        (12, 10, 2, "columns", torch.float32),
        (4, 20, 1, "part", torch.float32),
    ],
)
def test_every_named_matrix(m, n, k, layout, dtype, svd):
    """The results agree with LAPACK in float64.

    The gradient is finite, and agrees with float64 if the values are separated.
    """
    named = named_matrices(m, n)
    exact = torch.stack([batch[0] for batch in named.values()])
    x = with_layout(exact.to(dtype).to(svd.device), layout).detach().requires_grad_()
    u, s, v = outputs = svd(x, k, return_u=True)
    for i, name in enumerate(named):
        sample = slice(i, i + 1)
        try:
            check_triplets(x[sample].detach(), k, u[sample], s[sample], v[sample])
            check_signs(v[sample])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    upstream = _upstream(x, k)
    _loss(upstream, outputs).backward()
    assert x.grad.isfinite().all()
    assert layout == "part" or x.grad.stride() == x.stride()
    float64_input = x.detach().double().requires_grad_()
    _loss(upstream, reference.truncated_svd(float64_input, k, return_u=True)).backward()
    for i, name in enumerate(named):
        squares = torch.linalg.svdvals(x[i].detach().double()) ** 2
        relative = squares / squares[0]
        gaps = (relative[:k, None] - relative[None]).abs()
        gaps[torch.arange(k), torch.arange(k)] = 1
        gap = max(min(gaps.min().item(), relative[k - 1].item()), 1e-100)
        limit = rounding(dtype) * (64 + (m + n) ** 0.5) / gap * (8 if dtype == torch.float64 else 1)
        limit += ((1e-6 if dtype == torch.float32 else 1e-12) / gap) ** 2
        # torch's gradient is NaN if discarded values are equal.
        if limit < 0.1 and 1e-20 < squares[0] < 1e20 and float64_input.grad[i].isfinite().all():
            scale = torch.maximum(float64_input.grad[i].norm(), squares[0] ** -0.5)
            assert (x.grad[i].double() - float64_input.grad[i]).norm() <= limit * scale, name


def test_without_u(svd):
    """Without the vectors of the larger side, another kernel fixes the signs.

    Values and vectors are the same.
    """
    named = named_matrices(11, 6)
    x = torch.stack([named[name][0] for name in ("relu", "graded", "zero", "one huge")]).float().to(svd.device)
    x[3, 0, 0] = float("inf")
    _, s, v = svd(x, 3)
    _, expected_s, expected_v = svd(x, 3, return_u=True)
    torch.testing.assert_close(s, expected_s, rtol=0, atol=20 * rounding(torch.float32) * float(s[:3].max()), equal_nan=True)
    assert torch.equal(v[:3], expected_v[:3])
    assert v[3].isnan().all()
    assert s[3].isnan().all()
    check_signs(v[:3])


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_matrices_of_several_blocks(dtype, svd):
    """More rows than a block holds, with an ill-conditioned matrix that takes several rounds, and
    one with a NaN.
    """
    m, n, k = 50, 36, 3
    graded = with_singular_values(10.0 ** -torch.arange(n), m, n)
    x = torch.stack([named_matrices(m, n)["relu"][0], graded, named_matrices(m, n)["gauss"][0]]).to(dtype).to(svd.device).requires_grad_()
    broken = x.detach().clone()
    broken[2, 5, 5] = float("nan")
    u, s, v = svd(x, k, return_u=True)
    check_triplets(x.detach(), k, u, s, v)
    upstream = _upstream(x, k)
    _loss(upstream, (u, s, v)).backward()
    float64_input = x.detach().double().requires_grad_()
    _loss(upstream, reference.truncated_svd(float64_input, k, return_u=True)).backward()
    for i, limit in ((0, 2e3), (2, 1e4)):  # divided by the smallest gap of squares, about 1 / 10 and 1 / 50
        assert (x.grad[i].double() - float64_input.grad[i]).norm() <= limit * rounding(dtype) * float64_input.grad[i].norm()
    assert x.grad.isfinite().all()
    leaf = broken.requires_grad_()
    bu, bs, bv = svd(leaf, k, return_u=True)
    for a, b in ((u, bu), (s, bs), (v, bv)):
        assert torch.equal(a[:2], b[:2])
        assert b[2].isnan().all()
    _loss(upstream, (bu, bs, bv)).backward()
    assert torch.equal(leaf.grad[:2], x.grad[:2])
    assert leaf.grad[2].isnan().all()


def test_half_precision_and_backward_without_state(svd):
    x = torch.randn(2, 12, 10, device=svd.device).relu().bfloat16().requires_grad_()
    u, s, v = svd(x, 2, return_u=True)
    check_triplets(x.detach(), 2, u, s, v)
    _loss(_upstream(x, 2), (u, s, v)).backward()
    assert x.grad.dtype == torch.bfloat16
    op = torch.ops.kdkernels.truncated_svd_backward
    arguments = (torch.ones_like(u), None, torch.ones_like(v), x.detach().float(), u.detach(), s.detach(), v.detach())
    state = torch.ops.kdkernels.truncated_svd(x.detach().float(), 2, Sign.MAX_ABS, True, 1e-6, True, Implementation.TRITON)[3]
    with_state, without = (op(*arguments, t, 1e-6, Implementation.TRITON) for t in (state, state[:0]))
    torch.testing.assert_close(with_state, without, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="state must be that of the forward"):
        op(*arguments, state[:-1], 1e-6, Implementation.TRITON)
    empty = torch.randn(0, 5, 3, device=svd.device, requires_grad=True)
    svd(empty, 2)[2].sum().backward()
    assert empty.grad.shape == empty.shape


def test_too_large_matrices_raise(svd):
    with pytest.raises(ValueError, match="takes matrices whose smaller side is at most 1024"):
        svd(torch.ones(1, 1025, 1026, device=svd.device), 1)
    with pytest.raises(ValueError, match="takes matrices whose smaller side"):
        svd(torch.ones(1, 128, 128, device=svd.device), 100)


@pytest.mark.parametrize("flip", ["teacher", "student"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_align(dtypes, flip, svd):
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, n, generator=g).to(dtype).to(svd.device) for n, dtype in zip((4, 3), dtypes, strict=True))
    for weight in (None, torch.rand(2, 3, generator=g).to(svd.device)):
        results = []
        for align in (svd.align, reference.align_singular_vectors):
            inputs = [t if t is None else t.detach().clone().requires_grad_() for t in (student, teacher, weight)]
            if align is reference.align_singular_vectors:
                inputs = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
            outputs = align(*inputs, flip=flip)
            sum((o * torch.cos(torch.arange(o.numel(), device=o.device)).view(o.shape)).sum() for o in outputs).backward()
            results.append([*outputs, *(t.grad for t in inputs if t is not None)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-2 if actual.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_error_names_missing_requirements(monkeypatch):
    x = torch.ones(1, 3, 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 in the environment"):
        implementation("triton")(truncated_svd)(x, 1)
    monkeypatch.setattr("kdkernels.ops.truncated_svd_implementations.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="which is not installed: pip install triton"):
        implementation("triton")(truncated_svd)(x, 1)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_invalid_matrix_omitted_by_a_loss_gets_no_gradient(shape, svd):
    check_omitted_matrices(svd, 3, shape, 2, torch.float32)
