"""Inputs created in torch.inference_mode, and the tensors that ops save for the backward pass."""

import weakref

import pytest
import torch

import kdkernels as kd
from kdkernels import nn, reference


def _leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def _constant(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# name: (function of (module, student, *constants), function that makes the student, function that
# makes the constants)
CASES = {
    "temperature_kl": (
        lambda m, s, t, w, mask, n: m.temperature_kl(s, t, w, mask=mask, normalizer=n),
        lambda: _leaf(6, 10),
        lambda: (_constant(6, 10), 1 + torch.rand(6).double(), torch.tensor([True, False] * 3), torch.tensor(4.0)),
    ),
    "temperature_kl reverse": (lambda m, s, t: m.temperature_kl(s, t, 2.0, direction="reverse"), lambda: _leaf(6, 10), lambda: (_constant(6, 10),)),
    "temperature_kl to the teacher": (lambda m, s, t: m.temperature_kl(t, s, 2.0), lambda: _leaf(6, 10), lambda: (_constant(6, 10),)),
    "attention_transfer_loss": (lambda m, s, t: m.attention_transfer_loss(s, t), lambda: _leaf(2, 6, 4, 4), lambda: (_constant(2, 3, 4, 4),)),
    "attention_transfer_loss, other extents, p < 1": (
        lambda m, s, t: kd.attention_transfer_loss(s, t, 0.5),
        lambda: _leaf(2, 6, 4, 4),
        lambda: (_constant(2, 3, 2, 2),),
    ),
    "rbf_correlation": (lambda m, s, t: m.rbf_correlation(s, t).square().sum(), lambda: _leaf(2, 6, 2), lambda: (_constant(2, 3, 2),)),
    "rbf_correlation_loss": (
        lambda m, s, a, b, c: m.rbf_correlation_loss(s, a, b, c),
        lambda: _leaf(2, 6, 2),
        lambda: (_constant(2, 3, 2), _constant(2, 6, 2), _constant(2, 3, 2)),
    ),
    "align_singular_vectors": (
        lambda m, s, t, w: sum(r.square().sum() * (i + 1) for i, r in enumerate(m.align_singular_vectors(s, t, w))),
        lambda: _leaf(2, 6, 3),
        lambda: (_constant(2, 6, 2), _constant(2, 2)),
    ),
    "truncated_svds": (lambda m, s, t: kd.truncated_svds([s, t], 1)[0][1].sum(), lambda: _leaf(2, 6, 3), lambda: (_constant(2, 4, 5),)),
    "kd_loss": (lambda m, s, t, y: nn.kd_loss(s, t, y), lambda: _leaf(6, 10), lambda: (_constant(6, 10), torch.arange(6))),
    "svd_kd_loss": (
        lambda m, s, a, b: nn.svd_kd_loss([s, s[:, :3].sin()], [a, b]),
        lambda: _leaf(2, 6, 4, 4),
        lambda: (_constant(2, 6, 4, 4), _constant(2, 3, 2, 2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_inference_tensors_can_be_constants(name):
    """First and second derivatives, a gradient of torch.func and a tangent are the same for
    constants that were created in inference mode.
    """
    function, make_student, make_constants = CASES[name]
    student = make_student()
    constants = make_constants()
    with torch.inference_mode():
        inference = [c.clone() for c in constants]
    results = []
    for given in (constants, inference):
        (first,) = torch.autograd.grad(function(kd, student, *given), student)
        (graph,) = torch.autograd.grad(function(kd, student, *given), student, create_graph=True)
        (second,) = torch.autograd.grad(graph.square().sum(), student)
        func_gradient = torch.func.grad(lambda s, given=given: function(kd, s, *given))(student.detach())
        _, tangent = torch.func.jvp(lambda s, given=given: function(kd, s, *given), (student.detach(),), (torch.ones_like(student),))
        results.append((first, graph.detach(), second, func_gradient, tangent))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-12)


def _result_and_saved_tensors(function):
    """Return the function's result, and the tensors that its graph saves."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = function()
    return result, saved


def test_loss_saves_one_tensor_besides_the_student():
    """Besides the student a loss saves only the gradient, not the teacher's logits or features."""
    for make, loss in (
        (lambda: torch.randn(64, 100), kd.temperature_kl),
        (lambda: torch.randn(4, 32, 8, 8), kd.attention_transfer_loss),
        (lambda: torch.randn(4, 32, 8, 8).half(), kd.attention_transfer_loss),
    ):
        student, teacher = make().requires_grad_(), make()
        teacher_reference = weakref.ref(teacher)
        result, saved = _result_and_saved_tensors(lambda loss=loss, s=student, t=teacher: loss(s, t))
        others = [t for t in saved if t.data_ptr() != student.data_ptr()]
        assert sum(t.nbytes for t in others) <= 1.15 * student.nbytes
        saved.clear()
        del teacher, others
        assert teacher_reference() is None, "the teacher's tensor is kept"
        result.backward()


@pytest.mark.parametrize("options", [{}, {"include_entropy": False}, {"reduction": "none", "dim": 0}, {"target_eps": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", ["number", "tensor"])
def test_higher_derivatives_do_not_need_the_teacher(options, temperature):
    """Higher derivatives are computed from the saved gradient and the student, without the teacher.

    They match the reference for any upstream gradient, with masked rows and excluded classes.
    """
    s, t = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    s[1, 2] = t[1, 2] = -torch.inf
    rows = 4 if options.get("dim") == 0 else 5
    temperature = 2.0 if temperature == "number" else 1 + torch.rand(rows, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True][:rows])
    results = []
    for module in (kd, reference):
        x = s.clone().requires_grad_()
        y = module.temperature_kl(x, t, temperature, mask=mask, **options)
        upstream = (torch.arange(1.0, y.numel() + 1, dtype=torch.float64).view(y.shape)).requires_grad_()
        (first,) = torch.autograd.grad(y, x, upstream, create_graph=True)
        second = torch.autograd.grad((first.nan_to_num() ** 2).sum(), (x, upstream), create_graph=True)
        (third,) = torch.autograd.grad((second[0].nan_to_num() ** 2).sum(), x)
        results.append((first, *second, third))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
