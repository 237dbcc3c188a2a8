"""truncated_svds: several batches of matrices at once are what each is alone, to the bit."""

import pytest
import torch
from matrix_cases import kinds

from kdkernels import truncated_svds


def _batches(device):
    """More than a launch takes of one kind; one warp a matrix, whole blocks of them and parts; all types; an empty one."""
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(1 + i % 5, 6 + i, 9, generator=g) for i in range(18)]
    xs += [torch.randn(2, 3, 40, 50, generator=g).relu(), torch.randn(3, 140, 150, generator=g), kinds(12, 7)["graded"].float()]
    xs += [torch.randn(3, 20, 12, generator=g, dtype=torch.float64), torch.randn(2, 70, 64, generator=g, dtype=torch.float64)]
    xs += [torch.randn(3, 9, 8, generator=g).bfloat16(), torch.randn(0, 9, 8, generator=g)]
    return [x.to(device) for x in xs]


def _loss(results):
    return sum(
        (v[..., 0] ** 3).double().sum() + (s**2).double().sum() + (0 if u is None else (u[..., -1] ** 3).double().sum()) for u, s, v in results
    )


@pytest.mark.parametrize("return_u", [False, True])
def test_the_same_as_each_alone(return_u, svd):
    together = [x.requires_grad_() for x in _batches(svd.device)]
    alone = [x.requires_grad_() for x in _batches(svd.device)]
    results = truncated_svds(together, 3, return_u=return_u, driver=svd.driver)
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


def test_parts_of_the_gradient(svd):
    """Only some outputs are used, only some inputs ask."""
    x, y, z = (t.requires_grad_() for t in _batches(svd.device)[17:20])
    (_, s, _), (_, _, v), _ = truncated_svds([x, y, z.detach()], 2, driver=svd.driver)
    of_x, of_y = torch.autograd.grad(s.sum() + (v[..., 1] ** 3).sum(), [x, y])
    assert torch.equal(of_x, torch.autograd.grad(svd(x, 2)[1].sum(), x)[0])
    assert torch.equal(of_y, torch.autograd.grad((svd(y, 2)[2][..., 1] ** 3).sum(), y)[0])


def test_compile(svd):
    def loss(x, y):
        return sum((s[..., None, :] * v).square().sum() + v[..., 0].sum() for _, s, v in truncated_svds([x, y], 2, driver=svd.driver))

    x, y = (torch.randn(shape, device=svd.device, requires_grad=True) for shape in ((3, 12, 7), (2, 5, 9)))
    expected, got = loss(x, y), torch.compile(loss, fullgraph=True)(x, y)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, [x, y]), torch.autograd.grad(expected, [x, y]), strict=True):
        torch.testing.assert_close(a, b)


def test_errors():
    x = torch.ones(2, 5, 3)
    for error, match, xs, k in [
        (ValueError, "xs must hold at least one", [], 1),
        (TypeError, r"xs\[1\] must be a tensor", [x, None], 1),
        (TypeError, r"xs\[0\] must be float64", [x.int()], 1),
        (ValueError, r"k must be an int in \[0, min\(M, N\)\] = \[0, 2\]", [x, x[:, :2]], 3),
        (ValueError, "xs must be on one device", [x, x.to("meta")], 1),
    ]:
        with pytest.raises(error, match=match):
            truncated_svds(xs, k)


def test_double_backward():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def outputs(x, y):
        return tuple(t for result in truncated_svds([x, y], 2) for t in result[1:])

    assert torch.autograd.gradcheck(outputs, (x, y))
    assert torch.autograd.gradgradcheck(outputs, (x, y))
