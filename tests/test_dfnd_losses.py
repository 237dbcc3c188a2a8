"""DFND: noise values, the noise adaptation matrix, and the loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kdkernels.nn import DFNDLoss, dfnd_loss, noise_adaptation_matrix, noise_value

DOUBLE = {"dtype": torch.float64}


def test_known_noise_values():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [10.0, 0.0, 0.0]], **DOUBLE)
    assert noise_value(logits).tolist() == pytest.approx([0.2395447662, math.log(3), 9.079573747e-5], rel=1e-9, abs=0)
    confident = torch.tensor([[40.0, 0.0]])  # float32: -log(1 - 4e-18)
    assert noise_value(confident).item() == pytest.approx(math.exp(-40), rel=1e-5, abs=0)
    assert noise_value(torch.zeros(0, 3)).shape == (0,)
    assert noise_value(torch.full((1, 3), -1e30)).item() == pytest.approx(math.log(3), rel=1e-6)


@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_noise_value_is_the_cross_entropy_of_the_own_class(seed, shift):
    logits = 3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), **DOUBLE) + shift
    want = F.cross_entropy(logits, logits.argmax(1), reduction="none")
    torch.testing.assert_close(noise_value(logits), want, rtol=1e-9, atol=1e-12)
    assert (noise_value(logits) <= math.log(5) + 1e-12).all()


def test_known_matrix():
    """The authors' accuracies of the teachers, for 10 and 100 classes."""
    for accuracy, classes, error in ((0.9523, 10, 0.0053), (0.7774, 100, 0.00224848485)):
        matrix = noise_adaptation_matrix(torch.zeros(classes, classes - 1, **DOUBLE), accuracy)
        assert matrix.diag().tolist() == pytest.approx([accuracy] * classes, rel=1e-12, abs=0)
        others = matrix[~torch.eye(classes, dtype=torch.bool)]
        assert others.tolist() == pytest.approx([error] * len(others), rel=1e-8, abs=0)
    weight = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0], [0.0, 0.0]], **DOUBLE)
    want = [[0.2, 0.2, 0.6], [0.8 * 0.5, 0.5, 0.2 * 0.5], [0.5, 0.5, 0.0]]
    got = noise_adaptation_matrix(weight, torch.tensor([0.2, 0.5, 0.0]))
    torch.testing.assert_close(got, torch.tensor(want, **DOUBLE), rtol=1e-6, atol=1e-8)


@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
def test_rows_sum_to_one_and_the_diagonal_is_fixed(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    weight = 3 * torch.randn(classes, classes - 1, generator=generator, **DOUBLE).requires_grad_()
    diagonal = torch.rand(classes, generator=generator, **DOUBLE)
    matrix = noise_adaptation_matrix(weight, diagonal)
    torch.testing.assert_close(matrix.sum(1), torch.ones(classes, **DOUBLE))
    torch.testing.assert_close(matrix.diag(), diagonal)
    torch.testing.assert_close(noise_adaptation_matrix(weight, diagonal, log=True).exp(), matrix)


def test_known_loss():
    """At a confident student and teacher, the smallest loss is -log a."""
    for accuracy, classes, floor in ((0.9523, 10, 0.0488751678), (0.7774, 100, 0.2518002606)):
        z = 200 * torch.eye(classes, **DOUBLE)
        weight = torch.zeros(classes, classes - 1, **DOUBLE)
        assert dfnd_loss(z, z, weight, accuracy).item() == pytest.approx(floor, rel=1e-8, abs=0)


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([1.0, 4.0]), alpha=st.sampled_from([0.0, 0.5, 1.0]), per_class=st.booleans())
def test_loss_and_gradients_equal_the_definition(seed, temperature, alpha, per_class):
    generator = torch.Generator().manual_seed(seed)
    z, t = (2 * torch.randn(4, 5, generator=generator, **DOUBLE) for _ in range(2))
    weight = torch.randn(5, 4, generator=generator, **DOUBLE).requires_grad_()
    diagonal = torch.rand(5, generator=generator, **DOUBLE) if per_class else 0.8
    z.requires_grad_()
    got = dfnd_loss(z, t, weight, diagonal, temperature=temperature, alpha=alpha)
    matrix = noise_adaptation_matrix(weight, diagonal)
    noisy = F.nll_loss((z.softmax(1) @ matrix).log(), t.argmax(1))
    p = (t / temperature).softmax(1)
    kl = temperature**2 * (p * (p.log() - (z / temperature).log_softmax(1))).sum(1).mean()
    want = alpha * kl + noisy
    assert got.item() == pytest.approx(want.item(), rel=1e-10, abs=0)
    for a, b in zip(*(torch.autograd.grad(loss, [z, weight]) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("diagonal", [0.0, 1.0, torch.tensor([0.0, 1.0, 0.5])])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_loss_and_gradients_are_finite_for_extreme_diagonals(diagonal, scale):
    generator = torch.Generator().manual_seed(0)
    z = scale * torch.randn(6, 3, generator=generator)
    weight = torch.randn(3, 2, generator=generator)
    z.requires_grad_()
    weight.requires_grad_()
    loss = dfnd_loss(z, torch.randn(6, 3, generator=generator), weight, diagonal)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_without_noise_it_is_the_cross_entropy_with_the_teachers_class():
    z, t = (torch.randn(4, 3, generator=torch.Generator().manual_seed(i), **DOUBLE) for i in range(2))
    want = F.cross_entropy(z, t.argmax(1)).item()
    weight = torch.zeros(3, 2, **DOUBLE)
    for got in (dfnd_loss(z, t, alpha=0.0), dfnd_loss(z, t, weight, 1.0, alpha=0.0)):
        assert got.item() == pytest.approx(want, rel=1e-12, abs=0)
    at_start = 0.7 * z.softmax(1) + (1 - z.softmax(1)) * 0.3 / 2  # a p + (1 - p) (1 - a) / (K - 1)
    got = dfnd_loss(z, t, weight, 0.7, alpha=0.0).item()
    assert got == pytest.approx(F.nll_loss(at_start.log(), t.argmax(1)).item(), rel=1e-12, abs=0)
    assert DFNDLoss(alpha=0.0)(z, t, weight, 0.7).item() == got


def test_teacher_receives_no_gradient():
    z, t, weight = (torch.randn(shape, requires_grad=True) for shape in ((4, 3), (4, 3), (3, 2)))
    dfnd_loss(z, t, weight, 0.9).backward()
    assert t.grad is None
    assert z.grad.any()
    assert weight.grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_value([1.0]), "logits must be"),
        (lambda: noise_value(torch.zeros(3)), r"logits must have the shape \[B, K\]"),
        (lambda: noise_adaptation_matrix(torch.zeros(3, 3), 0.5), r"weight must have the shape \[K, K - 1\]"),
        (lambda: noise_adaptation_matrix(torch.zeros(1, 0), 0.5), "for K >= 2 classes"),
        (lambda: noise_adaptation_matrix(torch.zeros(3, 2), 1.5), r"diagonal must lie in \[0, 1\], got 1.5"),
        (lambda: noise_adaptation_matrix(torch.zeros(3, 2), torch.ones(2)), "one for each of the 3 classes"),
        (lambda: noise_adaptation_matrix(torch.zeros(3, 2), "a"), "diagonal must be a number"),
        (lambda: dfnd_loss(torch.zeros(2, 3), torch.zeros(2, 4)), r"must have the same shape \[B, K\]"),
        (lambda: dfnd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 3)), r"weight must have the shape \[3, 2\]"),
        (lambda: dfnd_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0), "temperature must"),
        (lambda: DFNDLoss(alpha=-1.0), "alpha must"),
        (lambda: DFNDLoss(gamma=1.0), "unexpected keyword argument 'gamma'"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_noise_value_of_logits_that_are_not_finite():
    """The softmax is not defined if a logit is NaN or +inf; -inf is a probability of 0."""
    inf, nan = torch.inf, torch.nan
    values = noise_value(torch.tensor([[inf, 0.0, 0.0], [nan, 0.0, 0.0], [-inf, -inf, -inf], [inf, inf, 0.0], [0.0, nan, 1.0], [-inf, 0.0, 0.0]]))
    assert values[:5].isnan().all()
    assert values[5].item() == pytest.approx(math.log(2))
    target = torch.tensor([[nan, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert dfnd_loss(torch.zeros(2, 3), target, alpha=0.0).isnan()
    assert dfnd_loss(torch.zeros(2, 3), target, torch.zeros(3, 2), alpha=0.0).isnan()


def test_label_that_no_class_can_have():
    """Class 0 is never called 0, and class 1 is always called 1."""
    weight, diagonal = torch.zeros(2, 1), torch.tensor([0.0, 1.0])
    assert dfnd_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), weight, diagonal, alpha=0.0) == torch.inf
    assert dfnd_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), weight, diagonal, alpha=0.0) == 0.0


def test_module_takes_only_its_options():
    for name, value in (("diagonal", 0.9), ("weight", None), ("reduction", "mean")):
        with pytest.raises(TypeError, match=name):
            DFNDLoss(**{name: value})


def test_vmap_over_diagonals_and_compiled_loss():
    z, t, weight = torch.randn(4, 3), torch.randn(4, 3), torch.randn(3, 2)
    diagonals = torch.tensor([[0.9, 0.8, 0.7], [0.5, 0.5, 0.5]])
    each = torch.stack([dfnd_loss(z, t, weight, d) for d in diagonals])
    torch.testing.assert_close(torch.vmap(lambda d: dfnd_loss(z, t, weight, d))(diagonals), each)
    torch._dynamo.reset()
    for diagonal in (0.9, diagonals[0]):
        compiled = torch.compile(lambda d: dfnd_loss(z, t, weight, d), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(diagonal), dfnd_loss(z, t, weight, diagonal))
    with pytest.raises(ValueError, match=r"weight must have the shape \[3, 2\]"):
        dfnd_loss(z, t, torch.tensor(1.0))
