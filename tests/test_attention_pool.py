"""attention_pool and attention_transfer_loss against the references in float64, for every backend,
and known values.
"""

import itertools

import pytest
import torch
from conftest import DEVICES
from feature_cases import FEATURE_CASES, FeatureCase
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, sum_error

from kdkernels import attention_pool, attention_transfer_loss, reference
from kdkernels.options import VALUES

BACKENDS = [*DEVICES, "triton"]
OPTIONS = [
    (2.0, "mean", None),
    (2.0, "sum", "l2"),
    (2.0, "max", "l2"),
    (1.0, "sum", None),
    (1.0, "max", None),
    (4.0, "mean", "l2"),
    (1.5, "mean", "l2"),
    (3.0, "sum", None),
    (0.5, "sum", None),
    (2.7, "mean", "l2"),
    (2.7, "max", None),
    (2.0, "mean", "softmax"),
    (1.0, "max", "softmax"),
]


def _device(backend):
    return "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"


def _operators(backend):
    """Return the module or namespace that contains the four ops."""
    if backend == "triton":
        from kdkernels.triton import attention_pool as kernels

        return kernels
    return torch.ops.kdkernels


def _compute(*features):
    return torch.float64 if torch.float64 in [x.dtype for x in features] else torch.float32


def _rtol(dtype, channels, p):
    """Return the relative tolerance.

    A power has some more rounding errors, and a general power those of its logarithm.
    """
    return sum_error(dtype, channels, 24 + 16 * p)


def _derivative(x, p):
    """Return p |x|^(p-1) in float64, and 0 for x = 0."""
    size = x.double().abs()
    return torch.where(size == 0, size, p * torch.where(size == 0, torch.ones_like(size), size) ** (p - 1))


def _replace_non_finite(x):
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _pool_cases():
    for backend, case, option_set in itertools.product(BACKENDS, FEATURE_CASES, OPTIONS):
        if option_set[2] == "softmax" and case.scale > 1:
            continue  # the softmax of values of 10^7 is 1 at one position, and underflows at the others
        if backend == "triton" and torch.Size(case.shape).numel() > 5000 and option_set not in OPTIONS[1::4]:
            continue  # the interpreter needs a second for each of these cases
        yield pytest.param(backend, case, *option_set, id=f"{backend}-{case.name}-{'-'.join(map(str, option_set))}")


@pytest.mark.parametrize(("backend", "case", "p", "reduce", "normalize"), _pool_cases())
def test_attention_pool(backend, case, p, reduce, normalize):
    x = case.make(_device(backend))
    ops = _operators(backend)
    options = (VALUES["reduce"][reduce], VALUES["normalize"][normalize], 1e-12)
    maps, norm, channel = ops.attention_pool(x, p, *options)
    exact = x.detach().double().cpu().contiguous().requires_grad_()
    expected = reference.attention_pool(exact, p, reduce=reduce, normalize=normalize)
    assert maps.dtype == _compute(x)
    rtol = _rtol(_compute(x), case.shape[1], p)
    pooled = reference.attention_pool(exact.detach(), p, reduce=reduce)
    if normalize == "softmax":
        rtol = rtol * (2 + _replace_non_finite(pooled).abs().max().item() if pooled.numel() else 1)  # absolute errors of the exponent
    assert_close("maps", maps, expected, rtol=2 * rtol)

    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(maps.dtype)
    grad = ops.attention_pool_backward(g.to(maps.device), x, maps, norm, channel, p, *options)
    (want,) = torch.autograd.grad(expected, exact, g.double())
    want = torch.where(exact.isnan(), exact, want)  # autograd returns 0 for a NaN if p = 1
    want = torch.where(want.abs() > torch.finfo(x.dtype).max, want.sign() * float("inf"), want)
    assert grad.dtype == x.dtype
    assert grad.stride() == torch.empty_like(x).stride()
    # Errors are relative to the terms of the gradient before they cancel.
    size, q = g.double().abs(), _replace_non_finite(expected.detach()).abs()
    if normalize:
        size = size + (q * size).flatten(1).sum(1).view(-1, *[1] * (q.dim() - 1)) * (q if normalize == "l2" else 1)
    if normalize == "l2":
        size = size / pooled.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (q.dim() - 1))
    if normalize == "softmax":
        size = size * q
    scale = _replace_non_finite(size.unsqueeze(1) * _derivative(exact.detach(), p) / (case.shape[1] if reduce == "mean" else 1))
    truncated = backend == "triton" and _device(backend) == "cpu"
    assert_close("gradient", grad, want, rtol=4 * rtol, scale=scale, atol=1e-40, truncated=truncated)


LOSS_CASES = [c for c in FEATURE_CASES if c.edit not in ("inf sample",)]
LOSS_OPTIONS = [(2.0, "authors", "mean"), (2.0, "paper", "sum"), (1.5, "authors", "max"), (2.7, "paper", "mean")]


@pytest.mark.parametrize(("p", "variant", "reduce"), LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_transfer_loss(case, p, variant, reduce, backend):
    device = _device(backend)
    student = case.make(device)
    other = FeatureCase("", (case.shape[0], 4, *case.shape[2:]), torch.float32)  # another number of channels, dtype and layout
    teacher = other.make(device, seed=5)
    ops = _operators(backend)
    s, t = (x.detach().double().cpu().contiguous().requires_grad_() for x in (student, teacher))
    want = reference.attention_transfer_loss(s, t, p, variant=variant, reduce=reduce)
    options = (p, VALUES["variant"][variant], VALUES["reduce"][reduce], 1e-12)
    loss, saved, power, teacher_map = ops.attention_transfer_loss(student, teacher, *options, True)
    assert loss.dtype == teacher_map.dtype == _compute(student, teacher)
    assert power.shape == ((case.shape[0],) if student.dtype == torch.float16 else (0,))
    if power.numel():
        assert torch.equal(power.frexp()[0], torch.full_like(power, 0.5))

    # The normalized maps q have a relative error, and their difference d an absolute error.
    batch, places = case.shape[0], max(1, want.new_empty(case.shape[2:]).numel())
    rtol = 2 * _rtol(loss.dtype, max(case.shape[1], 4), p)
    q = [_replace_non_finite(reference.attention_pool(x.detach(), p, reduce=reduce, normalize="l2")).flatten(1) for x in (s, t)]
    both = q[0] + q[1]
    d = (q[0] - q[1]).norm(dim=1)
    loss_magnitude = 2 * d * both.norm(dim=1) / places if variant == "authors" else both.norm(dim=1)
    assert_close("loss", loss, want, rtol=rtol, atol=rtol * loss_magnitude.sum().item() / max(batch, 1) + rtol**2)

    upstream = torch.tensor(-1.5, dtype=loss.dtype, device=device)
    gradients = torch.autograd.grad(want, (s, t))
    results = [(saved, gradients[0], student, 0)]
    to_student, to_teacher = ops.attention_transfer_loss_backward(upstream, student, teacher, *options, [True, True])
    results += [(to_student, -1.5 * gradients[0], student, 0), (to_teacher, -1.5 * gradients[1], teacher, 1)]
    for i, (got, expected, x, net) in enumerate(results):
        assert got.stride() == torch.empty_like(x).stride()
        maps = reference.attention_pool(x.detach().double().cpu(), p, reduce=reduce).flatten(1)
        loss_derivative = 2 / places if variant == "authors" else (1 + 2 / d.clamp_min(1e-300)) / d.clamp_min(1e-300) * (d > 0)
        projection = (q[net] * both).sum(1, keepdim=True)
        size = (both + q[net] * projection) / maps.norm(dim=1, keepdim=True).clamp_min(1e-12)
        size = (
            (size * (loss_derivative if variant == "authors" else loss_derivative[:, None]) / max(batch, 1)).view(batch, *case.shape[2:]).unsqueeze(1)
        )
        scale = _replace_non_finite(1.5 * size * _derivative(x.detach().cpu(), p) / (x.shape[1] if reduce == "mean" else 1))
        truncated = backend == "triton" and device == "cpu"
        if i == 0 and power.numel():  # stored divided by a power of two per sample
            expected, scale = (v / power.double().cpu().view(-1, *(1,) * (v.dim() - 1)) for v in (expected, scale))
        assert_close(f"gradient {i}", got, expected, rtol=4 * rtol, scale=scale, atol=1e-40, truncated=truncated)


# Known values, which docs/attention_pool.md derives by hand.

A = torch.tensor([[[3.0, 1.0], [4.0, 2.0]]], dtype=torch.float64)
T = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)


@pytest.mark.parametrize("pool", [attention_pool, reference.attention_pool])
def test_known_maps(pool):
    assert pool(A, 1, reduce="sum").tolist() == [[7, 3]]
    assert pool(A, 2, reduce="sum").tolist() == [[25, 5]]
    assert pool(A, 4, reduce="sum").tolist() == [[337, 17]]
    assert pool(A, 2, reduce="max").tolist() == [[16, 4]]
    torch.testing.assert_close(pool(A, 2, normalize="l2"), torch.tensor([[0.9805806757, 0.1961161351]], dtype=torch.float64), rtol=1e-9, atol=0)
    softmax = torch.tensor([[20.0, 0.0]], dtype=torch.float64).softmax(1)
    torch.testing.assert_close(pool(A, 2, reduce="sum", normalize="softmax"), softmax)


@pytest.mark.parametrize("loss", [attention_transfer_loss, reference.attention_transfer_loss])
def test_known_losses(loss):
    s = A.clone().requires_grad_()
    authors_loss = loss(s, T)
    authors_loss.backward()
    assert authors_loss.item() == pytest.approx(0.8038838649, rel=1e-9, abs=0)
    expected = torch.tensor([[[0.0452575696, -0.0754292827], [0.0603434262, -0.1508585656]]], dtype=torch.float64)
    torch.testing.assert_close(s.grad, expected, rtol=1e-8, atol=0)
    assert loss(A, T, variant="paper").item() == pytest.approx(1.2679778113, rel=1e-9, abs=0)


# Properties.


@given(seed=st.integers(0, 10_000), p=st.sampled_from([0.5, 1, 1.5, 2, 2.3, 3, 4]), scale=st.sampled_from([1e-2, 0.7, 3.0, 50.0]))
def test_normalized_maps_do_not_depend_on_scale_sign_and_order_of_channels(seed, p, scale):
    torch.manual_seed(seed)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    q = attention_pool(x, p, normalize="l2")
    torch.testing.assert_close(attention_pool(scale * x, p, normalize="l2"), q)
    torch.testing.assert_close(attention_pool(-x, p, normalize="l2"), q)
    torch.testing.assert_close(attention_pool(x[:, torch.randperm(6)], p, normalize="l2"), q)
    torch.testing.assert_close(attention_pool(torch.cat([x, x], 1), p, normalize="l2"), q)
    torch.testing.assert_close(attention_pool(x, p, reduce="sum", normalize="l2"), q)
    other = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert attention_transfer_loss(x, -scale * x, p).item() == pytest.approx(0, abs=1e-15)
    assert 0 <= attention_transfer_loss(x, other, p).item() <= 2 / 20 + 1e-12
    assert 0 <= attention_transfer_loss(x, other, p, variant="paper").item() <= 2**0.5 + 1e-12
    assert attention_transfer_loss(x, other, p).item() == pytest.approx(attention_transfer_loss(other, x, p).item(), rel=1e-12, abs=0)


@given(seed=st.integers(0, 10_000), p=st.floats(0.25, 8))
def test_powers_of_any_exponent(seed, p):
    torch.manual_seed(seed)
    x = torch.randn(1, 1, 40) * 10.0 ** torch.randint(-4, 3, (40,))
    expected = x.double().abs() ** p
    assert_close("power", attention_pool(x, p), expected[0], rtol=_rtol(torch.float32, 1, p))
    exact = attention_pool(x.double(), p)
    torch.testing.assert_close(exact, expected[0], rtol=1e-14 * (1 + p), atol=0)


@pytest.mark.parametrize("p", [0.3, 1.5, 2.0, 2.7])
def test_powers_of_extreme_values(p):
    """The power is accurate for the smallest and the largest numbers, if it is a normal number."""
    x = torch.tensor([1.4e-45, 1e-42, 1.2e-38, 1e-30, 1e-12, 1.0, 1e12, 1e30, 3.4e38, 0.0]).view(1, 1, -1)
    expected = x.double()[0] ** p
    normal = (expected >= torch.finfo(torch.float32).tiny) & (expected <= torch.finfo(torch.float32).max)
    got = attention_pool(x, p)
    assert_close("power", got[normal], expected[normal], rtol=_rtol(torch.float32, 1, p))
    assert (got[expected > 1e39] == float("inf")).all()
    assert (got[expected < 1e-46] == 0).all()


# Corner cases.


@pytest.mark.parametrize(("p", "reduce"), itertools.product([0.5, 1.0, 2.0, 2.7], ["mean", "max"]))
def test_map_of_zeros_stays_zero_and_has_zero_gradient(p, reduce, device):
    s = torch.zeros(2, 4, 3, 3, device=device, requires_grad=True)
    t = torch.randn(2, 4, 3, 3, device=device)
    assert torch.equal(attention_pool(s, p, reduce=reduce, normalize="l2"), torch.zeros(2, 3, 3, device=device))
    loss = attention_transfer_loss(s, t, p, reduce=reduce)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 9, rel=1e-5, abs=0)
    assert torch.equal(s.grad, torch.zeros_like(s))
    same = attention_transfer_loss(t.requires_grad_(), t.detach(), p, variant="paper", reduce=reduce)  # the gradient of the norm at 0 is defined as 0
    same.backward()
    assert same == 0
    assert torch.equal(t.grad, torch.zeros_like(t))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["paper", "authors"])
@pytest.mark.parametrize(("shape", "p"), [((4, 8, 5, 5), 2.0), ((3, 1, 40, 70), 1.5), ((2, 3, 1, 1), 1.0)])
def test_equal_maps_have_no_distance_and_no_gradient(shape, p, variant, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    s, t = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert attention_transfer_loss(s.detach(), t.detach(), variant=variant, p=p) == 0
    for wanted in ((s, t.detach()), (s.detach(), t), (s, t)):
        loss = attention_transfer_loss(*wanted, variant=variant, p=p)
        assert loss == 0
        for gradient in torch.autograd.grad(loss, [y for y in wanted if y.requires_grad]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_first_of_equal_channels_receives_the_gradient(device):
    x = torch.tensor([[[1.0, -2.0, 0.0], [-1.0, 2.0, 0.0], [1.0, 1.0, 0.0]]], device=device, requires_grad=True)
    attention_pool(x, 2, reduce="max").sum().backward()
    assert x.grad.tolist() == [[[2, -4, 0], [0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_invalid_sample_does_not_affect_other_samples(layout, reduce, device):
    x = FeatureCase("", (3, 20, 6, 6), layout=layout).make(device)
    bad = x.clone()
    bad[1, 3, 2, 2] = float("nan")
    t = torch.randn(3, 5, 6, 6, device=device)
    grads = []
    for features in (x, bad):
        features.requires_grad_()
        maps = attention_pool(features, reduce=reduce, normalize="l2")
        loss = attention_transfer_loss(features, t, reduce=reduce)
        grads.append(torch.autograd.grad(loss, features)[0])
    assert loss.isnan()
    assert maps[1].isnan().all()
    for i in (0, 2):
        assert torch.equal(grads[0][i], grads[1][i])
        assert maps[i].isfinite().all()


def test_maps_of_different_size_are_average_pooled_first():
    s, t = torch.randn(2, 3, 8, 6, requires_grad=True), torch.randn(2, 5, 4, 9)
    loss = attention_transfer_loss(s, t)
    pooled = torch.nn.functional.adaptive_avg_pool2d
    expected = reference.attention_transfer_loss(pooled(s, (4, 6)), pooled(t, (4, 6)))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(reference.attention_transfer_loss(s, t), expected)
    for got, want in zip(torch.autograd.grad(loss, s), torch.autograd.grad(expected, s), strict=True):
        torch.testing.assert_close(got, want)
    for spatial in ((8,), (4, 6, 8)):
        torch.testing.assert_close(
            attention_transfer_loss(torch.ones(1, 2, *spatial), torch.ones(1, 2, *(n // 2 for n in spatial))), torch.tensor(0.0)
        )


def test_empty_batch_of_large_samples():
    """Samples that are large enough to be divided among threads."""
    x = torch.randn(0, 512, 28, 28, requires_grad=True)
    loss = attention_transfer_loss(x, torch.randn(0, 64, 28, 28))
    loss.backward()
    assert loss == 0
    assert x.grad.shape == x.shape
    assert attention_pool(x, normalize="l2").shape == (0, 28, 28)


def test_gradient_of_tiny_maps_is_finite():
    """1 / |q_s - q_t| and 1 / |map| leave the range of float32, but the gradient does not."""
    generator = torch.Generator().manual_seed(0)
    for scale_of_student in (0.0, 1e-20, 1e-15):
        student = (scale_of_student * torch.randn(2, 2, 4, 4, generator=generator)).requires_grad_()
        teacher = (1e-20 * torch.randn(2, 2, 4, 4, generator=generator)).requires_grad_()
        exact = [t.detach().double().requires_grad_() for t in (student, teacher)]
        attention_transfer_loss(student, teacher, variant="paper").backward()
        reference.attention_transfer_loss(*exact, variant="paper").backward()
        for features, expected in zip((student, teacher), exact, strict=True):
            torch.testing.assert_close(features.grad.double(), expected.grad, rtol=1e-3, atol=1e-3 * expected.grad.abs().max().item() + 1e-30)
