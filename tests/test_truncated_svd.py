"""The forward pass of truncated_svd against LAPACK in float64, known values and properties."""

import pytest
import testing_ops  # noqa: F401  registers the implementation "cuda" on CPU tensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix_cases import LAYOUTS, SHAPES, named_matrices, with_layout, with_singular_values
from svd_checks import check_omitted_matrices, check_signs, check_triplets
from tolerances import rounding

from kdkernels import feature_svd, reference, truncated_svd
from kdkernels.options import Sign
from kdkernels.testing import implementation

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_lapack(shape, dtype, svd):
    device = svd.device
    for name, exact in named_matrices(*shape).items():
        x = exact.to(dtype).to(device)
        for k in sorted({1, min(2, *shape), min(5, *shape), min(*shape)} if max(shape) < 60 else {1, 4}):
            if not svd.supports(*shape, k):
                continue
            for layout in LAYOUTS if name == "relu" else LAYOUTS[:2]:
                given = with_layout(x, layout)
                u, s, v = svd(given, k, return_u=True)
                assert (u.dtype, s.dtype, v.dtype) == (dtype,) * 3
                try:
                    check_triplets(x, k, u, s, v)
                    check_signs(v)
                except AssertionError as error:
                    raise AssertionError(f"{name}, k = {k}, {layout}: {error}") from error
                none, s2, v2 = svd(given, k)
                assert none is None
                assert ((s2 - s).abs() <= (16 + sum(shape) ** 0.5) * rounding(dtype) * s.amax(-1, keepdim=True)).all()
                assert v2.shape == v.shape


@pytest.mark.parametrize(("m", "n", "k"), [(300, 280, 8), (200, 196, 4), (130, 500, 2), (290, 300, 12), (700, 130, 1)])
def test_large_matrices(m, n, k, svd):
    """Matrices for which the Krylov algorithm converges, fails to converge, or is not used because
    of their size.
    """
    device = svd.device
    if not svd.supports(m, n, k):
        pytest.skip("the Triton route has no room for so many vectors")
    g = torch.Generator().manual_seed(3)
    near = torch.cat([torch.linspace(1, 0.999, 12), torch.full((min(m, n) - 12,), 0.998)])
    copies = torch.cat([torch.ones(3), torch.linspace(0.6, 0.1, min(m, n) - 3)])
    batch = [torch.randn(m, n, generator=g).double(), torch.randn(m, n, generator=g).relu().double()]
    batch += [with_singular_values(near, m, n), with_singular_values(copies, m, n), torch.eye(m, n).double(), 1e30 * torch.ones(m, n).double()]
    x = torch.stack(batch).float().to(device)
    for layout in ("rows", "columns"):
        u, s, v = svd(with_layout(x, layout), k, return_u=True)
        check_triplets(x, k, u, s, v)
        check_signs(v)


@pytest.mark.parametrize("n", [33, 64])
def test_errors_of_eigenvectors_do_not_depend_on_the_scale_of_the_gram_matrix(n):
    """The Gram matrix of a random matrix of these sizes is scaled to a trace of almost 1/4, the
    smallest possible, so that its eigenvalues are near the smallest that inverse iteration meets.
    """
    x = torch.randn(600, n, n + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, _ = truncated_svd(x, n // 2, return_u=True)
    gram = x @ x.mT
    residuals = (gram @ u - u * s[:, None] ** 2).norm(dim=1) / s[:, :1] ** 2
    assert (residuals <= (8 + n**0.5) * rounding(torch.float64)).all()


def _check_residuals(x, k):
    """Check that truncated_svd of x gives orthonormal triplets with small residuals, for any gaps.

    LAPACK's singular values of clusters of this kind have errors of their own. A vector can mix
    with one that k leaves out if their values differ by some roundings: the residual of such a
    vector has been up to 1.02 times the bound of svd_checks, so 1.1 times is allowed.
    """
    m, n = x.shape[-2:]
    eps = rounding(x.dtype) * (8 if x.dtype == torch.float64 else 1)
    x, *triplets = (t.double() for t in (x, *truncated_svd(x, k, return_u=True)))
    u, s, v = triplets
    length = (m + n) ** 0.5
    for vectors in (u, v):
        assert ((vectors.mT @ vectors - torch.eye(k, dtype=torch.float64)).abs() <= eps * (8 + length)).all()
    for a, left, right in ((x, u, v), (x.mT, v, u)):
        assert ((a @ right - left * s[..., None, :]).norm(dim=-2) <= 1.1 * eps * (16 + length) * s[..., :1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    seed=st.integers(0, 999),
    p=st.sampled_from([12, 17, 31, 33, 40, 64, 100]),
    wider=st.sampled_from([0, 1, 9, 30]),
    fewer=st.sampled_from([0, 1, 10]),
    clusters=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 5, 10, 20]),
            st.sampled_from([0, 1e-15, 1e-13, 1e-10, 1e-7, 1e-5]),
            st.sampled_from([0.9, 0.5, 0.999, 0.9999, 0.99999, 0.3]),
        ),
        min_size=1,
    ),
)
def test_clusters_of_singular_values(dtype, seed, p, wider, fewer, clusters):
    """Any number of clusters of any width, next to each other or far apart."""
    value, parts = 1.0, []
    for count, spread, ratio in [*clusters, (p, 1e-14, 1.0)]:
        parts.append(value * (1 - spread * torch.arange(count).double()))
        value *= ratio
    s = torch.cat(parts)[:p].sort(descending=True).values
    _check_residuals(torch.stack([with_singular_values(s, p, p + wider, seed + i) for i in range(3)]).to(dtype), p - fewer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(12, 12, 12), (33, 20, 7), (40, 64, 40), (70, 64, 64), (130, 90, 4)])
def test_orthogonal_rows(m, n, k, dtype):
    """With rows of equal length, or a diagonal matrix, T is diagonal up to rounding errors, so its
    eigenvectors are unit vectors. With other lengths it is not.
    """
    p = min(m, n)
    lengths = (torch.ones(p), torch.full((p,), 3e-5), 1 + torch.arange(p) % 3, 1 + 1e-13 * torch.arange(p))
    matrices = [torch.linalg.qr(torch.randn(max(m, n), p, dtype=torch.float64))[0] * s.double() for s in lengths]
    for diagonal in (torch.linspace(0.4, 1, p), torch.linspace(-1, 1, p), 1.0 * (torch.arange(p) < p // 2)):
        matrices.append(torch.eye(max(m, n), p, dtype=torch.float64)[:, torch.randperm(p)] * diagonal[torch.randperm(p)])
    x = torch.stack([a if m >= n else a.mT for a in matrices]).to(dtype)
    _check_residuals(x, k)
    random = torch.randn(9, m, n, dtype=dtype)
    mixed = truncated_svd(torch.cat([random[:4], x, random]), k, return_u=True)
    for i in range(len(x)):
        for whole, alone in zip(mixed, truncated_svd(x[i : i + 1], k, return_u=True), strict=True):
            assert torch.equal(whole[4 + i], alone[0])


@given(scale=st.integers(-30, -20), small=st.integers(-60, -40), multiple=st.integers(1, 7), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_zero_singular_values_of_nearly_diagonal_gram_matrices(scale, small, multiple, seed, dtype):
    """Rounding makes an eigenvalue of T that is 0 slightly negative."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, 3, 32, dtype=torch.float64)
    x[0, 0, 1:] = torch.randint(1, 8, (31,), generator=generator) * 2.0**scale
    x[0, 0, 0] = 2.0**small * torch.randint(1, 8, (1,), generator=generator)
    x[0, 1] = multiple * x[0, 0]
    x[0, 2, 0] = 1
    expected = torch.linalg.svdvals(x)
    truncated_svd(torch.randn(1, 3, 32, dtype=torch.float64, generator=generator), 3)  # leaves numbers in the working memory
    _, s, _ = truncated_svd(x.to(dtype), 3)
    assert ((s - expected).abs() <= 8 * torch.finfo(dtype).eps * expected[..., :1]).all()
    _check_residuals(x.to(dtype), 3)


@pytest.mark.parametrize(
    ("rows", "columns", "diagonal", "constant", "k"),
    [
        (309, 309, 0.2859366, 5.1276e-6, 1),
        (1000, 1000, 0.2859366, 5e-6, 1),
        (199, 398, 1.0, 1e-4, 1),
        (48, 96, 1.0, 1e-4, 8),
        (264, 932, 0.0, 0.0277133, 1),
        (149, 149, 1.0, 1.97997e-6, 3),
        (196, 196, 1.0, 1 / 196, 196),
    ],
)
def test_sums_of_equal_terms_have_small_errors(rows, columns, diagonal, constant, k):
    """Matrices with equal entries: rounding errors of long sums would all have the same sign."""
    blocks = [diagonal * torch.eye(rows, min(rows, columns)).double() + constant] * max(1, columns // rows)
    matrix = torch.cat(blocks, 1)[:, :columns].float() if diagonal else torch.full((rows, columns), constant)
    bound = rounding(torch.float32) * (6 + (rows + columns) ** 0.5 / 2)
    for x in (matrix, matrix.mT, matrix.mT.contiguous()):
        exact = torch.linalg.svdvals(x.double())[:k]
        _, s, _ = truncated_svd(x, k, return_u=True)
        assert ((s - exact).abs() <= bound * exact[0]).all()
        if k < rows:  # else square roots of eigenvalues exceed the bound: docs/truncated_svd.md
            assert ((truncated_svd(x, k)[1] - exact).abs() <= bound * exact[0]).all()
        _check_residuals(x, k)


@given(
    rows=st.sampled_from([2, 8, 20, 33, 48, 64, 96, 120, 149, 160, 196, 256]),
    k=st.sampled_from([1, 2, 3, 16, 256]),
    diagonal=st.floats(0.1, 2.0),
    exponent=st.floats(-7, 0),
    twice=st.booleans(),
    transposed=st.booleans(),
)
def test_errors_of_d_i_plus_c_are_those_in_the_docs(rows, k, diagonal, exponent, twice, transposed):
    """docs/truncated_svd.md states the largest errors, in multiples of the bounds."""
    k = min(k, rows)
    x = (diagonal * torch.eye(rows).double() + 10**exponent).float()
    x = torch.cat([x, x], 1) if twice else x
    x = x.mT if transposed else x
    exact, length, eps = torch.linalg.svdvals(x.double()), sum(x.shape) ** 0.5, rounding(torch.float32)
    u, s, v = (t.double() for t in truncated_svd(x, k, return_u=True))
    bound = eps * (6 + length / 2) * exact[0]
    assert (s - exact[:k]).abs().max() <= 1.4 * bound
    assert (truncated_svd(x, k)[1] - exact[:k]).abs().max() <= 5 * bound
    for left, right, matrix in ((u, v, x.double()), (v, u, x.mT.double())):
        assert (matrix @ right - left * s).norm(dim=0).max() <= 1.2 * eps * (16 + length) * exact[0]


@pytest.mark.parametrize("kernels", ["fastest", "cuda"])
def test_lost_vectors_of_clusters_are_replaced_within_the_space_of_the_cluster(kernels):
    """Cases in which nothing is left of a vector of a cluster when it is made orthogonal to the
    others, so that a new one must converge to the space of the cluster.
    """
    s = torch.ones(31).double()
    s[15:] = 0.3
    far = [(1, 1, 1e-12), (2, 0.9999, 1e-13), (10, 0.9989, 1e-13), (20, 0.49945, 1e-7), (67, 0.2, 1e-2)]
    wide = [(10, 1.0, 0.0), (1, 0.5, 1e-14), (89, 0.15, 1e-6)]
    with implementation(kernels):
        _check_residuals(torch.stack([with_singular_values(s, 31, 40, seed) for seed in range(3)]).float(), 30)
        for clusters, seeds, k in ((far, range(456368800, 456368808), 33), (wide, range(234950407, 234950415), 50)):
            s = torch.cat([value * (1 - spread * torch.arange(count).double()) for count, value, spread in clusters])
            _check_residuals(torch.stack([with_singular_values(s, 100, 109, seed) for seed in seeds]).mT.float(), k)


@pytest.mark.parametrize("kernels", ["fastest", "cuda"])
@pytest.mark.parametrize("spread", [1e-15, 1e-14, 1e-13, 1e-12])
def test_singular_values_that_differ_by_some_roundings(kernels, spread):
    s = torch.cat([torch.ones(1).double(), 0.5 * (1 - spread * torch.arange(20).double()), torch.linspace(0.2, 0.18, 19).double()])
    with implementation(kernels):
        _check_residuals(torch.stack([with_singular_values(s, 40, 49, seed) for seed in range(8)]), 25)


@pytest.mark.parametrize(("m", "n", "count"), [(6, 8, 1), (8, 8, 9), (16, 30, 3), (36, 33, 9), (70, 80, 1)])
def test_all_triplets(m, n, count):
    """Batches of a few matrices and most of their triplets: other layouts and methods than for many
    matrices and few triplets.
    """
    p = min(m, n)
    for name, matrices in named_matrices(m, n).items():
        for dtype in DTYPES:
            x = matrices.repeat(3, 1, 1)[:count].to(dtype)
            for k in (p, p // 2 + 1):
                u, s, v = truncated_svd(x, k, return_u=True)
                try:
                    check_triplets(x[:3], k, u[:3], s[:3], v[:3])
                except AssertionError as error:
                    raise AssertionError(f"{name}, k = {k}, {dtype}: {error}") from error
                assert torch.equal(truncated_svd(x[-1], k, return_u=True)[2], v[-1])


def test_known_values(svd):
    device = svd.device
    x = torch.tensor([[3.0, 0], [0, 2], [0, 0]], device=device)
    u, s, v = svd(x, 2, return_u=True)
    torch.testing.assert_close(s, torch.tensor([3.0, 2.0], device=device))
    torch.testing.assert_close(v, torch.eye(2, device=device))
    torch.testing.assert_close(u, torch.eye(3, 2, device=device))
    _, s, v = svd(-x.mT, 1)
    torch.testing.assert_close(s, torch.tensor([3.0], device=device))
    torch.testing.assert_close(v, torch.eye(3, 1, device=device))


def test_sign_is_that_of_the_first_of_tied_entries(svd):
    device = svd.device
    v = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, device=device)
    for flipped in (v, -v):
        x = torch.arange(1.0, 7, dtype=torch.float64, device=device)[:, None] * flipped
        u, _, got = svd(x, 1, return_u=True)
        assert abs(got[0, 0].item()) == pytest.approx(0.5)
        check_signs(got)
        torch.testing.assert_close(u @ torch.linalg.svdvals(x)[:1, None] @ got.mT, x)
    _, _, unsigned = svd(x, 1, sign=None)
    torch.testing.assert_close(unsigned.abs(), got.abs())


@pytest.mark.parametrize("kernels", ["fastest", "cuda"])
@given(m=st.integers(1, 40), n=st.integers(1, 40), data=st.data())
def test_any_matrix(kernels, m, n, data):
    """Entries of any magnitude, many of them equal or zero."""
    k = data.draw(st.integers(1, min(m, n)))
    exponent = data.draw(st.integers(-30, 30))
    pool = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6))
    seed = data.draw(st.integers(0, 1000))
    choice = torch.randint(len(pool), (2, m, n), generator=torch.Generator().manual_seed(seed))
    x = (torch.tensor(pool, dtype=torch.float64)[choice] * 10.0**exponent).float()
    u, s, v = implementation(kernels)(truncated_svd)(x, k, return_u=True)
    check_triplets(x, k, u, s, v)
    check_signs(v)


@given(seed=st.integers(0, 1000), m=st.integers(2, 30), n=st.integers(2, 30), scale=st.floats(0.01, 100))
def test_invariances(seed, m, n, scale):
    """Rotating or permuting rows does not change v, permuting columns permutes v, scaling scales s,
    and transposing swaps u and v.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=g, dtype=torch.float64)
    k = min(2, m, n)
    squares = torch.linalg.svdvals(x) ** 2
    tol = 1e-12 * float(squares[0] / (squares[:-1] - squares[1:]).min()) + 1e-12 * float(squares[0] / squares[k - 1])
    u, s, v = truncated_svd(x, k, return_u=True)
    rows, columns = torch.randperm(m, generator=g), torch.randperm(n, generator=g)
    rotation = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]
    close = {"rtol": 0, "atol": min(tol, 0.5)}
    torch.testing.assert_close(truncated_svd(x[rows], k)[2], v, **close)
    torch.testing.assert_close(truncated_svd(rotation @ x, k)[2].abs(), v.abs(), **close)
    torch.testing.assert_close(truncated_svd(x[:, columns], k)[2], v[columns], **close)
    torch.testing.assert_close(truncated_svd(scale * x, k)[1], scale * s, rtol=1e-12, atol=0)
    torch.testing.assert_close(truncated_svd(x.mT, k)[2].abs(), u.abs(), **close)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (70, 130)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_invalid_matrix_omitted_by_a_loss_gets_no_gradient(shape, k, svd):
    check_omitted_matrices(svd, 37, shape, k, torch.float32)
    check_omitted_matrices(svd, 3, shape, k, torch.float64)


@pytest.mark.parametrize(("shape", "k"), [((20, 12), 2), ((12, 20), 2), ((140, 130), 2), ((33, 49), 4), ((70, 66), 4), ((67, 80), 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invalid_matrix_does_not_affect_other_matrices(shape, k, dtype, svd):
    device = svd.device
    x = torch.randn(37, *shape, dtype=dtype, device=device)
    broken = x.clone()
    broken[3, 2, 1], broken[18, -1, -1], broken[36, 0, 0] = float("nan"), float("inf"), -float("inf")
    broken[7] = 0
    bad = [3, 18, 36]
    good = [i for i in range(37) if i not in (*bad, 7)]
    for layout in ("rows", "columns"):
        clean = svd(with_layout(x, layout), k, return_u=True)
        got = svd(with_layout(broken, layout), k, return_u=True)
        for a, b in zip(clean, got, strict=True):
            assert torch.equal(a[good], b[good])
            assert b[bad].isnan().all()
            assert b[7].isfinite().all()
        given = with_layout(broken, layout).detach().requires_grad_()
        u, s, v = svd(given, k, return_u=True)
        sum((t * torch.cos(torch.arange(t[0].numel(), device=device)).view(t[0].shape)).sum() for t in (u, s, v)).backward()
        assert given.grad[bad].isnan().flatten(1).any(1).all()
        whole = with_layout(x, layout).detach().requires_grad_()
        u, s, v = svd(whole, k, return_u=True)
        sum((t * torch.cos(torch.arange(t[0].numel(), device=device)).view(t[0].shape)).sum() for t in (u, s, v)).backward()
        assert torch.equal(given.grad[good], whole.grad[good])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "ks"), [(9, 7, (2, 7)), (20, 12, (1, 12)), (12, 40, (2, 3, 12)), (49, 70, (4,)), (70, 36, (5, 36)), (150, 120, (2, 24))]
)
def test_bits_do_not_depend_on_batch_and_threads(m, n, ks, dtype):
    """The batch mixes spectra: flat ones, matrices that are recomputed, scaled or computed in
    another dtype, and one with a NaN.
    """
    named = named_matrices(m, n)
    names = ("relu", "graded", "spread", "1e-30", "zero", "outlier", "near cluster", "low rank and noise", "one huge")
    x = torch.cat([named[name] for name in names]).to(dtype)
    x[4, 0, 0] = float("nan")
    count, threads = len(x), torch.get_num_threads()
    order = torch.randperm(count)

    def run(x, k):
        given = x.clone().requires_grad_()
        u, s, v = truncated_svd(given, k, return_u=True)
        (v[..., 0, :] ** 2 + u[..., 1, :] * s).sum().backward()
        return [t.detach() for t in (u, s, v)] + [given.grad]

    def concatenate(parts):
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    for k in ks:
        try:
            torch.set_num_threads(1)
            single = run(x, k)
            torch.set_num_threads(2)
            whole = run(x, k)
            torch.set_num_threads(5)  # more threads than cores, which take over each other's matrices
            many = run(x, k)
        finally:
            torch.set_num_threads(threads)
        batches_of_seven = concatenate([run(x[i : i + 7], k) for i in range(0, count, 7)])
        batches_of_one = concatenate([run(x[i : i + 1], k) for i in range(0, count, 4)])
        permuted = run(x[order], k)
        for i, t in enumerate(whole):
            for other, expected in ((single[i], t), (many[i], t), (batches_of_seven[i], t), (permuted[i], t[order]), (batches_of_one[i], t[::4])):
                torch.testing.assert_close(other, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("size", "k"), [(9, 7), (12, 12), (16, 16), (32, 30)])
def test_bits_of_low_rank_matrices_do_not_depend_on_the_batch(size, k):
    """Rows of rounding errors must not be rotated while another matrix needs more rotations."""
    ones = torch.full((size, size), 3.7, dtype=torch.float64)
    outer = torch.arange(1.0, size + 1, dtype=torch.float64)[:, None] * torch.linspace(-1, 2, size, dtype=torch.float64)
    for x in (ones, outer):
        for partner in (torch.randn(size, size, dtype=torch.float64), 1.1 * x, torch.eye(size, dtype=torch.float64)):
            alone, together = (truncated_svd(batch, k, return_u=True) for batch in (x[None], torch.stack([x, partner])))
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype, svd):
    device = svd.device
    x = torch.randn(5, 40, 24, device=device).relu().to(dtype)
    for layout in ("rows", "columns", "part"):
        given = with_layout(x, layout).detach().requires_grad_()
        u, s, v = svd(given, 3, return_u=True)
        assert (u.dtype, s.dtype, v.dtype) == (torch.float32,) * 3
        check_triplets(x, 3, u, s, v)
        wide = x.double().requires_grad_()
        (v[..., 0, :].sum() + s.sum()).backward()
        _, true_s, true_v = reference.truncated_svd(wide, 3)
        (true_v[..., 0, :].sum() + true_s.sum()).backward()
        assert given.grad.dtype == dtype
        error = (given.grad.double() - wide.grad).abs().max() / wide.grad.abs().max()
        assert error <= rounding(dtype) + 1e-3 * (dtype == torch.float16)


def test_any_number_of_batch_dimensions(svd):
    device = svd.device
    x = torch.randn(2, 3, 4, 9, 6, device=device)
    u, s, v = svd(x, 2, return_u=True)
    assert (u.shape, s.shape, v.shape) == ((2, 3, 4, 9, 2), (2, 3, 4, 2), (2, 3, 4, 6, 2))
    check_triplets(x, 2, u, s, v)
    swapped = x.transpose(0, 2)
    check_triplets(swapped, 2, *svd(swapped, 2, return_u=True))
    expanded = x[:1].expand(5, 3, 4, 9, 6)
    check_triplets(expanded, 2, *svd(expanded, 2, return_u=True))
    single = svd(x[0, 0, 0], 2)
    torch.testing.assert_close(single[2], v[0, 0, 0])
    for shape in ((0, 5, 3), (2, 0, 3, 5)):
        empty = torch.randn(shape, device=device, requires_grad=True)
        u, s, v = svd(empty, 2, return_u=True)
        assert (u.shape, s.shape, v.shape) == ((*shape[:-1], 2), (*shape[:-2], 2), (*shape[:-2], shape[-1], 2))
        (s.sum() + v.sum()).backward()
        assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("channels_last", [False, True])
def test_feature_svd(channels_last, svd):
    device = svd.device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(4, 24, 6, 5, device=device).relu().to(memory_format=layout).requires_grad_()
    u, s, v = svd.features(features, 3, return_u=True)
    matrix = features.detach().flatten(2).transpose(1, 2)
    assert (u.shape, v.shape) == ((4, 30, 3), (4, 24, 3))
    check_triplets(matrix, 3, u, s, v)
    v.square().sum(1).mul(torch.arange(3, device=device)).sum().backward()
    assert features.grad.stride() == features.stride()
    if device == "cpu":  # the features are read in place, without a copy
        with torch.profiler.profile(profile_memory=True) as profile:
            svd.features(features.detach(), 1)
        assert not any(event.key in ("aten::copy_", "aten::clone", "aten::contiguous") for event in profile.key_averages())


def test_vectors_are_contiguous(svd):
    """Each vector is contiguous, so later ops can read it without a copy."""
    device = svd.device
    u, _, v = svd(torch.randn(3, 9, 5, device=device), 2, return_u=True)
    assert u.mT.is_contiguous()
    assert v.mT.is_contiguous()


def test_errors():
    x = torch.randn(2, 5, 3)
    for error, match, args, options in [
        (TypeError, "x must be a tensor", ([1, 2], 1), {}),
        (TypeError, "x must be float64, float32", (torch.ones(3, 3, dtype=torch.int64), 1), {}),
        (TypeError, "x must be float64, float32", (torch.ones(3, 3, dtype=torch.complex64), 1), {}),
        (ValueError, r"x must be matrices \[..., M, N\]", (torch.ones(3), 1), {}),
        (ValueError, r"k must be an int in \[0, min\(M, N\)\] = \[0, 0\], got 1", (torch.ones(3, 0), 1), {}),
        (ValueError, r"k must be an int in \[0, min\(M, N\)\] = \[0, 3\], got 4", (x, 4), {}),
        (ValueError, "k must be an int", (x, -1), {}),
        (TypeError, "k must be an int, got float", (x, 1.0), {}),
        (TypeError, "k must be an int, got bool", (x, True), {}),
        (ValueError, "sign must be one of", (x, 1), {"sign": "plus"}),
        (ValueError, "gap_eps must be a finite number >= 0", (x, 1), {"gap_eps": -1.0}),
        (ValueError, "gap_eps must be a finite number >= 0", (x, 1), {"gap_eps": float("nan")}),
    ]:
        with pytest.raises(error, match=match):
            truncated_svd(*args, **options)
    with pytest.raises(TypeError, match="features must be a tensor"):
        feature_svd(None, 1)
    with pytest.raises(ValueError, match=r"features must have the shape \[B, C, \*spatial\]"):
        feature_svd(torch.ones(2, 3), 1)
    op = torch.ops.kdkernels
    with pytest.raises(ValueError, match="k must lie in"):
        op.truncated_svd(x, 9, Sign.NONE, False, 1e-6, False)
    with pytest.raises(ValueError, match="sign must be"):
        op.truncated_svd(x, 1, 2, False, 1e-6, False)
    u, s, v, state = op.truncated_svd(x, 2, Sign.NONE, True, 1e-6, True)
    with pytest.raises(ValueError, match="grad_v must have shape"):
        op.truncated_svd_backward(None, None, v[:1], x, u, s, v, state, 1e-6)
    with pytest.raises(ValueError, match="s must have shape"):
        op.truncated_svd_backward(None, s, None, x, u, s[:1], v, state, 1e-6)
    with pytest.raises(ValueError, match="u is needed if M < N"):
        op.truncated_svd_backward(None, s, None, x.mT, u.new_empty(0), s, u, state, 1e-6)
    x = torch.randn(2, 20, 12)  # tiny matrices have no state
    u, s, v, state = op.truncated_svd(x, 2, Sign.NONE, True, 1e-6, True)
    with pytest.raises(ValueError, match="state must be"):
        op.truncated_svd_backward(None, s, None, x, u, s, v, state[:-1], 1e-6)


def test_ill_conditioned_matrices_in_batches_of_any_shape(svd):
    """The results of matrices that are recomputed in float64 are stored at the right positions, for
    any batch dimensions.
    """
    device = svd.device
    x = torch.randn(6, 20, 9, device=device).relu()
    x[[1, 4]] = with_singular_values(10.0 ** -torch.arange(9), 20, 9).float().to(device)
    flat = svd(x, 4, return_u=True)
    check_triplets(x, 4, *flat)
    for a, b in zip(svd(x.view(2, 3, 20, 9), 4, return_u=True), flat, strict=True):
        assert torch.equal(a.flatten(0, 1), b)
    gradients = []
    for shape in ((6, 20, 9), (2, 3, 20, 9)):
        given = x.clone().view(shape).requires_grad_()
        svd(given, 4)[2][..., 0, :].sum().backward()
        gradients.append(given.grad.view(6, 20, 9))
    assert torch.equal(*gradients)
