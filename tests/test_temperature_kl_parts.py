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


def _networks(seed, spread, difference, dtype):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(3, LENGTH, generator=generator) * spread
    return (teacher + torch.randn(3, LENGTH, generator=generator) * difference).to(dtype), teacher.to(dtype)


def _check(student, teacher, temperature, direction="forward"):
    """Compare losses and gradients with the reference, and losses with and without gradients."""
    student.requires_grad_()
    loss = temperature_kl(student, teacher, temperature, reduction="none", direction=direction)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    exact_student = student.detach().double().requires_grad_()
    exact = reference.temperature_kl(exact_student, teacher.double(), temperature, reduction="none", direction=direction)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_student)
    # A teacher with one class of nearly all probability leaves only the rounding of the logits.
    floor = 1e-7 * temperature**2 * (student.detach() - teacher).double().abs().nan_to_num(0, posinf=0, neginf=0).amax(1).square().clamp(max=1e-2)
    assert bool(((loss.detach().double() - exact.detach()).abs() <= 5e-6 * exact.detach() + floor).all())
    largest = exact_gradient.abs().amax(1, keepdim=True)
    bound = 2e-5 * largest + (0 if student.dtype == torch.float32 else 2.0**-8 * exact_gradient.abs())
    assert bool(((gradient.double() - exact_gradient).abs() <= bound + 1e-9 * temperature).all())
    with torch.no_grad():
        assert torch.equal(temperature_kl(student, teacher, temperature, reduction="none", direction=direction), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_of_the_classes_differs_from_the_others(change, dtype):
    temperature = 2.0
    student, teacher = _networks(0, 3.0, 1.0, torch.float32)
    of_teacher, of_student = CHANGES[change]
    teacher[:, BLOCK] += of_teacher * temperature
    student[:, BLOCK] += of_student * temperature
    _check(student.to(dtype), teacher.to(dtype), temperature)


def test_centre_of_a_part_far_below_that_of_the_row():
    """In one part, a class has nearly all of the teacher's probability and nearly none of the
    student's. The terms of the others, which count, are large with the centre of this part.
    """
    student, teacher = _networks(1, 1.0, 1e-3, torch.float32)
    teacher[:, BLOCK] -= 22
    student[:, BLOCK] -= 15
    teacher[:, 3000] += 14
    student[:, 3000] -= 84
    _check(student, teacher, 1.0)


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
    student, teacher = _networks(seed, spread, difference, torch.float32)
    teacher[:, first : first + length] += of_teacher * temperature
    student[:, first : first + length] += of_student * temperature
    _check(student, teacher, temperature, direction)
