"""The CUDA kernel of temperature_kl for long rows: clusters, layouts, masks and weights.

Without a GPU its body runs on the CPU (csrc/testing/host_cluster.h). test_temperature_kl.py and
test_temperature_kl_extremes.py call it through the op, as "triton cuda".
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from long_rows import run_long_rows
from tolerances import rounding

from kdkernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 5


@pytest.fixture(scope="module")
def kernel():
    """Return the function that runs the kernel."""
    if DEVICE == "cpu":
        import testing_ops  # noqa: F401  registers the kernel for CPU tensors
    return run_long_rows


def _expected(teacher, student, *, row_temperature=None, mask=None, weight=None, upstream=None, scale_by_t2=True):
    s = student.double().cpu().requires_grad_()
    t = torch.full((ROWS,), 3.0) if row_temperature is None else row_temperature.cpu()
    kept = None if mask is None else mask.cpu()
    loss = reference.temperature_kl(s, teacher.double().cpu(), t.double(), mask=kept, reduction="none", scale_by_t2=scale_by_t2)
    factor = torch.full((ROWS,), 0.5 * (1.0 if weight is None else weight.item()), dtype=torch.float64)
    factor = factor if upstream is None else factor * upstream.double().cpu()
    probability = torch.softmax(teacher.double().cpu() / t.double()[:, None], 1)
    unit = (probability * (factor * (t.double() if scale_by_t2 else 1 / t.double())).abs()[:, None]).nan_to_num()
    return loss.detach(), torch.autograd.grad(loss, s, factor)[0], unit


def _check(result, expected, dtype):
    computed, loss, grad, state, left = result
    assert computed
    assert left == 0
    assert (state == 1).all()
    expected_loss, expected_grad, unit = expected
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=1e-6, atol=1e-13)
    # A gradient is rounded to its dtype. Before that, its error is that of exponentials of base 2
    # in float32. Their exponents are below 32 in these tests, and are rounded relative to that. In
    # bfloat16 the centre's error is not corrected, which adds an error proportional to the
    # probability.
    error, one = (grad.cpu().double() - expected_grad).abs(), rounding(torch.float32)
    allowed = rounding(dtype) * expected_grad.abs() + 32 * one * expected_grad.abs().amax(1, keepdim=True)
    assert (error <= allowed + (32 * one * unit if dtype == torch.bfloat16 else 0)).all()


@settings(max_examples=40)
@given(
    classes=st.integers(100, 9000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    launch=st.sampled_from([(0, 0), (256, 1), (256, 2), (512, 4), (256, 8), (512, 8)]),
    distance=st.sampled_from([1e-3, 0.3, 3.0, 10.0]),
    padding=st.integers(0, 9),
    first=st.integers(0, 9),
    options=st.fixed_dictionaries({"mask": st.booleans(), "row_temperature": st.booleans(), "weight": st.booleans(), "upstream": st.booleans()}),
    scale_by_t2=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_of_any_length_and_position(kernel, classes, dtype, launch, distance, padding, first, options, scale_by_t2, seed):
    """Rows need not begin at a multiple of 16 bytes, nor follow each other without a gap."""
    torch.manual_seed(seed)
    storage = torch.randn(3, first + ROWS * (classes + padding), device=DEVICE)
    storage[1] = storage[0] + distance * storage[1]
    teacher, student, grad = (x.to(dtype, copy=True)[first:].view(ROWS, -1)[:, :classes] for x in storage)
    grad.fill_(7.0)
    around = grad.as_strided((ROWS, classes + padding), grad.stride(), grad.storage_offset())
    given_options = {
        "mask": torch.tensor([True, False, True, True, False]),
        "row_temperature": torch.tensor([2.0, 3.0, 4.0, 6.0, 8.0]),
        "weight": torch.tensor(0.25, dtype=torch.float64),
        "upstream": torch.tensor([1.0, -2.0, 3.0, 0.0, 5.0]),
    }
    kwargs = {name: x.to(DEVICE) for name, x in given_options.items() if options[name]} | {"scale_by_t2": scale_by_t2}
    before = around[:, classes:].clone()
    result = kernel(teacher, student, grad, threads=launch[0], ranks=launch[1], **kwargs)
    _check(result, _expected(teacher, student, **kwargs), dtype)
    assert torch.equal(around[:, classes:], before)  # nothing is written between the rows


def test_equal_networks_have_neither_loss_nor_gradient(kernel):
    for dtype in (torch.float32, torch.bfloat16):
        x = (5 * torch.randn(ROWS, 5001, device=DEVICE)).to(dtype)
        _, loss, grad, _, left = kernel(x, x.clone(), ranks=2, threads=256)
        assert left == 0
        assert not loss.any()
        assert not grad.any()


def test_results_do_not_depend_on_the_cluster_beyond_rounding(kernel):
    teacher, student = (torch.randn(ROWS, 7003, device=DEVICE) for _ in range(2))
    results = [kernel(teacher, student, threads=threads, ranks=ranks)[1:3] for threads in (256, 512) for ranks in (1, 2, 4, 8)]
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_an_infinite_or_steep_class_are_left(kernel, dtype, temperature):
    """_kl_kernel of kdkernels/triton/temperature_kl.py computes them.

    In row 0 only the student excludes a class, to which the teacher gives a small probability. In
    row 1 a class is so much more likely for the student that its weight e is 0 in float32. The
    other rows have neither.
    """
    teacher = torch.randn(ROWS, 8192)
    student = teacher + 0.5 * torch.randn(ROWS, 8192)
    teacher[0, 5], student[0, 5] = -25 * temperature, -torch.inf
    teacher[1], student[1] = -88.5 * temperature, -26.5 * temperature
    teacher[1, 0] = student[1, 0] = 0.0
    teacher[2, 7], student[2, 7] = -torch.inf, -torch.inf
    teacher, student = teacher.to(DEVICE, dtype), student.to(DEVICE, dtype)
    t = torch.full((ROWS,), temperature, device=DEVICE)
    _, loss, grad, state, left = kernel(teacher, student, row_temperature=t)
    assert state.tolist() == [2, 2, 1, 1, 1]
    assert left == 2
    expected = _expected(teacher, student, row_temperature=t)
    _check((True, loss[2:], grad[2:], state[2:], 0), [x[2:] for x in expected], dtype)


def test_rows_whose_temperature_is_not_positive_are_left(kernel):
    teacher, student = (torch.full((ROWS, 5000), -2e38, device=DEVICE) for _ in range(2))
    *_, state, left = kernel(teacher, student, row_temperature=torch.tensor([-1e38, 0.0, -1.0, torch.nan, -torch.inf], device=DEVICE))
    assert (state == 2).all()
    assert left == ROWS


def test_gradient_is_accurate_if_the_networks_have_different_offsets(kernel):
    """The offset is subtracted exactly, whatever it is."""
    teacher = torch.randn(ROWS, 6001, device=DEVICE)
    for offset in (0.0, 7.3, -31.0, 60.0):
        student = teacher + torch.randn(ROWS, 6001, device=DEVICE) + offset
        _, loss, grad, _, left = kernel(teacher, student)
        expected_loss, expected_grad, _ = _expected(teacher, student)
        assert left == 0
        # The exponents before the offset is subtracted are below 64, and T is rounded to float32.
        torch.testing.assert_close(loss.double().cpu(), expected_loss, rtol=2e-6, atol=0)
        error = (grad.double().cpu() - expected_grad).abs() / expected_grad.abs().amax(1, keepdim=True)
        assert error.max() <= 64 * rounding(torch.float32)


def test_rows_that_the_kernel_does_not_support(kernel):
    """It computes nothing: the gradient and the losses keep their values."""
    x = torch.randn(ROWS, 4200, device=DEVICE)
    unlike = torch.randn(ROWS * 4200 + 1, device=DEVICE)[1:].view(ROWS, 4200)  # begins 4 bytes after a multiple of 16
    long = torch.empty(1, device=DEVICE).expand(ROWS, 300_000)  # two rows of 1.2 MB
    for teacher, student in ((x, unlike), (x, x.bfloat16()), (x.double(), x.double()), (x.half(), x.half()), (long, long)):
        grad = torch.full(student.shape, 7.0, dtype=student.dtype, device=DEVICE)
        computed, loss, grad, state, _ = kernel(teacher, student, grad)
        assert not computed
        assert loss.isnan().all()
        assert (grad == 7).all()
        assert not state.any()
