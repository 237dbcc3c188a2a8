"""Invalid calls, empty inputs, and raw op calls of truncated_svd and related functions."""

import os
import subprocess
import sys

import numpy
import pytest
import testing_ops  # noqa: F401  registers the implementation "cuda" on CPU tensors
import torch

from kdkernels import align_singular_vectors, feature_svd, reference, truncated_svd, truncated_svds
from kdkernels.options import Implementation, Sign
from kdkernels.testing import implementation

OP = torch.ops.kdkernels
IMPLEMENTATIONS = ["fastest", "cuda", "torch"]
WRONG = [None, "x", [1], [[1.0]], float("nan"), float("inf"), True, object(), {}]


def _assert_raises_for(name, call):
    with pytest.raises((TypeError, ValueError), match=rf"^({name})(?!\w)"):
        call()


def test_errors_name_the_invalid_argument():
    x, f = torch.randn(2, 5, 3), torch.randn(2, 3, 4, 4)
    s, t = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    tensors = [*WRONG, x.int(), x.bool(), x.to(torch.complex64), torch.ones(3), torch.tensor(1.0), x.to(torch.float8_e4m3fn)]
    for bad in tensors:
        _assert_raises_for("x", lambda: truncated_svd(bad, 1))  # noqa: B023
        _assert_raises_for("features", lambda: feature_svd(bad, 1))  # noqa: B023
        _assert_raises_for(r"xs\[1\]", lambda: truncated_svds([x, bad], 1))  # noqa: B023
        _assert_raises_for("student", lambda: align_singular_vectors(bad, t))  # noqa: B023
        _assert_raises_for(r"teacher|student and teacher", lambda: align_singular_vectors(s, bad))  # noqa: B023
        if bad is not None:
            _assert_raises_for("weight", lambda: align_singular_vectors(s, t, bad))  # noqa: B023
    for bad in (None, "ab", 1, float("nan"), x, []):
        _assert_raises_for("xs", lambda: truncated_svds(bad, 1))  # noqa: B023
    _assert_raises_for("features", lambda: feature_svd(x[0], 1))
    _assert_raises_for("xs", lambda: truncated_svds([x, x.to("meta")], 1))
    _assert_raises_for("student and teacher", lambda: align_singular_vectors(s, t.to("meta")))
    _assert_raises_for("weight", lambda: align_singular_vectors(s, t, torch.ones(2, 2, device="meta")))
    options = {
        "k": [*WRONG, 1.0, 1.5, -1, 4, torch.tensor([1, 2]), torch.tensor(1.0), numpy.float64(1), numpy.bool_(True)],
        "sign": ["plus", 1, True, [1], float("nan"), x, numpy.ones(2)],
        "return_u": [None, "yes", 1, [1], float("nan"), x],
        "gap_eps": ["small", [1], True, float("nan"), float("inf"), -1.0, x, 1j],
    }
    for name, values in options.items():
        for bad in values:
            given = {"k": 1, name: bad}
            _assert_raises_for(name, lambda: truncated_svd(x, **given))  # noqa: B023
            _assert_raises_for(name, lambda: feature_svd(f, **given))  # noqa: B023
            _assert_raises_for(name, lambda: truncated_svds([x, x], **given))  # noqa: B023
    for name, bad in (("flip", None), ("flip", "both"), ("flip", 1), ("flip", [1]), ("flip", x)):
        _assert_raises_for(name, lambda: align_singular_vectors(s, t, **{name: bad}))  # noqa: B023


def test_numpy_and_symbolic_integers_are_accepted():
    x = torch.randn(2, 5, 4)
    expected = truncated_svd(x, 2)
    for k in (numpy.int64(2), numpy.uint8(2)):
        for a, b in zip(truncated_svd(x, k)[1:], expected[1:], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(truncated_svds([x], k)[0][2], expected[2])
    assert torch.equal(truncated_svd(x, 2, gap_eps=numpy.float32(1e-3))[2], expected[2])
    torch._dynamo.reset()

    def f(x, like):  # k is a symbolic size
        return truncated_svd(x, like.shape[0])[2].sum() + truncated_svds([x], like.shape[0])[0][1].sum()

    compiled = torch.compile(f, dynamic=True, fullgraph=True)
    for k in (2, 3):
        torch.testing.assert_close(compiled(x, torch.ones(k, 7)), f(x, torch.ones(k, 7)))


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_k_of_zero(kernels, dtype):
    """k = 0, also for empty matrices: empty results with the shapes of torch.linalg.svd, and zero
    gradients.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((2, 0, 3), (2, 3, 0), (0, 0), (3, 0, 0), (2, 4, 3), (0, 4, 3), (5, 4)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        u, s, v = implementation(kernels)(truncated_svd)(x, 0, return_u=True)
        expected = [t[..., :0] for t in torch.linalg.svd(x.detach().to(wide), full_matrices=False)[:2]]
        assert [(t.shape, t.dtype) for t in (u, s)] == [(t.shape, t.dtype) for t in expected]
        assert (v.shape, v.dtype) == ((*shape[:-2], shape[-1], 0), wide)
        (grad,) = torch.autograd.grad(u.sum() + s.sum() + v.sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))
        _assert_raises_for("k", lambda: implementation(kernels)(truncated_svd)(x, min(x.shape[-2:]) + 1))  # noqa: B023
        assert implementation(kernels)(truncated_svd)(x, 0)[0] is None
        r = reference.truncated_svd(x, 0, return_u=True)
        assert [t.shape for t in r] == [u.shape, s.shape, v.shape]
        for (_, so, vo), requires_grad in zip(implementation(kernels)(truncated_svds)([x, x.detach()], 0), (True, False), strict=True):
            assert (so.shape, vo.shape, vo.requires_grad) == (s.shape, v.shape, requires_grad)
    no_positions = torch.randn(2, 3, 0, 4, requires_grad=True)
    _, s, v = implementation(kernels)(feature_svd)(no_positions, 0)
    assert (s.shape, v.shape) == ((2, 0), (2, 3, 0))
    assert torch.autograd.grad(v.sum(), no_positions)[0].shape == no_positions.shape
    empty_batch = torch.randn(0, 4, 3, dtype=wide, requires_grad=True)
    with implementation(kernels):
        results = truncated_svd(empty_batch, 2, return_u=True), truncated_svds([empty_batch], 2, return_u=True)[0]
    for result in results:
        assert [t.shape for t in result] == [(0, 4, 2), (0, 2), (0, 3, 2)]
        assert torch.autograd.grad(sum(t.sum() for t in result), empty_batch)[0].shape == empty_batch.shape
    mapped = torch.func.vmap(lambda a: implementation(kernels)(truncated_svd)(a, 0)[2])(torch.randn(3, 4, 5))
    assert mapped.shape == (3, 5, 0)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_align_empty_inputs(kernels):
    for shape, num_student, k in (((2, 5), 3, 0), ((2, 0), 3, 2), ((0, 5), 3, 2), ((5,), 0, 0), ((0,), 1, 1)):
        student = torch.randn(*shape, num_student, requires_grad=True)
        teacher = torch.randn(*shape, k, dtype=torch.float64, requires_grad=True)
        for weight in (None, torch.rand(*shape[:-1], k, requires_grad=True)):
            for flip in ("teacher", "student"):
                outputs = implementation(kernels)(align_singular_vectors)(student, teacher, weight, flip=flip)
                for t in outputs:
                    assert (t.shape, t.dtype) == ((*shape, k), torch.float64)
                inputs = [t for t in (student, teacher, weight) if t is not None]
                for t, g in zip(inputs, torch.autograd.grad(sum(o.sum() for o in outputs), inputs), strict=True):
                    assert torch.equal(g, torch.zeros_like(t))
    _assert_raises_for("student", lambda: implementation(kernels)(align_singular_vectors)(torch.ones(5, 0), torch.ones(5, 1)))


def _raw_calls(kernels):
    """Return calls of the ops that must all raise, by a description."""
    x = torch.randn(3, 6, 4)
    wide = x.mT.contiguous()
    other = [x.to(t) for t in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.int8, torch.bool, torch.complex64)]
    suffix = "" if kernels == "fastest" else f"_{kernels}"
    implementation_argument = (Implementation.FASTEST,) if kernels == "fastest" else ()
    forward, backward = getattr(OP, f"truncated_svd{suffix}"), getattr(OP, f"truncated_svd_backward{suffix}")
    u, s, v, state = forward(x, 2, Sign.NONE, True, 1e-6, True, *implementation_argument)
    calls = {}
    for bad in (*other, torch.ones(3), torch.tensor(1.0), x[:, :0], x[..., :0]):
        calls[f"x {bad.dtype} {tuple(bad.shape)}"] = lambda bad=bad: forward(bad, 2, Sign.NONE, True, 1e-6, True, *implementation_argument)
    for k in (-1, 0, 5, 2**40):
        calls[f"k {k}"] = lambda k=k: forward(x, k, Sign.NONE, True, 1e-6, True, *implementation_argument)
    if kernels == "fastest":
        for bad in (-1, 4, 2**40):
            calls[f"implementation {bad}"] = lambda bad=bad: forward(x, 2, Sign.NONE, True, 1e-6, True, bad)
            calls[f"group implementation {bad}"] = lambda bad=bad: OP.truncated_svd_group([x], 2, Sign.NONE, True, [1e-6], True, bad)
    calls["sign"] = lambda: forward(x, 2, 2, True, 1e-6, True, *implementation_argument)
    valid = {"gu": u, "gs": s, "gv": v, "x": x, "u": u, "s": s, "v": v, "state": state, "eps": 1e-6}
    wrong = {
        "gu": [u[:1], u[..., :1], u.int(), u[:, :3], v, u.to(torch.float8_e5m2)],
        "gs": [s[:1], s.int(), s[..., :1], v, s.to(torch.float8_e5m2)],
        "gv": [v[:1], v.int(), u, v[..., :1], v.to(torch.float8_e5m2)],
        "x": [*other, x[:1], x[:, :3], x[:, :1], x[..., :1], wide, x.double(), x[0], x[:, :0]],
        "u": [u[:1], u[:, :3], u.double(), u.int(), u.to(torch.float8_e5m2), u[..., :1], v],
        "s": [s[:1], s.double(), s.int(), s[..., :1], s[..., :0], torch.tensor(1.0), torch.ones(3, 9)],
        "v": [v[:1], v.double(), v.int(), v[..., :1], u, torch.ones(3, 4, 9)],
        "eps": [0.0, -1.0, float("nan"), float("inf")],
    }
    if kernels != "torch":  # "torch" stores no state and ignores it
        wrong["state"] = [state[:-1], state[:1], state.double(), state.int(), state.view(1, -1)[:, ::2], state.repeat(2)]
    for name, values in wrong.items():
        for i, bad in enumerate(values):
            calls[f"{name} {i}"] = lambda name=name, bad=bad: backward(*{**valid, name: bad}.values(), *implementation_argument)
    wu, ws, wv, wstate = forward(wide, 2, Sign.NONE, False, 1e-6, True, *implementation_argument)
    calls["no u"] = lambda: backward(None, ws, wv, wide, wu[:0, 0, 0], ws, wv, wstate, 1e-6, *implementation_argument)
    student, teacher, weight = torch.randn(3, 6, 4), torch.randn(3, 6, 2), torch.rand(3, 2)
    align, align_backward = getattr(OP, f"align_singular_vectors{suffix}"), getattr(OP, f"align_singular_vectors_backward{suffix}")
    a, b, match, flips = align(student, teacher, weight, True, *implementation_argument)
    valid_align = {"student": student, "teacher": teacher, "weight": weight, "flip": True}
    valid_align_backward = {"gs": a, "gt": b, **valid_align, "match": match, "flips": flips, "wanted": [True, True, True]}
    valid_align_backward["flip"] = valid_align_backward.pop("flip")
    order = ("gs", "gt", "student", "teacher", "weight", "match", "flips", "flip", "wanted")
    inputs = {
        "student": [student[:1], student[:, :3], student[..., :0], student.int(), student.to(torch.float8_e4m3fn), student[0]],
        "teacher": [teacher[:1], teacher[:, :3], teacher[..., :0], teacher.int(), teacher.to(torch.float8_e4m3fn), teacher[0]],
        "weight": [weight[:1], weight[..., :1], weight.int(), weight.to(torch.float8_e4m3fn), student],
    }
    for name, values in inputs.items():
        for i, bad in enumerate(values):
            calls[f"align {name} {i}"] = lambda name=name, bad=bad: align(*{**valid_align, name: bad}.values(), *implementation_argument)
    inputs |= {
        "gs": [a[:1], a[..., :1], a.int(), a.to(torch.float8_e4m3fn)],
        "gt": [b[:1], b[:, :2], b.int()],
        "match": [match[:1], match.int(), match.float(), match - 9, match + 4, match + 2**40, torch.full_like(match, -(2**62))],
        "flips": [flips[:1], flips.double(), flips.int()],
    }
    for name, values in inputs.items():
        for i, bad in enumerate(values):
            given = {**valid_align_backward, name: bad}
            calls[f"align backward {name} {i}"] = lambda given=given: align_backward(*(given[o] for o in order), *implementation_argument)
    no_weight = {**valid_align_backward, "weight": None}
    calls["align backward no weight"] = lambda: align_backward(*(no_weight[o] for o in order), *implementation_argument)
    if kernels in ("fastest", "cuda"):
        group, group_backward = (getattr(OP, f"truncated_svd_group{part}{suffix}") for part in ("", "_backward"))
        for i, (xs, k, eps) in enumerate((([], 2, []), ([x], 2, []), ([x], 5, [1e-6]), ([x, x.int()], 2, [1e-6] * 2), ([x, wide], 0, [1e-6] * 2))):
            if (xs, kernels) != ([], "cuda") and (i, kernels) != (1, "cuda"):  # allowed: an empty launch, and no gap_eps in the forward
                calls[f"group {i}"] = lambda xs=xs, k=k, eps=eps: group(xs, k, Sign.NONE, True, eps, True, *implementation_argument)
        lists = {name: [value, value] for name, value in valid.items()}
        for name in valid:
            given = {**lists, name: lists[name][:1]}
            calls[f"group backward {name} short"] = lambda given=given: group_backward(*given.values(), *implementation_argument)
        for name in ("x", "u", "s", "v", "state"):
            for i, bad in enumerate(wrong[name]):
                if not (name == "u" and bad.dim() != x.dim()):
                    given = {**lists, name: [valid[name], bad]}
                    calls[f"group backward {name} {i}"] = lambda given=given: group_backward(*given.values(), *implementation_argument)
    return calls


def check_raw_calls_raise(kernels):
    accepted = []
    for name, call in _raw_calls(kernels).items():
        try:
            call()
            accepted.append(name)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            pass
    assert not accepted, accepted


@pytest.mark.parametrize("kernels", ["fastest", "cuda", "torch", "triton"])
def test_raw_ops_raise_for_unsupported_inputs(kernels):
    """Run in a separate process, so that a crash fails this test only."""
    if kernels == "triton":
        triton = pytest.importorskip("triton")
        if triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
            pytest.skip("the interpreter of Triton 3.6 needs NumPy < 2.4")
    code = (
        f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r}); import test_truncated_svd_calls as t; t.check_raw_calls_raise({kernels!r})"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert process.returncode == 0, f"{process.returncode}: {process.stderr[-1500:]}"


def test_backward_without_upstream_gradients_gives_zeros():
    x = torch.randn(3, 6, 4)
    u, s, v, state = OP.truncated_svd(x, 2, Sign.NONE, True, 1e-6, True)
    for kernels in (Implementation.FASTEST, Implementation.CUDA, Implementation.TORCH):
        state_of_kernel = state[:0] if kernels else state
        assert torch.equal(OP.truncated_svd_backward(None, None, None, x, u, s, v, state_of_kernel, 1e-6, kernels), torch.zeros_like(x))
