"""align_singular_vectors against its reference, brute force and known values."""

import pytest
import torch
from conftest import SVD
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, sum_error

from kdkernels import align_singular_vectors, reference
from kdkernels.ops import truncated_svd_torch as plain
from kdkernels.testing import implementation

OP = torch.ops.kdkernels
DTYPES = [(torch.float32,) * 2, (torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2]
SHAPES = [((), 1, 1, 1), ((5,), 7, 3, 2), ((2, 3), 64, 5, 4), ((4,), 130, 2, 3), ((0,), 5, 3, 2)]


def _vectors(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=g, dtype=torch.float64))[0].to(dtype)


def test_known_value(svd):
    """The student has the teacher's vectors in another order, one with the opposite sign."""
    device = svd.device
    teacher = torch.eye(4, 2, device=device)
    student = torch.stack([-teacher[:, 1], torch.eye(4, device=device)[:, 3], teacher[:, 0]], 1)
    s, t = svd.align(student, teacher)
    torch.testing.assert_close(s, torch.stack([teacher[:, 0], -teacher[:, 1]], 1))
    torch.testing.assert_close(t, s)
    s, t = svd.align(student, teacher, torch.tensor([2.0, 3.0], device=device), flip="student")
    torch.testing.assert_close(s, teacher * torch.tensor([2.0, 3.0], device=device))
    torch.testing.assert_close(t, s)


def test_tied_cosines_match_the_first_vector_and_orthogonal_vectors_are_not_flipped(svd):
    device = svd.device
    teacher = torch.tensor([[1.0], [0.0], [0.0]], device=device)
    student = torch.tensor([[0.0, 0.6, -0.6], [1.0, 0.8, 0.8], [0.0, 0.0, 0.0]], device=device)
    s, t = svd.align(student, teacher)
    torch.testing.assert_close(s, student[:, 1:2])
    s, t = svd.align(student[:, :1], teacher)  # orthogonal vectors are not flipped
    torch.testing.assert_close(s, student[:, :1])
    torch.testing.assert_close(t, teacher)


@pytest.mark.parametrize("flip", ["teacher", "student"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2], ids=str
)
@pytest.mark.parametrize(("batch", "n", "num_student", "k"), SHAPES)
def test_against_reference(batch, n, num_student, k, dtypes, flip, svd):
    device = svd.device
    num_student, k = min(num_student, n), min(k, n)
    student = _vectors(*batch, n, n)[..., :num_student].to(dtypes[0]).to(device)
    teacher = _vectors(*batch, n, n, seed=1)[..., :k].to(dtypes[1]).to(device)
    weight = torch.rand(*batch, k, device=device)
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    for w in (None, weight):
        for layout in (lambda t: t, lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, -1)[..., ::2]):
            inputs = [
                layout(student).detach().requires_grad_(),
                layout(teacher).detach().requires_grad_(),
                w if w is None else w.clone().requires_grad_(),
            ]
            float64_inputs = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
            got, expected = svd.align(*inputs, flip=flip), reference.align_singular_vectors(*float64_inputs, flip=flip)
            upstream = [torch.cos(torch.arange(t.numel(), device=device).double()).view(t.shape) for t in expected]
            for name, a, b in zip(("student", "teacher"), got, expected, strict=True):
                assert a.dtype == dtype
                assert_close(name, a, b, rtol=sum_error(dtype, 1))
            torch.autograd.backward(got, [g.to(dtype) for g in upstream])
            torch.autograd.backward(expected, upstream)
            for a, b in zip(inputs, float64_inputs, strict=True):
                if a is not None:
                    assert_close("gradient", a.grad, b.grad, rtol=sum_error(dtype, n), scale=1.0)
                    assert a.grad.dtype == a.dtype


@given(seed=st.integers(0, 1000), n=st.integers(1, 20), num_student=st.integers(1, 6), k=st.integers(1, 6))
def test_against_brute_force(seed, n, num_student, k):
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(n, num_student, generator=g), torch.randn(n, k, generator=g)
    s, t = align_singular_vectors(student, teacher)
    for i in range(k):
        products = [sum(float(student[r, j]) * float(teacher[r, i]) for r in range(n)) for j in range(num_student)]
        j = max(range(num_student), key=lambda j: abs(products[j]))
        if sorted(map(abs, products))[-1] - (sorted(map(abs, products))[-2] if num_student > 1 else 0) < 1e-5:
            continue  # the match depends on rounding
        torch.testing.assert_close(s[:, i], student[:, j])
        torch.testing.assert_close(t[:, i], teacher[:, i] * (-1 if products[j] < 0 else 1))


@pytest.mark.parametrize("flip", ["teacher", "student"])
def test_gradcheck(flip, svd):
    device = svd.device
    student, teacher = _vectors(3, 6, 4).to(device).requires_grad_(), _vectors(3, 6, 2, seed=1).to(device).requires_grad_()
    weight = torch.rand(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    for inputs in ((student, teacher, weight), (student, teacher), (student, teacher.detach(), weight.detach())):
        assert torch.autograd.gradcheck(lambda *a: svd.align(*a, flip=flip), inputs)
        assert torch.autograd.gradgradcheck(lambda *a: svd.align(*a, flip=flip), inputs)


def test_align_vectors_of_truncated_svd(svd):
    """The call of SVD-KD: the student has one vector more, the teacher requires no gradient, and
    the weight is the teacher's normalized singular values.
    """
    device = svd.device
    features = torch.randn(4, 30, 12, device=device).relu().requires_grad_()
    _, _, v = svd(features, 3)
    _, ts, tv = svd(torch.randn(4, 30, 12, device=device).relu(), 2)
    weight = ts / ts.norm(dim=-1, keepdim=True)
    x, y = svd.align(v, tv, weight)
    assert not y.requires_grad
    assert ((x * y).sum(1) >= 0).all()
    torch.testing.assert_close(x.norm(dim=1), weight)
    (x - y).square().sum().backward()
    assert features.grad.isfinite().all()


def test_opcheck_compile_and_functorch(device):
    svd = SVD(device, "fastest")
    student, teacher, weight = (
        torch.randn(3, 6, 4, device=device, requires_grad=True),
        torch.randn(3, 6, 2, device=device, requires_grad=True),
        torch.rand(3, 2, device=device, requires_grad=True),
    )
    for w in (weight, None):
        torch.library.opcheck(OP.align_singular_vectors.default, (student, teacher, w, True))
    s, t, match, flips = OP.align_singular_vectors(student.detach(), teacher.detach(), None, True)
    torch.library.opcheck(
        OP.align_singular_vectors_backward.default,
        (s, t, student.detach(), teacher.detach(), None, match, flips, True, [True, True, False]),
    )

    def loss(student, teacher):
        s, t = svd.align(student, teacher, weight)
        return (s * t).square().sum()

    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(student, teacher), loss(student, teacher))
    (expected,) = torch.autograd.grad(loss(student, teacher), student)
    torch.testing.assert_close(torch.func.grad(loss)(student, teacher), expected)
    mapped = torch.func.vmap(align_singular_vectors)(student, teacher, weight)
    for a, b in zip(mapped, svd.align(student, teacher, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flip_teacher", [True, False])
def test_implementation_in_plain_torch(flip_teacher):
    student, teacher, weight = _vectors(3, 6, 4), _vectors(3, 6, 2, seed=1), torch.rand(3, 2, dtype=torch.float64)
    for w in (None, weight):
        got, expected = plain.align_singular_vectors(student, teacher, w, flip_teacher), OP.align_singular_vectors(student, teacher, w, flip_teacher)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()
        args = (got[0], got[1], student, teacher, w, got[2], got[3], flip_teacher, [True, True, w is not None])
        for a, b in zip(plain.align_singular_vectors_backward(*args), OP.align_singular_vectors_backward(*args), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_batch_and_threads(dtype):
    student, teacher, weight = torch.randn(37, 61, 5, dtype=dtype), torch.randn(37, 61, 4, dtype=dtype), torch.rand(37, 4, dtype=dtype)
    threads, order = torch.get_num_threads(), torch.randperm(37)

    def run(*tensors):
        given = [t.clone().requires_grad_() for t in tensors]
        outputs = align_singular_vectors(*given)
        upstream = [torch.sin(7 * o.detach()) for o in outputs]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, given, upstream)]

    try:
        torch.set_num_threads(1)
        single = run(student, teacher, weight)
        torch.set_num_threads(2)
        whole = run(student, teacher, weight)
    finally:
        torch.set_num_threads(threads)
    parts = [run(student[i : i + 5], teacher[i : i + 5], weight[i : i + 5]) for i in range(0, 37, 5)]
    permuted = run(student[order], teacher[order], weight[order])
    for i, t in enumerate(whole):
        close = {"rtol": 0 if i < 2 else 1e-6, "atol": 0}  # bits of torch.sin depend on an element's position in SIMD vectors
        assert torch.equal(t, single[i])
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), t, **close)
        torch.testing.assert_close(permuted[i], t[order], **close)


def test_errors():
    s, t = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    for error, match, args, options in [
        (TypeError, "student must be a tensor", (None, t), {}),
        (TypeError, "teacher must be float64, float32", (s, t.int()), {}),
        (ValueError, "must have the same shape except for the last dimension", (s, torch.randn(2, 4, 2)), {}),
        (ValueError, "must have the same shape except for the last dimension", (s[0], t), {}),
        (ValueError, r"weight must have the shape \(2, 2\)", (s, t, torch.ones(2)), {}),
        (TypeError, "weight must be a floating-point tensor", (s, t, 1.0), {}),
        (ValueError, "flip must be one of", (s, t), {"flip": "both"}),
        (ValueError, "student must be matrices", (torch.ones(3), t), {}),
        (ValueError, "student must have at least one vector", (s[..., :0], t), {}),
    ]:
        with pytest.raises(error, match=match):
            align_singular_vectors(*args, **options)
    out = OP.align_singular_vectors(s, t, None, True)
    with pytest.raises(ValueError, match="match must lie in"):
        OP.align_singular_vectors_backward(out[0], out[1], s, t, None, out[2] + 9, out[3], True, [True, True, False])


@pytest.mark.parametrize("kernels", ["reference", "fastest", "torch"])
def test_autocast_does_not_change_the_match(kernels):
    """Cosines of 0.700 and 0.701 are equal in bfloat16."""
    teacher = torch.tensor([1.0, 0.0, 0.0])[:, None]
    student = torch.tensor([[0.700, -0.701], [0.51**0.5, 0.0], [0.0, (1 - 0.701**2) ** 0.5]])
    align = reference.align_singular_vectors if kernels == "reference" else implementation(kernels)(align_singular_vectors)
    with torch.autocast("cpu", torch.bfloat16):
        s, t = align(student, teacher)
    assert torch.equal(s, student[:, 1:])
    assert torch.equal(t, -teacher)
