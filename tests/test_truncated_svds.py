"""truncated_svds: each batch of matrices has bitwise the same results as with truncated_svd."""

import pytest
import torch
from matrix_cases import named_matrices
from torch.utils.checkpoint import checkpoint

from kdkernels import truncated_svds


def _batches(device):
    """Return more batches than one launch takes: matrices for one warp and for whole blocks, partly
    filled blocks, all dtypes, and an empty batch.
    """
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(1 + i % 5, 6 + i, 9, generator=g) for i in range(18)]
    xs += [torch.randn(2, 3, 40, 50, generator=g).relu(), torch.randn(3, 140, 150, generator=g), named_matrices(12, 7)["graded"].float()]
    xs += [torch.randn(3, 20, 12, generator=g, dtype=torch.float64), torch.randn(2, 70, 64, generator=g, dtype=torch.float64)]
    xs += [torch.randn(3, 9, 8, generator=g).bfloat16(), torch.randn(0, 9, 8, generator=g)]
    return [x.to(device) for x in xs]


def _loss(results):
    return sum(
        (v[..., 0] ** 3).double().sum() + (s**2).double().sum() + (0 if u is None else (u[..., -1] ** 3).double().sum()) for u, s, v in results
    )


@pytest.mark.parametrize("return_u", [False, True])
def test_results_equal_those_of_separate_calls(return_u, svd):
    together = [x.requires_grad_() for x in _batches(svd.device)]
    alone = [x.requires_grad_() for x in _batches(svd.device)]
    results = svd.decompose_all(together, 3, return_u=return_u)
    expected = [svd(x, 3, return_u=return_u) for x in alone]
    for own, other in zip(results, expected, strict=True):
        assert (own[0] is None) == (not return_u)
        for a, b in zip(own, other, strict=True):
            assert a is None or torch.equal(a, b)
    _loss(results).backward()
    _loss(expected).backward()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.grad, b.grad)
        assert a.grad.isfinite().all()


def test_gradient_of_some_outputs_and_inputs(svd):
    """Only some outputs are used, and only some inputs require gradients."""
    x, y, z = (t.requires_grad_() for t in _batches(svd.device)[17:20])
    (_, s, _), (_, _, v), _ = svd.decompose_all([x, y, z.detach()], 2)
    gradient_of_x, gradient_of_y = torch.autograd.grad(s.sum() + (v[..., 1] ** 3).sum(), [x, y])
    assert torch.equal(gradient_of_x, torch.autograd.grad(svd(x, 2)[1].sum(), x)[0])
    assert torch.equal(gradient_of_y, torch.autograd.grad((svd(y, 2)[2][..., 1] ** 3).sum(), y)[0])


def test_compile(svd):
    def loss(x, y):
        return sum((s[..., None, :] * v).square().sum() + v[..., 0].sum() for _, s, v in svd.decompose_all([x, y], 2))

    x, y = (torch.randn(shape, device=svd.device, requires_grad=True) for shape in ((3, 12, 7), (2, 5, 9)))
    expected, got = loss(x, y), torch.compile(loss, fullgraph=True)(x, y)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, [x, y]), torch.autograd.grad(expected, [x, y]), strict=True):
        torch.testing.assert_close(a, b)


def test_errors():
    x = torch.ones(2, 5, 3)
    for error, match, xs, k in [
        (ValueError, "xs must contain at least one", [], 1),
        (TypeError, r"xs\[1\] must be a tensor", [x, None], 1),
        (TypeError, r"xs\[0\] must be float64", [x.int()], 1),
        (ValueError, r"k must be an int in \[0, min\(M, N\)\] = \[0, 2\]", [x, x[:, :2]], 3),
        (ValueError, "xs must be on one device", [x, x.to("meta")], 1),
    ]:
        with pytest.raises(error, match=match):
            truncated_svds(xs, k)


def test_gradient_with_checkpointing():
    """Checkpointing recomputes the saved tensors, and allows to unpack them only once."""
    x, y = (torch.randn(shape, requires_grad=True) for shape in ((2, 6, 4), (3, 3, 5)))

    def loss(x, y):
        return _loss(truncated_svds([x, y], 2, return_u=True))

    expected = torch.autograd.grad(loss(x, y), [x, y])
    got = torch.autograd.grad(checkpoint(loss, x, y, use_reentrant=False), [x, y])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_inputs_that_require_no_gradient(svd):
    """Some inputs require no gradient, and one was created in inference mode.

    Their results require no gradient, and nothing is saved for them.
    """
    x = torch.randn(2, 6, 4, device=svd.device, requires_grad=True)
    with torch.inference_mode():
        teacher = torch.randn(2, 7, 4, device=svd.device)
    other = torch.randn(2, 40, 30, device=svd.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = svd.decompose_all([teacher, x, other], 2, return_u=True)
    assert sum(t.numel() for t in saved) < 1000
    assert [v.requires_grad for _, _, v in results] == [False, True, False]
    for result, given in zip(results, (teacher, x, other), strict=True):
        for a, b in zip(result, svd(given, 2, return_u=True), strict=True):
            assert torch.equal(a, b)
    (got,) = torch.autograd.grad(_loss(results[1:2]), x, retain_graph=True)
    assert torch.equal(got, torch.autograd.grad(_loss([svd(x, 2, return_u=True)]), x)[0])
    s, _ = svd.align(results[1][2], results[0][2], results[0][1])
    assert torch.autograd.grad(s.sum(), x)[0].isfinite().all()
    weight = torch.rand(2, 2, device=svd.device, requires_grad=True)
    with torch.inference_mode():
        student = torch.randn(2, 4, 3, device=svd.device)
        w = results[0][2].clone()
    s, t = svd.align(student, w, weight)
    torch.testing.assert_close(torch.autograd.grad((s * t).sum(), weight)[0], 2 * ((s * t).sum(1) / weight).detach())


def test_double_backward_of_some_outputs():
    """The loss uses only some outputs of one input.

    Another input is unused, and a third requires no gradient.
    """
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, 4, dtype=torch.float64)

    def first(x, y):
        return truncated_svds([z, x, y], 2)[1][2]

    assert torch.autograd.gradgradcheck(lambda x: first(x, y), (x,))
    gradient_of_x, gradient_of_y = torch.autograd.grad(first(x, y).sum(), [x, y], create_graph=True, allow_unused=True)
    assert gradient_of_x.requires_grad
    assert gradient_of_y is None or not gradient_of_y.any()
    (again,) = torch.autograd.grad(gradient_of_x.square().sum(), x)
    own = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(truncated_svds([own], 2)[0][2].sum(), own, create_graph=True)
    torch.testing.assert_close(again, torch.autograd.grad(expected.square().sum(), own)[0])


def test_double_backward():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def outputs(x, y):
        return tuple(t for result in truncated_svds([x, y], 2) for t in result[1:])

    assert torch.autograd.gradcheck(outputs, (x, y))
    assert torch.autograd.gradgradcheck(outputs, (x, y))
