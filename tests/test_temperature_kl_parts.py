"""temperature_kl of long rows, which the CPU kernel computes in parts: networks whose difference is
not the same in all parts of a row. The reference in float64 gives the expected results.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels import reference, temperature_kl

LENGTH = 9001  # several parts on every instruction set, and a last one that is not full
BLOCK = slice(1500, 6500)  # contains whole parts
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24}  # of the computation

# Changes of a block of the classes in units of the temperature: of the teacher, of the student.
CHANGES = {
    "teacher low": (-40.0, 0.0),
    "teacher very low": (-120.0, 0.0),
    "student low": (0.0, -40.0),
    "student very low": (0.0, -120.0),
    "student less low": (-85.0, -25.0),
    "student higher": (0.0, 7.0),
    "both very low": (-200.0, -120.0),
    "teacher excludes": (-math.inf, 0.0),
    "both exclude": (-math.inf, -math.inf),
}


def _networks(seed, spread, difference, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(3, length, generator=generator, dtype=torch.float64) * spread
    return teacher + torch.randn(3, length, generator=generator, dtype=torch.float64) * difference, teacher


def _check(student, teacher, temperature, direction="forward", dtype=torch.float32):
    """Compare losses and gradients with the reference, and losses with and without gradients."""
    inputs = [x.to(dtype).requires_grad_() for x in (student, teacher)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    options = {"reduction": "none", "direction": direction}
    loss, exact = temperature_kl(*inputs, temperature, **options), reference.temperature_kl(*exact_inputs, temperature, **options)
    gradients, exact_gradients = (torch.autograd.grad(y.sum(), x) for y, x in ((loss, inputs), (exact, exact_inputs)))
    rounding, gap = ROUNDING[dtype], (exact_inputs[0] - exact_inputs[1]).detach().abs().nan_to_num(0, posinf=0).amax(1)
    # The differences of the logits have rounding errors of their own, which count if they are
    # small, and the formula of the reference, which is computed in float64, a few roundings of 1.
    # 80 roundings of float32 are the 5e-6 that the README promises.
    of_formulas = rounding * gap.clamp(max=0.1) ** 2 + 16 * ROUNDING[torch.float64]
    assert bool(((loss.double() - exact).abs() <= 80 * rounding * exact + of_formulas).all())
    for x, got, want in zip(inputs, gradients, exact_gradients, strict=True):
        if not x.isfinite().all():
            continue  # the gradient of a class that the teacher excludes is 0, but NaN in the reference
        bound = 320 * rounding * want.abs().amax(1, keepdim=True) + 16 * rounding * temperature * want.new_ones(1)
        if x is inputs[direction == "forward"]:  # the network whose probabilities weight the sum: p (x - E_p[x])
            bound = bound + 8 * rounding * temperature * gap[:, None]
        if dtype == torch.bfloat16:
            bound = bound + 2.0**-8 * want.abs()
        assert bool(((got.double() - want).abs() <= bound).all())
    with torch.no_grad():
        assert torch.equal(temperature_kl(*inputs, temperature, **options), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_of_the_classes_differs_from_the_others(change, dtype):
    temperature = 2.0
    student, teacher = _networks(0, 3.0, 1.0)
    of_teacher, of_student = CHANGES[change]
    teacher[:, BLOCK] += of_teacher * temperature
    student[:, BLOCK] += of_student * temperature
    _check(student, teacher, temperature, dtype=dtype)


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2047, 2048, 2049, 4096, 4097])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_rows_of_one_and_two_parts(length, direction):
    student, teacher = _networks(2, 2.0, 1.0, length)
    student[:, : length // 2] += 3
    _check(student, teacher, 1.0, direction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("above", [True, False], ids=["above", "below"])
def test_centre_of_a_part_far_from_that_of_the_row(above, dtype):
    """In one part, the mean difference of the logits is 90 more or less than that of the row.

    One class has nearly all of the teacher's probability in this part, and the others of the part
    count.
    """
    student, teacher = _networks(1, 1.0, 1e-3)
    teacher[:, BLOCK] -= 22
    student[:, BLOCK] -= 15
    teacher[:, 3000] += 14
    student[:, 3000] -= 84 if above else -14
    if not above:
        student[:, BLOCK] -= 60
        student[:, 3000] += 130
    _check(student, teacher, 1.0, dtype=dtype)


@pytest.mark.parametrize("high", [(110.0,), (110.0, 120.0)], ids=["one class", "two classes"])
def test_student_is_sure_of_classes_where_a_part_has_a_higher_centre(high):
    """A probability of the student overflows relative to the teacher's: e^110."""
    student, teacher = torch.zeros(2, 1 << 17, dtype=torch.float64), torch.zeros(2, 1 << 17, dtype=torch.float64)
    student[:, :2048] = -8
    student[:, : len(high)] = torch.tensor(high, dtype=torch.float64)
    _check(student, teacher, 1.0)
    _check(student * 0.05, teacher, 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("classes", [16000, 16001, 16008])
def test_half_precision_gradients_of_more_than_32_mib(classes, dtype):
    """Large gradients are written past the caches. They equal those of a few rows."""
    student, teacher = (torch.randn(1100, classes, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))

    def gradient(rows):
        x = student[rows].requires_grad_()
        return torch.autograd.grad(temperature_kl(x, teacher[rows], 2.0, reduction="sum"), x)[0]

    whole = gradient(slice(None))
    for first in (0, 549, 1097):
        assert torch.equal(whole[first : first + 3], gradient(slice(first, first + 3)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 1.0, 5.0, 20.0]),
    difference=st.sampled_from([0.01, 0.3, 2.0, 8.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0, 10.0]),
    first=st.integers(0, LENGTH - 1),
    length=st.integers(1, LENGTH),
    of_teacher=st.floats(-150, 0),
    of_student=st.floats(-150, 10),
    direction=st.sampled_from(["forward", "reverse"]),
)
def test_random_blocks(seed, spread, difference, temperature, first, length, of_teacher, of_student, direction):
    student, teacher = _networks(seed, spread, difference)
    teacher[:, first : first + length] += of_teacher * temperature
    student[:, first : first + length] += of_student * temperature
    _check(student, teacher, temperature, direction)
