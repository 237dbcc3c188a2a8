"""temperature_kl against the reference in float64, for every backend, and known values."""

import contextlib
import functools

import pytest
import torch
from cases import KL_CASES
from conftest import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, rounding, sum_error

from kdkernels import reference, temperature_kl
from kdkernels.options import VALUES

# "triton short" and "triton long" use the kernels for short and for long rows of
# temperature_kl_fast.py for rows of every length, where these kernels compute the result, and
# "triton cuda" the CUDA kernel for long rows.
FAST_BACKENDS = ["triton short", "triton long", "triton cuda"]
BACKENDS = [*DEVICES, "triton", *FAST_BACKENDS]


def device_of_backend(backend: str) -> str:
    """Return the device for tensors of a backend. Without a GPU, Triton's interpreter runs."""
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


@contextlib.contextmanager
def fast_kernels(backend: str):
    """Use the kernels of temperature_kl_fast.py also for small tensors."""
    from kdkernels.triton import temperature_kl_fast

    if backend == "triton cuda" and not torch.cuda.is_available():
        import testing_ops  # noqa: F401  registers the CUDA kernel on CPU tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(temperature_kl_fast, "SMALLEST", 0)
        patch.setattr(temperature_kl_fast, "SHORTEST_ROW", 1)
        patch.setattr(temperature_kl_fast, "LONGEST_SHORT_ROW", 4096 if backend == "triton short" else 0)
        patch.setattr(temperature_kl_fast, "_has_cuda_kernel", lambda x: backend == "triton cuda")
        yield


def _operators(backend: str):
    """Return (forward, backward) with the signatures of the ops."""
    if not backend.startswith("triton"):
        return torch.ops.kdkernels.temperature_kl.default, torch.ops.kdkernels.temperature_kl_backward.default
    from kdkernels.triton import temperature_kl as kernels

    if backend == "triton":
        return kernels.temperature_kl, kernels.temperature_kl_backward

    def forward(*arguments):
        with fast_kernels(backend):
            return kernels.temperature_kl(*arguments)

    def backward(*arguments):
        # The fast kernels compute no gradients of teacher and temperature.
        with fast_kernels(backend):
            student = kernels.temperature_kl_backward(*arguments[:-1], [True, False, False])[0]
        return student, *kernels.temperature_kl_backward(*arguments[:-1], [False, True, True])[1:]

    return forward, backward


def _reference_loss_and_gradients(case, x, upstream_rows=None):
    """Return the loss and its gradients in float64, from autograd of the reference."""
    s, t = (x[k].double().cpu().clone().requires_grad_() for k in ("student", "teacher"))
    temperature = (
        torch.full(case.rows, case.temperature, dtype=torch.float64) if x["temperature"] is None else x["temperature"].double().cpu().clone()
    )
    temperature.requires_grad_()
    mask, normalizer = (None if x[k] is None else x[k].cpu() for k in ("mask", "normalizer"))
    loss = reference.temperature_kl(s, t, temperature, mask=mask, normalizer=normalizer, **case.options)
    upstream = torch.ones_like(loss) if upstream_rows is None else upstream_rows
    grads = torch.autograd.grad(loss, (s, t, temperature), upstream)
    return loss.detach(), grads


def _arguments(case, x):
    o = case.options
    return (
        x["student"],
        x["teacher"],
        case.temperature if x["temperature"] is None else 1.0,
        x["temperature"],
        x["mask"],
        x["normalizer"],
        o["dim"],
        VALUES["direction"][o["direction"]],
        o["beta"],
        VALUES["reduction"][o["reduction"]],
        o["scale_by_t2"],
        o["include_entropy"],
        o["target_eps"],
    )


def _gradient_scale(case, x) -> torch.Tensor | float:
    """Return the magnitude of the gradient in each row, to which errors of the gradient are
    relative.
    """
    t = x["temperature"].double().cpu() if x["temperature"] is not None else torch.tensor(float(case.temperature))
    weight = t if case.scale_by_t2 else 1 / t
    rows = max(1, torch.Size(case.rows).numel() if x["mask"] is None else int(x["mask"].sum()))
    count = rows if case.normalizer is None else case.normalizer
    count = {"none": 1, "sum": 1, "batchmean": count, "mean": count * case.shape[case.dim]}[case.reduction]
    return (weight / count).expand(case.rows).unsqueeze(case.dim)


def _largest_logit(x) -> float:
    ordinary = [v[torch.isfinite(v) & (v.abs() < 1e30)].abs() for v in (x["student"].double(), x["teacher"].double())]
    return max((v.max().item() for v in ordinary if v.numel()), default=0.0)


@pytest.mark.parametrize("case", KL_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(case, backend):
    device = device_of_backend(backend)
    x = case.make(device)
    forward, backward = _operators(backend)
    loss, saved, row_scale = forward(*_arguments(case, x), True)
    upstream = torch.ones(case.rows if case.reduction == "none" else (), dtype=case.compute_dtype, device=device)
    student, teacher, temperature = backward(upstream, *_arguments(case, x), [True, True, True])
    assert loss.dtype == case.compute_dtype
    assert saved.dtype == student.dtype == case.student_dtype
    assert row_scale.shape == (case.rows if case.student_dtype == torch.float16 else (0,))
    assert teacher.dtype == case.teacher_dtype
    assert temperature.shape == case.rows
    if loss.numel() == 0 or x["student"].numel() == 0:
        assert not loss.any()
        return

    expected, (to_student, to_teacher, to_temperature) = _reference_loss_and_gradients(case, x)
    lowest_t = case.temperature if x["temperature"] is None else x["temperature"].min().item()
    # Errors of sums over the classes, and of the difference of the logits divided by T, in the
    # compute dtype.
    rtol = sum_error(case.compute_dtype, case.shape[case.dim]) + 4 * rounding(case.compute_dtype) * _largest_logit(x) / lowest_t
    if case.compute_dtype == torch.float64:
        rtol += 1e-11  # cancellation in the float64 reference
    weight = _gradient_scale(case, x)
    assert (torch.nan_to_num(loss) >= 0).all()
    assert_close("loss", loss, expected, rtol=rtol, atol=1e-13 * weight.max().item())

    # The error of p_s - p_t is relative to p |log p_s - log p_t|, which is p times the noise if the
    # noise is small.
    row_t = lowest_t if x["temperature"] is None else x["temperature"].double().cpu().unsqueeze(case.dim)
    p, q = (torch.softmax(x[k].double().cpu() / row_t, case.dim).nan_to_num(1.0) for k in ("teacher", "student"))
    scale = weight * (torch.maximum(p, q) * min(1.0, case.noise) + case.target_eps)
    close = functools.partial(assert_close, rtol=rtol, atol=1e-15, truncated=backend.startswith("triton") and device == "cpu")
    if case.student_dtype == torch.float16:
        powers = row_scale.unsqueeze(case.dim)
        assert torch.equal(powers.log2(), powers.log2().round())
        close("grad_student (saved)", saved, to_student / powers.double().cpu(), scale=scale / powers.double().cpu())
    else:
        close("grad_student (saved)", saved, to_student, scale=scale)
    close("grad_student", student, to_student, scale=scale)
    # The teacher's gradient is p times a difference of logarithms and their mean: its error is
    # relative to the largest of them.
    spread = 1 + min(_largest_logit(x), 1e3) / lowest_t
    close("grad_teacher", teacher, to_teacher, scale=scale * spread)
    per_row = weight.squeeze(case.dim) * (1 + _largest_logit(x) / lowest_t) / lowest_t * (1 + torch.nan_to_num(expected, posinf=0.0).max())
    close("grad_temperature", temperature, to_temperature, rtol=4 * rtol, scale=per_row)


@pytest.mark.parametrize("classes", [21, 1000, 5000])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_fast_kernels_leave_only_rows_that_are_not_ordinary(backend, classes, monkeypatch):
    pytest.importorskip("triton")
    from kdkernels.triton import temperature_kl_fast

    student, teacher = (2 * torch.randn(9, classes) for _ in range(2))
    for x in (student, teacher):
        x[1, 1::2] = -torch.inf  # both networks exclude these classes
    student[2, 3] = torch.nan
    teacher[3, classes - 1] = torch.inf
    student[4, 0] = 500.0  # the student is far more confident than the teacher
    teacher[5, :20] = -torch.inf
    teacher[6] += 1e4
    student[7], teacher[7] = -torch.inf, -torch.inf
    mask = torch.ones(9, dtype=torch.bool)
    mask[8] = False
    results = []
    launch = temperature_kl_fast.launch
    monkeypatch.setattr(temperature_kl_fast, "launch", lambda *arguments: results.append(launch(*arguments)) or results[-1])
    device = device_of_backend(backend)
    arguments = (
        student.to(device),
        teacher.to(device),
        2.0,
        None,
        mask.to(device),
        None,
        -1,
        VALUES["direction"]["forward"],
        0.5,
        VALUES["reduction"]["none"],
        True,
        True,
        0.0,
    )
    loss, grad, _ = _operators(backend)[0](*arguments, True)
    (left,) = results
    assert left.state.tolist() == [1, 1, 2, 2, 2, 2, 2, 2, 1]
    assert left.number[0].item() == 6
    s = student.double().requires_grad_()
    expected = reference.temperature_kl(s, teacher.double(), 2.0, mask=mask, reduction="none")
    (to_student,) = torch.autograd.grad(expected.nan_to_num().sum(), s)
    assert_close("loss", loss, expected.detach(), rtol=1e-5)
    finite = torch.tensor([0, 1, 4, 6, 8])
    assert_close("gradient", grad[finite], to_student[finite], rtol=1e-5, scale=1e-2)
    assert grad[2].isnan().all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_fast_kernels_leave_rows_whose_exponentials_a_gpu_flushes_to_zero(backend, monkeypatch):
    """A class is 2^70 times as likely for the student, and 2^-127 of the teacher's largest weight.

    The interpreter does not flush, so the numbers would be right there.
    """
    pytest.importorskip("triton")
    from kdkernels.triton import temperature_kl_fast

    teacher, student = torch.zeros(2, 21), torch.zeros(2, 21)
    teacher[1, 1:], student[1, 1:] = -88.5, -40.0
    results, launch = [], temperature_kl_fast.launch
    monkeypatch.setattr(temperature_kl_fast, "launch", lambda *arguments: results.append(launch(*arguments)) or results[-1])
    arguments = (None, None, None, -1, VALUES["direction"]["forward"], 0.5, VALUES["reduction"]["none"], True, True, 0.0)
    device = device_of_backend(backend)
    _operators(backend)[0](student.to(device), teacher.to(device), 1.0, *arguments, True)
    assert results[0].state.tolist() == [1, 2]


def test_known_values():
    s, t = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    for temperature, value in ((1, 1.1504207652), (2, 1.2806266713), (4, 1.3196299122)):
        assert temperature_kl(s, t, temperature).item() == pytest.approx(value, abs=5e-11)
    (grad,) = torch.autograd.grad(temperature_kl(s, t, 4.0), s)
    assert grad[0].tolist() == pytest.approx([-0.6598149561, 0, 0.6598149561], abs=5e-11)
    # T -> infinity with zero-mean logits: sum (z_s - z_t)^2 / (2 K)
    assert temperature_kl(s, t, 1e6).item() == pytest.approx(8 / 6, rel=1e-5, abs=0)
    soft, kl = (temperature_kl(s, t, 3.0, scale_by_t2=False, include_entropy=e).item() for e in (False, True))
    assert soft == pytest.approx(1.2080463420, abs=5e-11)
    assert kl == pytest.approx(0.1454690983, abs=5e-11)
    # FFL: target + 1e-7, T = 3, T^2 = 9
    assert temperature_kl(s, t, 3.0, target_eps=1e-7).item() == pytest.approx(1.3092245847, abs=5e-10)
    assert temperature_kl(t, t, 3.0, target_eps=1e-7).item() == pytest.approx(2.7e-6, rel=1e-5, abs=0)


def test_two_classes_match_values_computed_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = log 2 - H(p), and JSD(1/2) from its definition."""
    from math import log

    teacher, student = torch.tensor([[log(3.0), 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    entropy = -(0.75 * log(0.75) + 0.25 * log(0.25))
    assert temperature_kl(student, teacher).item() == pytest.approx(log(2) - entropy, rel=1e-14, abs=0)
    assert temperature_kl(student, teacher, direction="reverse").item() == pytest.approx(0.5 * log(4 / 3), rel=1e-14, abs=0)
    mixture = [0.625, 0.375]
    jsd = 0.5 * sum(p * log(p / m) for p, m in zip([0.75, 0.25], mixture, strict=True)) + 0.5 * sum(0.5 * log(0.5 / m) for m in mixture)
    assert temperature_kl(student, teacher, direction="jsd").item() == pytest.approx(jsd, rel=1e-13, abs=0)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("noise", [1e-3, 1e-6])
def test_float64_is_accurate_near_agreement(direction, noise):
    """Compare with 60-digit arithmetic: the float64 reference is off by 1e-4 at noise 1e-6."""
    mpmath = pytest.importorskip("mpmath")
    t = torch.randn(1, 20, dtype=torch.float64)
    s = t + noise * torch.randn(1, 20, dtype=torch.float64)
    with mpmath.workdps(60):
        p, q = ([mpmath.exp(mpmath.mpf(v)) for v in x[0].tolist()] for x in (t, s))
        p, q = ([v / mpmath.fsum(x) for v in x] for x in (p, q))
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

        def kl(a, b):
            return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True))

        exact = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[direction]
    s.requires_grad_()
    loss = temperature_kl(s, t, direction=direction)
    assert loss.item() == pytest.approx(float(exact), rel=1e-13 / noise * 1e-2 + 1e-13, abs=0)
    if direction == "forward":
        loss.backward()
        difference = torch.tensor([float(b - a) for a, b in zip(p, q, strict=True)], dtype=torch.float64)
        assert_close("p_s - p_t", s.grad[0], difference, rtol=1e-12, scale=difference.abs().max() * 1e-2 / noise * 1e-3)


@pytest.mark.parametrize("noise", [0.5, 0.05, 0.005])
def test_float32_is_accurate_near_agreement(noise, device):
    """For V = 32000 and T = 4 the relative error is below 5e-6.

    The textbook form in float32 becomes negative.
    """
    t = 2 * torch.randn(8, 32000, dtype=torch.float64)
    s = (t + noise * torch.randn_like(t)).float()
    t = t.float()
    exact_s = s.double().requires_grad_()
    exact = reference.temperature_kl(exact_s, t.double(), 4.0)
    (exact_grad,) = torch.autograd.grad(exact, exact_s)
    s = s.to(device).requires_grad_()
    loss = temperature_kl(s, t.to(device), 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=5e-6, abs=0)
    assert ((s.grad.cpu() - exact_grad).norm() / exact_grad.norm()).item() < 5e-6


logits = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40)


@given(logits, st.data(), st.floats(0.1, 20), st.sampled_from(["forward", "reverse", "jsd"]))
def test_mathematical_properties(t, data, temperature, direction):
    t = torch.tensor([t])
    s = torch.tensor([data.draw(st.lists(st.floats(-30, 30, width=32), min_size=t.shape[1], max_size=t.shape[1]))])
    call = dict(temperature=temperature, direction=direction)
    loss = temperature_kl(s, t, **call)
    assert loss.isfinite()
    assert loss >= 0
    assert temperature_kl(t, t, **call) == 0
    order = torch.tensor(data.draw(st.permutations(range(t.shape[1]))))
    slack = 1e-5 * (1 + 60 / temperature) * (loss.item() + temperature**2 * 1e-5)
    assert abs(temperature_kl(s[:, order], t[:, order], **call) - loss) <= slack  # permute the classes
    mirrored = {"forward": "reverse", "reverse": "forward", "jsd": "jsd"}[direction]
    assert abs(temperature_kl(t, s, temperature, direction=mirrored) - loss) <= slack  # exchange student and teacher
    doubled = temperature_kl(torch.cat([s, s]), torch.cat([t, t]), **call)
    assert abs(doubled - loss) <= slack  # batchmean does not change if the batch is repeated
    if direction == "jsd":
        assert loss <= temperature**2 * 0.693148


def test_jsd_with_beta_0_and_1_equals_kl(device):
    s, t = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device)
    assert torch.equal(temperature_kl(s, t, direction="jsd", beta=0), temperature_kl(s, t))
    assert torch.equal(temperature_kl(s, t, direction="jsd", beta=1.0), temperature_kl(s, t, direction="reverse"))


def test_only_rows_without_a_distribution_are_nan(device):
    s, t = torch.randn(5, 40, device=device), torch.randn(5, 40, device=device)
    clean = temperature_kl(s, t, reduction="none")
    s[1] = -torch.inf
    t[2, 7] = torch.nan
    s[3, 39] = torch.nan
    s.requires_grad_()
    loss = temperature_kl(s, t, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True, False]
    assert torch.equal(loss[[0, 4]], clean[[0, 4]])
    loss.sum().backward()
    assert s.grad[[0, 4]].isfinite().all()
    assert s.grad[[1, 2, 3]].isnan().all()


@pytest.mark.parametrize("shape", [(3, 300), (3, 7), (3, 11, 40)], ids=str)
@pytest.mark.parametrize("options", [{"direction": "forward"}, {"direction": "reverse"}, {"direction": "jsd"}, {"target_eps": 0.1}], ids=str)
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("backend", [*DEVICES, "triton"])
def test_classes_without_probability_have_nan_gradients_in_rows_with_a_nan(backend, which, options, shape):
    s, t = torch.randn(shape), torch.randn(shape)
    (s if which == "student" else t)[1, 2] = torch.nan
    s[1, 3] = t[1, 3] = -3000.0
    s[1, 4] = t[1, 5] = -2000.0
    device = device_of_backend(backend)
    o = {"direction": "forward", "target_eps": 0.0} | options
    arguments = (s.to(device), t.to(device), 1.0, None, None, None, 1, VALUES["direction"][o["direction"]], 0.5, VALUES["reduction"]["mean"])
    one = torch.ones((), device=device)
    gradients = _operators(backend)[1](one, *arguments, True, True, o["target_eps"], [True, True, False])
    for gradient in gradients[:2]:
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


def test_infinite_divergence(device):
    """If the student excludes a class that the teacher does not, the loss is infinite, and its
    gradient p_s - p_t is finite.
    """
    t = torch.randn(3, 8, device=device)
    s = torch.randn(3, 8, device=device)
    s[:, 2] = -torch.inf
    s.requires_grad_()
    loss = temperature_kl(s, t)
    assert loss.item() == torch.inf
    loss.backward()
    assert_close("grad", s.grad, (torch.softmax(s.double(), 1) - torch.softmax(t.double(), 1)) / 3, rtol=1e-5, scale=0.1)


def test_fully_masked_and_empty_batches(device):
    s, t = torch.randn(4, 6, device=device, requires_grad=True), torch.randn(4, 6, device=device)
    loss = temperature_kl(s, t, mask=torch.zeros(4, dtype=torch.bool, device=device))
    loss.backward()
    assert loss == 0
    assert not s.grad.any()
    assert temperature_kl(s[:0], t[:0]) == 0


def test_micro_batches_add_up(device):
    """With a normalizer the sum of the losses, and its gradient, do not depend on how the batch is
    split.
    """
    s, t = torch.randn(12, 30, device=device, requires_grad=True), torch.randn(12, 30, device=device)
    mask = torch.rand(12, device=device) > 0.3
    full_loss = temperature_kl(s, t, 2.0, mask=mask)
    (grad,) = torch.autograd.grad(full_loss, s)
    count = mask.sum()
    parts = sum(temperature_kl(s[i : i + 5], t[i : i + 5], 2.0, mask=mask[i : i + 5], normalizer=count) for i in range(0, 12, 5))
    (grad_parts,) = torch.autograd.grad(parts, s)
    assert_close("loss", parts, full_loss, rtol=1e-6)
    assert_close("grad", grad_parts, grad, rtol=1e-6, scale=1e-2)
    assert_close("float", temperature_kl(s, t, 2.0, mask=mask, normalizer=float(count)), full_loss, rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("noise", [0.3, 5.0])  # other loops add the terms of rows that are close than those of others
@pytest.mark.parametrize("logit", [6.0, 50.0, 500.0])  # 500: the networks are so far apart that the row is centred
def test_rows_do_not_depend_on_each_other(logit, noise, dtype, direction):
    """With rows adjacent in memory, or few classes, a vector holds several rows. Others are
    computed in pairs.
    """
    for shape, dim in (((2, 16), 0), ((64, 5), 1), ((67, 33), 1), ((67, 96), 1), ((3, 7, 8, 8), 1), ((5, 400), 1)):
        teacher = torch.randn(shape, dtype=dtype)
        student = teacher + noise * torch.randn(shape, dtype=dtype)
        student.select(0, 0).copy_(teacher.select(0, 0))
        changed = student.clone()
        row = [0] * len(shape)
        row[dim] = 1
        changed[tuple(row)] = logit
        losses, gradients = [], []
        for s in (student, changed):
            s.requires_grad_()
            loss = temperature_kl(s, teacher, 2.0, dim=dim, direction=direction, reduction="none")
            gradients += [torch.autograd.grad(loss.sum(), s)[0].movedim(dim, -1).flatten(end_dim=-2)]
            losses += [loss.detach().flatten()]
        assert torch.equal(losses[0][1:], losses[1][1:])
        assert torch.equal(gradients[0][1:], gradients[1][1:])
        assert losses[0][0] != losses[1][0]
