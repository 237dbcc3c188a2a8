"""temperature_kl with extreme inputs: excluded classes, offsets, small mixture weights, half
precision with a loss scaler, and layouts.
"""

import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import DEVICES
from layouts import random_layout, random_shape
from test_temperature_kl import BACKENDS, _operators, device_of_backend
from tolerances import assert_close

from kdkernels import reference, temperature_kl
from kdkernels.options import VALUES, Direction, Reduction

FORMS = {
    "forward": {},
    "reverse": {"direction": "reverse"},
    "jsd": {"direction": "jsd", "beta": 0.3},
    "target_eps": {"target_eps": 1e-3},
    "cross_entropy": {"include_entropy": False},
    "unscaled": {"scale_by_t2": False},
}
LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def _run_backend_and_reference(backend, student, teacher, temperature, dim=-1, **options):
    """Return the loss and the gradients of student, teacher and temperature, from a backend and
    from the reference in float64.
    """
    o = dict(direction="forward", beta=0.5, reduction="none", scale_by_t2=True, include_entropy=True, target_eps=0.0) | options
    forward, backward = _operators(backend)
    raw = o | {name: VALUES[name][o[name]] for name in ("direction", "reduction")}
    arguments = (*(x.to(device_of_backend(backend)) for x in (student, teacher)), 1.0, temperature.to(device_of_backend(backend)), None, None)
    arguments = (*arguments, dim, *raw.values())
    loss = forward(*arguments, False)[0]
    got = tuple(x.cpu() for x in (loss, *backward(torch.ones_like(loss), *arguments, [True, True, True])))
    inputs = [x.double().clone().requires_grad_() for x in (student, teacher, temperature)]
    exact = reference.temperature_kl(*inputs, dim=dim, **o)
    return got, (exact.detach(), *torch.autograd.grad(exact.sum(), inputs))


def _rounding_of_weighting_gradient(s, t, temperature, dim, direction="forward", scale_by_t2=True, **_):
    """Return the rounding error in float32 of p (a - E_p[a]), where a is the difference of the
    logits: one rounding of the largest term. This is the gradient of the network whose
    probabilities p weight the sum.
    """
    b, o = (x.double().movedim(dim, -1) for x in ((s, t) if direction == "reverse" else (t, s)))
    p = torch.softmax((b - b.amax(-1, keepdim=True)) / temperature.double().unsqueeze(-1), -1)
    separate_shifts = (b - b.amax(-1, keepdim=True)) - (o - o.amax(-1, keepdim=True))
    largest = torch.minimum((b - o).abs(), separate_shifts.abs() + 8).where(p > 0, 0).amax(-1, keepdim=True)
    return 2.0**-22 * p * largest / (1 if scale_by_t2 else temperature.double().unsqueeze(-1) ** 2)


def _exclude(kind, x, low):
    if kind == "some":
        x[:, 1::2] = low
    elif kind == "all":
        x[:] = low
    elif kind == "all but one":
        x[:, 1:] = low
    elif kind == "a block":  # longer than a block of the Triton kernel, before the first remaining class
        x[:, : x.shape[1] // 2] = low


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_can_be_excluded_by_low_logits(backend, form):
    """Finite logits have finite divergences and gradients, which agree with float64."""
    generator = torch.Generator().manual_seed(0)
    sides = [
        ("some", ""),
        ("", "some"),
        ("some", "some"),
        ("", "all"),
        ("all", ""),
        ("all but one", "all but one"),
        ("all but one", ""),
        ("", "all but one"),
    ]
    for dtype, dim in itertools.product(
        [torch.float32] if backend.startswith("triton") else LOWEST, [-1] if backend.startswith("triton") else [-1, 0]
    ):
        lowest = max(LOWEST[dtype], -1e300)  # lower values would exceed the range of the float64 reference
        for low in {lowest, max(lowest, -1e9)}:
            s, t = (2 * torch.randn(len(sides), 3, 21, generator=generator, dtype=torch.float64) for _ in range(2))
            for i, (student_kind, teacher_kind) in enumerate(sides):
                _exclude(student_kind, s[i], low)
                _exclude(teacher_kind, t[i], low)
            temperature = torch.tensor([0.6, 1.0, 3.0] if abs(low) < 1e300 else [1.0, 2.0, 3.0], dtype=torch.promote_types(dtype, torch.float32))
            s, t = (x.to(dtype).movedim(-1, dim).contiguous() for x in (s, t))  # rows of all kinds, which are adjacent in memory if dim is 0
            got, want = _run_backend_and_reference(backend, s, t, temperature.repeat(len(sides), 1), dim, **FORMS[form])
            for name, a, e in zip(("loss", "student", "teacher", "temperature"), got, want, strict=True):
                step = max(2e-5, 2 * torch.finfo(dtype).eps if name in ("student", "teacher") else 0)
                limit = torch.finfo(a.dtype).max  # larger values are correctly infinite
                a = a.double().nan_to_num(nan=torch.nan, posinf=limit, neginf=-limit)
                e = e.clamp(-limit, limit)
                if a.dim() == 3:
                    a, e = a.movedim(dim, -1), e.movedim(dim, -1)
                # The last term allows a few roundings of probabilities and their logarithms, times
                # T, if the exact result is 0.
                error, allowed = (a - e).abs(), step * (e.abs() + e.abs().amax(-1, keepdim=True) * 1e-2) + 2.0**-22
                if name == ("student" if form == "reverse" else "teacher"):
                    allowed = allowed + _rounding_of_weighting_gradient(s, t, temperature.expand(len(sides), 3), dim, **FORMS[form])
                wrong = ~(error <= allowed).flatten(1).all(1)
                assert not wrong.any(), (name, dtype, dim, low, [sides[i] for i in wrong.nonzero()], (error / allowed).max().item())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_may_have_the_largest_magnitude(backend, form):
    """Differences of finite logits, and differences of these differences, may overflow."""
    end = torch.finfo(torch.float32).max
    rows = [  # student, teacher
        ([end, -end, 0.0], [-end, end, 0.0]),
        ([end, -end, 0.0], [end, -end, 1.0]),
        ([end, -end, 0.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [end, -end, 0.0]),
        ([end, end, -end], [end, -end, end]),
        ([-end, -end, end], [end, end, end]),
    ]
    s, t = (torch.tensor(side) for side in zip(*rows, strict=True))
    for temperature in (1.0, 4.0):
        got, want = _run_backend_and_reference(backend, s, t, torch.full((len(rows),), temperature), **FORMS[form])
        for name, a, e in zip(("loss", "student", "teacher"), got, want, strict=False):  # without temperature, whose terms are T times as large
            assert_close(name, a.clamp(-end, end), e.clamp(-end, end), rtol=2e-5, scale=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_between_the_networks_does_not_change_the_result(backend, direction):
    """Adding a constant of any size to the logits of one network does not change the result (the
    sums are exact here).
    """
    s = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(1, 3)
    t = torch.tensor([[3.0, 1.0, 2.0, 4.0]]).repeat(1, 3)
    got, want = _run_backend_and_reference(backend, s, t, torch.tensor([2.0]), direction=direction)
    for offset in (70.0, 2.0**12, 2.0**20):
        with_offset, _ = _run_backend_and_reference(backend, s, t + offset, torch.tensor([2.0]), direction=direction)
        for a, b, e in zip(got[:3], with_offset[:3], want[:3], strict=True):
            assert_close("without offset", a, e, rtol=2e-6, scale=0.01)
            assert_close("with offset", b, e, rtol=2e-6, scale=0.01)
    for offset in (1e9, 1e30, LOWEST[torch.float32]):  # the offset absorbs the teacher's logits: its distribution is uniform
        got, want = _run_backend_and_reference(backend, s, torch.full_like(t, offset), torch.tensor([2.0]), direction=direction)
        for a, e in zip(got[:3], want[:3], strict=True):
            assert_close("uniform teacher", a, e, rtol=2e-6, scale=0.01)


def test_uniform_teacher_matches_value_computed_by_hand():
    low = torch.full((1, 4), LOWEST[torch.float32])
    assert temperature_kl(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), low).item() == pytest.approx(0.553896, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_before_the_first_remaining_class_may_be_excluded(backend):
    """Rows of several blocks, of which at least one network excludes the first ones."""
    for low, (student_kind, teacher_kind) in itertools.product((LOWEST[torch.float32], -torch.inf), (("", "a block"), ("a block", "a block"))):
        s = torch.randn(1, 5000)
        t = s + 0.1 * torch.randn(1, 5000)
        _exclude("a block", s, -12.0)  # the student gives low probability to the classes that the teacher excludes
        _exclude(student_kind, s, low)
        _exclude(teacher_kind, t, low)
        got, want = _run_backend_and_reference(backend, s, t, torch.tensor([1.0]))
        assert_close("loss", got[0], want[0], rtol=1e-5)
        assert_close("student", got[1], want[1], rtol=1e-5, scale=1e-5)


def _exact_jsd(s, t, beta):
    """Return the divergence in float64, computed from terms of one sign (docs/temperature_kl.md).

    The textbook form is inaccurate for a beta near 0 or 1.
    """
    log_p, log_q = torch.log_softmax(t, -1), torch.log_softmax(s, -1)
    u, v = (1 - beta) * torch.expm1(log_q - log_p), beta * torch.expm1(log_p - log_q)
    return (beta * log_p.exp() * (u - torch.log1p(u)) + (1 - beta) * log_q.exp() * (v - torch.log1p(v))).sum(-1)


@pytest.mark.parametrize("beta", [1e-12, 1e-6, 1e-4, 0.3, 1 - 1e-4, 1 - 1e-12])
@pytest.mark.parametrize("backend", [*DEVICES, "triton"])
def test_jsd_is_accurate_for_beta_near_0_and_1(backend, beta):
    for spread, rows, classes in ((0.3, 6, 10), (1.0, 6, 10), (3.0, 6, 10), (10.0, 200, 3)):
        s, t = (spread * torch.randn(rows, classes) for _ in range(2))
        got, want = _run_backend_and_reference(backend, s, t, torch.ones(rows), direction="jsd", beta=beta)
        assert_close("loss", got[0], _exact_jsd(s.double(), t.double(), beta), rtol=5e-6)
        inputs = [x.double().requires_grad_() for x in (s, t)]
        exact = torch.autograd.grad(_exact_jsd(*inputs, beta).sum(), inputs)
        for a, e in zip(got[1:3], exact, strict=True):  # a difference d of logits has a rounding error of d eps
            assert ((a.double() - e).norm() / e.norm()).item() <= 5e-6 * max(1.0, spread / 3)
    assert_close("the reference", want[0], _exact_jsd(s.double(), t.double(), beta), rtol=1e-15 / min(beta, 1 - beta) + 1e-12)


@pytest.mark.parametrize("backend", [*DEVICES, "triton"])
@pytest.mark.parametrize("spread", [5.0, 10.0, 20.0])
def test_jsd_is_accurate_for_confident_networks(backend, spread):
    """The error against float64 is at most twice that of the textbook form in float32."""
    rows = 20 if backend.startswith("triton") else 200
    s, t = (spread * torch.randn(rows, 1000) for _ in range(2))
    got, want = _run_backend_and_reference(backend, s, t, torch.ones(rows), direction="jsd")
    a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
    log_p, log_q = torch.log_softmax(b, -1), torch.log_softmax(a, -1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.tensor(2.0).log()
    plain = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    textbook = (plain.detach(), *torch.autograd.grad(plain.sum(), (a, b)))
    for actual, theirs, exact in zip(got[:3], textbook, want[:3], strict=True):
        assert (actual.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()


def _gradient(s, t, path, upstream, function=temperature_kl, **options):
    s = s.clone().requires_grad_()
    loss = function(s, t, 4.0, **options)
    (grad,) = torch.autograd.grad(loss, s, torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss), retain_graph=path == "kept")
    return grad


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "map"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "mean"}, {"direction": "reverse"}, {"direction": "jsd"}], ids=str)
def test_float16_gradient_is_rounded_after_the_upstream_factor(options, layout, teacher_dtype):
    """The gradient of a mean underflows in float16 unless a loss scaler's factor is applied before
    rounding.
    """
    t = torch.randn(64, 500) if layout == "rows" else torch.randn(8, 50, 6, 6)
    s = t + 0.05 * torch.randn_like(t)
    s, t = s.half(), t.to(teacher_dtype)
    for upstream in (1.0, 65536.0, 3e-3 * 65536, 1e9):
        exact = s.double().requires_grad_()
        loss = reference.temperature_kl(exact, t.double(), 4.0, dim=1, **options)
        (want,) = torch.autograd.grad(loss.sum() * upstream, exact)
        got = _gradient(s, t, "given away", upstream, dim=1, **options)
        fits = want.abs() < 65000
        powers = 1 if upstream in (1.0, 65536.0) else 2  # roundings to float16
        limit = powers * 2.0**-11 * want.abs() + 2.0**-25 + want.abs()[fits].max() * 2e-6 if fits.any() else 0
        assert ((got.double() - want).abs() - limit)[fits].max() <= 0
        assert got[want.abs() > 66000].isinf().all()
        assert torch.equal(got, _gradient(s, t, "kept", upstream, dim=1, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradient_is_the_same_in_every_autograd_path(dtype):
    s, t = torch.randn(8, 100).to(dtype), torch.randn(8, 100).to(dtype)
    mask = torch.arange(8) != 3
    torch._dynamo.reset()
    compiled = torch.compile(temperature_kl, fullgraph=True, backend="aot_eager")
    for upstream, reduction in itertools.product((0.0, 1.0, 1e-6, 65536.0, torch.inf), ("batchmean", "none")):
        paths = [_gradient(s, t, path, upstream, reduction=reduction, mask=mask) for path in ("given away", "kept")]
        paths.append(_gradient(s, t, "given away", upstream, compiled, reduction=reduction, mask=mask))
        assert torch.equal(paths[0].nan_to_num(7.0), paths[1].nan_to_num(7.0))
        assert torch.equal(paths[0].nan_to_num(7.0), paths[2].nan_to_num(7.0))
        assert not paths[0][3].any()  # the gradient of a masked row is zero for every upstream gradient


def test_upstream_gradient_per_row():
    s, t = torch.randn(5, 7, 40).half(), torch.randn(5, 7, 40).half()
    upstream = torch.randn(5, 40) * 10.0 ** torch.randint(-6, 6, (5, 40))
    exact = s.double().requires_grad_()
    (want,) = torch.autograd.grad(reference.temperature_kl(exact, t.double(), 4.0, dim=1, reduction="none"), exact, upstream.double())
    for path in ("given away", "kept"):
        got = _gradient(s, t, path, upstream, dim=1, reduction="none")
        row = want.abs().amax(1, keepdim=True)
        fits = (want.abs() < 65000).expand_as(want)
        limit = 2 * 2.0**-11 * want.abs() + 2.0**-24 + 2e-6 * row
        assert ((got.double() - want).abs() - limit)[fits].max() <= 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_triton_rescales_like_the_cpu(dtype):
    from kdkernels.triton import temperature_kl as kernels

    if torch.cuda.is_available():
        pytest.skip("operands are on the CPU")
    for shape, dim in (((5, 37), 1), ((3, 7, 4, 5), 1), ((6, 5), 0)):
        grad = torch.randn(shape).to(dtype)
        grad = grad.transpose(0, -1).contiguous().transpose(0, -1) if len(shape) == 2 else grad
        rows = [n for i, n in enumerate(shape) if i != dim]
        mask, scale = torch.rand(rows) > 0.3, 2.0 ** torch.randint(-20, 20, rows)
        for upstream, row_scale in itertools.product((torch.tensor(2.0), torch.tensor(1.0), torch.randn(rows)), (torch.empty(0), scale)):
            want = torch.ops.kdkernels.temperature_kl_rescale(grad, row_scale, upstream, mask, dim)
            in_place = grad.clone()
            kernels.temperature_kl_rescale_(in_place, row_scale, upstream, mask, dim)
            out_of_place = kernels.temperature_kl_rescale(grad, row_scale, upstream, mask, dim)
            kept = mask.unsqueeze(dim)
            for got in (in_place, out_of_place):
                if row_scale.numel() or upstream.dim() or upstream != 1:
                    assert_close("rescaled", got, torch.where(kept, want, 0), rtol=2 * torch.finfo(dtype).eps)
                else:
                    assert torch.equal(torch.where(kept, got, 0), torch.where(kept, grad, 0))


@pytest.mark.parametrize("seed", range(4))
def test_any_layout_and_dtypes(seed):
    """Values and gradients for random shapes, strides and pairs of dtypes."""
    rng = random.Random(seed)
    for _ in range(60):
        shape = random_shape(rng, rng.choice((1, 2, 2, 3, 4)))
        dim = rng.randrange(-len(shape), len(shape))
        dtypes = rng.choices(list(LOWEST), k=2)
        s, t = (random_layout(rng, shape, dtype) for dtype in dtypes)
        rows = [n for d, n in enumerate(shape) if d != dim % len(shape)]
        temperature = 1 + torch.rand(rows)
        got, want = _run_backend_and_reference("cpu", s, t, temperature, dim, **FORMS[rng.choice(list(FORMS))])
        settings = (shape, dim, dtypes, s.stride(), t.stride())
        for name, a, e in zip(("loss", "student", "teacher", "temperature"), got, want, strict=True):
            step = max(torch.finfo(a.dtype).eps, 1e-5 if torch.float64 not in dtypes or name == "temperature" else 1e-12)
            assert a.shape == e.shape, settings
            assert (a.double() - e).abs().max() <= step * (1 + e.abs().max()), (name, *settings)


X = torch.zeros(4, 6)
ROWS = torch.ones(4)
NONE = torch.zeros(0)
GOOD = (X, X, 1.0, None, None, None, -1, Direction.FORWARD, 0.5, Reduction.SUM, True, True, 0.0)
WRONG = [
    *((i, X.to(dtype)) for i in (0, 1) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.long, torch.complex64)),
    *((i, x) for i in (0, 1) for x in (X[:, :5], X[0], X[:, :0])),
    (2, 0.0), (2, float("nan")), (2, float("inf")),
    (3, torch.ones(3)), (3, ROWS.long()), (3, ROWS.to(torch.float8_e4m3fn)), (3, torch.ones(())),
    (4, ROWS), (4, torch.ones(4, 6, dtype=torch.bool)), (4, torch.ones(5, dtype=torch.bool)),
    (5, torch.ones(2)), (5, torch.ones((), dtype=torch.complex64)), (5, torch.ones(0)), (5, torch.tensor(True)),
    (6, 2), (6, -3), (7, 3), (7, -1), (8, 1.5), (8, float("nan")), (9, 4), (9, 2**40), (12, -1.0), (12, float("nan")),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_raw_ops_raise_for_unsupported_inputs(backend):
    forward, backward = _operators(backend)
    for position, bad in WRONG:
        if (backend == "triton" and position in (2, 7, 8, 9, 12)) or (
            backend == "triton" and isinstance(bad, torch.Tensor) and bad.dtype == torch.bool
        ):
            continue  # values that do not affect memory accesses
        arguments = [*GOOD[:position], bad, *GOOD[position + 1 :]]
        for call in (lambda a: forward(*a, True), lambda a: backward(torch.ones(()), *a, [True, True, True])):
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                call(arguments)
    for bad in (torch.ones(4), torch.ones(1), torch.ones((), dtype=torch.long), torch.ones(()).to(torch.float8_e5m2)):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            backward(bad, *GOOD, [True, True, True])
    if backend == "cpu":
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            backward(torch.ones(()), *GOOD, [True])
    empty = (X[:0], X[:0], *GOOD[2:])
    assert forward(*empty, True)[0] == 0


def test_raw_rescale_raises_for_unsupported_inputs():
    from kdkernels.triton import temperature_kl as kernels

    one, mask = torch.ones(()), torch.ones(4, dtype=torch.bool)
    ops = torch.ops.kdkernels.temperature_kl_rescale, torch.ops.kdkernels.temperature_kl_rescale_
    wrong = [
        (X.long(), NONE, one, None, 1), (X.to(torch.float8_e4m3fn), NONE, one, None, 1), (X.to(torch.complex64), NONE, one, None, 1),
        (X, torch.ones(3), one, None, 1), (X, ROWS.double(), one, None, 1), (X, torch.ones(4, 6), one, None, 1),
        (X, NONE, torch.ones(3), None, 1), (X, NONE, one.long(), None, 1), (X, NONE, one, mask[:3], 1), (X, NONE, one, ROWS, 1),
        (X, NONE, one, None, 2), (X, NONE, one, None, -3),
    ]  # fmt: skip
    for op, arguments in itertools.product((*ops, kernels.temperature_kl_rescale, kernels.temperature_kl_rescale_), wrong):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            op(*arguments)
    with pytest.raises(RuntimeError):  # several elements share one memory location
        ops[1](torch.zeros(1, 6).expand(4, 6), NONE, torch.tensor(2.0), None, 1)
    for op in ops:
        op(X[:0].clone(), NONE, one, None, 1)
        op(X[:, :0].clone(), NONE, torch.tensor(2.0), None, 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_reference_accepts_the_smallest_float64(temperature):
    """Logits of -finfo.max, which may overflow when divided by T; temperatures [B, 1] for logits
    [B, C], and along any dim.
    """
    s, t = torch.randn(2, 3, 4, dtype=torch.float64)
    t_rows = torch.full((3, 1), temperature, dtype=torch.float64, requires_grad=True)
    low, excluded = [x.clone() for x in (s, t)], [x.clone() for x in (s, t)]
    for xs, number in ((low, LOWEST[torch.float64]), (excluded, -torch.inf)):
        for x in xs:
            x[:, 1] = number
            x.requires_grad_()
    got, want = reference.temperature_kl(*low, t_rows, reduction="none"), reference.temperature_kl(*excluded, t_rows, reduction="none")
    assert torch.equal(got, want)
    gradients = [torch.autograd.grad(loss.sum(), (*inputs, t_rows)) for loss, inputs in ((got, low), (want, excluded))]
    for a, b in zip(*gradients, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    fused = temperature_kl(*low, t_rows, reduction="none")
    torch.testing.assert_close(fused, got)
    torch.testing.assert_close(reference.temperature_kl(low[0].T, low[1].T, t_rows.T, dim=0, reduction="none"), got)


@pytest.mark.parametrize("backend", [*DEVICES, "triton"])
@pytest.mark.parametrize(("gap", "classes"), [(8, 2), (12, 10), (16, 10), (16, 2100)])
def test_jsd_gradient_is_accurate_for_confident_networks_that_agree(backend, gap, classes):
    """The error of each row's gradient is small relative to the row, also for the class that has
    nearly all of the probability.
    """
    rows = 4 if backend.startswith("triton") else 50
    for temperature, beta in ((1.0, 0.5), (0.5, 0.1), (1.0, 1e-3)):
        s = 0.05 * torch.randn(rows, classes)
        s[:, 0] += gap
        t = s + 0.05 * torch.randn(rows, classes)
        got, want = _run_backend_and_reference(backend, s, t, torch.full((rows,), temperature), direction="jsd", beta=beta)
        for a, e in zip(got[1:3], want[1:3], strict=True):
            assert ((a.double() - e).abs().amax(1) / e.abs().sum(1)).max() <= 1e-5
            assert (a.double().sum(1).abs() / a.double().abs().sum(1)).max() <= 1e-5


def test_temperatures_are_not_rounded_to_float32():
    """T = 1.7 as a Python number, in every implementation."""
    s, t = torch.randn(2, 3, 7, dtype=torch.float64)
    exact = torch.tensor(1.7, dtype=torch.float64)
    for direction in ("forward", "reverse", "jsd"):
        for f in (reference.temperature_kl, temperature_kl, lambda *a, **k: torch.func.vmap(lambda _: temperature_kl(*a, **k))(torch.ones(1))[0]):
            torch.testing.assert_close(f(s, t, 1.7, direction=direction), temperature_kl(s, t, exact, direction=direction), rtol=1e-14, atol=0)
        gradients = [torch.func.hessian(lambda x, T=T, d=direction: temperature_kl(x, t, T, direction=d))(s) for T in (1.7, exact)]
        torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)


def test_rows_of_minus_infinity_have_nan_gradients_in_every_path():
    s, t = torch.randn(2, 3), torch.tensor([[-torch.inf] * 3, [1.0, 2.0, 3.0]])
    for function in (temperature_kl, reference.temperature_kl):
        plain = s.clone().requires_grad_()
        function(plain, t).backward()
        for gradient in (plain.grad, torch.func.grad(lambda x, f=function: f(x, t))(s)):
            assert gradient[0].isnan().all()
            assert gradient[1].isfinite().all()


def test_polynomial_of_similar_networks_has_the_error_that_its_comment_states():
    """(e^y - 1 - y) / y^2 for |y| <= 1, with the float32 coefficients of the C++ kernels, also with
    y = t log(2) in base 2.
    """
    source = (Path(__file__).parent.parent / "csrc/temperature_kl/convex.h").read_text()
    stated = float(re.search(r"relative error, which is (\S+) in float32", source.replace("\n// ", " "))[1])
    found = [float(x) for x in re.findall(r"float\((\d\S*) \* u", source)]
    assert len(found) == 8
    y = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    exact = sum(y**k / float(math.factorial(k + 2)) for k in range(20))
    for unit in (1.0, math.log(2)):
        value = torch.zeros_like(y)
        for power, coefficient in zip(range(9, 1, -1), found, strict=True):
            value = value * (y / unit) + torch.tensor(coefficient * unit**power).double()
        assert ((value / unit**2 / exact - 1).abs() <= 1.5 * stated).all()
