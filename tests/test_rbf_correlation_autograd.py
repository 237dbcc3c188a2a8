"""rbf_correlation and its loss with PyTorch's features (autograd, compile, export, functorch,
autocast), and their errors.
"""

import pytest
import torch
from correlation_cases import CORRELATION_CASES, CorrelationCase

from kdkernels import rbf_correlation, rbf_correlation_loss, reference
from kdkernels.options import Reduction

REDUCTIONS = ["sum", "none", "batchmean"]


def _inputs(*shape, device="cpu", dtype=torch.float32, scale=1.0, distance=0.5):
    return CorrelationCase("", shape, dtype, unit=False, scale=scale, distance=distance).make(device)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_loss(reduction, scale, device):
    inputs = [x.requires_grad_() for x in _inputs(2, 40, 36, 2, device=device, dtype=torch.float64, scale=scale)]

    def loss(*inputs):
        return rbf_correlation_loss(*inputs, beta=8.0 if scale == 1 else 50.0, reduction=reduction)

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    small_inputs = [x[:, :4].detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(loss, small_inputs)
    assert torch.autograd.gradgradcheck(loss, small_inputs)
    assert torch.autograd.gradgradcheck(lambda x, y: loss(x, y, small_inputs[2].detach(), small_inputs[3].detach()), small_inputs[:2])


def test_gradcheck_correlation(device):
    x, y = (v.requires_grad_() for v in _inputs(2, 3, 5, 3, device=device, dtype=torch.float64, scale=3.0)[:2])
    assert torch.autograd.gradcheck(rbf_correlation, (x, y))
    assert torch.autograd.gradgradcheck(rbf_correlation, (x, y))
    assert torch.autograd.gradgradcheck(lambda x: rbf_correlation(x, y.detach()), (x,))


@pytest.mark.parametrize("differentiated", [(0,), (1,), (0, 1), (2,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_gradient_is_computed_only_for_inputs_that_require_it(differentiated, device):
    inputs = _inputs(3, 50, 40, 2, device=device)
    for i in differentiated:
        inputs[i].requires_grad_()
    rbf_correlation_loss(*inputs).backward()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(reference.rbf_correlation_loss(*exact), exact)
    for i, x in enumerate(inputs):
        if i in differentiated:
            torch.testing.assert_close(x.grad.double(), expected[i], rtol=1e-4, atol=1e-6)
        else:
            assert x.grad is None
    with torch.no_grad():
        assert not rbf_correlation_loss(*inputs).requires_grad
        assert not rbf_correlation(*inputs[:2]).requires_grad
    assert not rbf_correlation_loss(*(x.detach() for x in inputs)).requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_gradients_and_retained_graphs(reduction, device):
    inputs = _inputs(3, 50, 40, 2, device=device)
    x = inputs[0].requires_grad_()
    loss, expected = (f(*inputs, reduction=reduction) for f in (rbf_correlation_loss, reference.rbf_correlation_loss))
    for upstream in (torch.ones_like(loss), torch.randn_like(loss), torch.ones_like(loss)):
        (got,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        (want,) = torch.autograd.grad(expected, x, upstream, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    loss.sum().backward(retain_graph=True)
    loss.sum().backward(retain_graph=True)
    loss.sum().backward()
    torch.testing.assert_close(x.grad, 3 * want, rtol=1e-3, atol=1e-5)


def test_loss_does_not_save_the_pairs(device):
    inputs = [x.requires_grad_() for x in _inputs(2, 300, 400, 2, device=device)]
    saved_bytes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved_bytes.append(x.nbytes) or x, lambda x: x):
        rbf_correlation_loss(*inputs)
    assert sum(saved_bytes) <= 2 * sum(x.nbytes for x in inputs)
    saved_bytes.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved_bytes.append(x.nbytes) or x, lambda x: x):
        rbf_correlation(*inputs[:2])
    assert sum(saved_bytes) <= inputs[0].nbytes + inputs[1].nbytes


SMALL = [c for c in CORRELATION_CASES if max(c.shape) <= 150 and not c.edit and c.shape[0] and "expanded" not in c.layout]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_opcheck(case, device):
    ops = torch.ops.kdkernels
    inputs = case.make(device)
    x, y = inputs[:2]
    leaf = x.requires_grad_(case.layout in ("contiguous", "rows"))
    # Tolerances for opcheck's comparison of compiled and eager gradients: rounding errors pass,
    # wrong results do not.
    close = dict(rtol=1e-3, atol=1e-5)
    torch.library.opcheck(ops.rbf_correlation.default, (leaf, y, case.beta), **close)
    torch.library.opcheck(ops.rbf_correlation_loss.default, (leaf, *inputs[1:], case.beta, Reduction.NONE, [False] * 4), **close)
    inputs = [v.detach() for v in inputs]
    out = ops.rbf_correlation(*inputs[:2], case.beta)
    torch.library.opcheck(ops.rbf_correlation_backward.default, (torch.randn_like(out), *inputs[:2], case.beta), **close)
    one = torch.ones((), dtype=out.dtype, device=device)
    torch.library.opcheck(ops.rbf_correlation_loss_backward.default, (one, *inputs, case.beta, Reduction.SUM, [True, False, True, True]), **close)


def test_opcheck_rescale(device):
    op = torch.ops.kdkernels.rbf_correlation_loss_rescale_.default
    torch.library.opcheck(op, (torch.randn(2, 3, 4, device=device), torch.tensor(2.0, device=device)))
    torch.library.opcheck(op, (torch.randn(2, 3, 4, device=device), torch.tensor([2.0, 0.0], device=device)))


def test_compile_inductor(device):
    torch._dynamo.reset()

    def step(sx, sy, tx, ty):
        return rbf_correlation_loss(sx * 2, sy, tx, ty, reduction="batchmean") * 3 + rbf_correlation(sx, sy).square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        inputs = _inputs(batch, 50, 30, 2, device=device)
        x = inputs[0].requires_grad_()
        got, want = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (got, want)), rtol=1e-4, atol=1e-6)


def test_export(device):
    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            return rbf_correlation_loss(*inputs, reduction="none")

    batch = torch.export.Dim("batch")
    program = torch.export.export(Loss(), tuple(_inputs(3, 50, 30, 2, device=device)), dynamic_shapes=(({0: batch},) * 4,))
    assert "kdkernels.rbf_correlation_loss.default" in program.graph_module.code.replace("torch.ops.", "")
    inputs = _inputs(7, 50, 30, 2, device=device)
    assert torch.equal(program.module()(*inputs), rbf_correlation_loss(*inputs, reduction="none"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_functorch(reduction, device):
    examples = [x.view(3, 2, *x.shape[1:]) for x in _inputs(6, 12, 10, 2, dtype=torch.float64, device=device)]
    sx, sy, tx, ty = examples

    def loss(*inputs):
        return rbf_correlation_loss(*inputs, reduction=reduction)

    want = torch.stack([loss(*each) for each in zip(*examples, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(*examples), want)
    torch.testing.assert_close(torch.vmap(loss, in_dims=(0, 0, None, 0))(sx, sy, tx[0], ty)[0], want[0])
    got = torch.vmap(rbf_correlation, in_dims=(1, 0))(sx.transpose(0, 1), sy)
    torch.testing.assert_close(got, torch.stack([rbf_correlation(x, y) for x, y in zip(sx, sy, strict=True)]))
    leaf = sx.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.stack([loss(*each).sum() for each in zip(leaf, sy, tx, ty, strict=True)]).sum(), leaf)
    torch.testing.assert_close(torch.vmap(torch.func.grad(lambda *each: loss(*each).sum()))(*examples), expected)
    (outside,) = torch.autograd.grad(torch.vmap(loss)(leaf, sy, tx, ty).sum(), leaf)
    torch.testing.assert_close(outside, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, device):
    inputs = [(0.1 * x).to(dtype).requires_grad_() for x in _inputs(3, 64, 50, 2, device=device)]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, correlation = rbf_correlation_loss(*inputs), rbf_correlation(*inputs[:2])
    assert loss.dtype == correlation.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.rbf_correlation_loss(*exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=0)
    # A loss scaler's factor multiplies the gradient before it is rounded to half precision.
    got, want = torch.autograd.grad(loss * 2**20, inputs), torch.autograd.grad(expected * 2**20, exact)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), w, rtol=2**-7, atol=2**-8 * w.abs().max().item())


X, Y = torch.zeros(2, 3, 1), torch.zeros(2, 4, 1)
ERRORS = [
    (dict(sx=None), TypeError, "sx must be a tensor, got NoneType"),
    (dict(ty=Y.long()), TypeError, "ty must be float64, float32, bfloat16 or float16 features, got torch.int64"),
    (dict(sx=X[0]), ValueError, r"sx must have the shape \[B, elements, K\]"),
    (dict(sy=Y[:, :0], ty=Y[:, :0]), ValueError, "at least one element and one column"),
    (dict(tx=X[:, :2]), ValueError, r"sx and tx must have the same shape, and so must sy and ty, got sx \(2, 3, 1\), tx \(2, 2, 1\)"),
    (dict(sx=X[:1], tx=X[:1]), ValueError, r"sx \[B, M, K\] and sy \[B, N, K\] must agree in B and K, got \(1, 3, 1\) and \(2, 4, 1\)"),
    (dict(tx=X.to("meta")), ValueError, "sx and sy and tx and ty must be on one device"),
    (dict(beta=0), ValueError, "beta must be a finite number > 0, got 0"),
    (dict(beta=float("nan")), ValueError, "beta must be a finite number > 0, got nan"),
    (dict(reduction="mean"), ValueError, r"reduction must be one of \('none', 'sum', 'batchmean'\), got 'mean'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_errors_of_loss_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        rbf_correlation_loss(**{"sx": X, "sy": Y, "tx": X, "ty": Y, **change})


def test_errors_of_correlation_name_the_argument():
    with pytest.raises(TypeError, match="y must be a tensor, got list"):
        rbf_correlation(X, [1.0])
    with pytest.raises(ValueError, match=r"x \[B, M, K\] and y \[B, N, K\] must agree in B and K, got \(2, 3, 1\) and \(2, 4, 2\)"):
        rbf_correlation(X, Y.expand(2, 4, 2))
    with pytest.raises(ValueError, match="beta must be"):
        rbf_correlation(X, Y, -8.0)


def test_raw_ops_check_shapes_and_options():
    ops = torch.ops.kdkernels
    good = [X, Y, X, Y, 8.0, Reduction.SUM, [True] * 4]
    for position, value in {0: X[:1], 1: Y[..., :0], 2: X[:, :2], 3: Y[0], 4: 0.0, 5: Reduction.MEAN}.items():
        arguments = list(good)
        arguments[position] = value
        with pytest.raises((ValueError, TypeError)):
            ops.rbf_correlation_loss(*arguments)
        with pytest.raises((ValueError, TypeError)):
            ops.rbf_correlation_loss_backward(torch.ones(()), *arguments)
    with pytest.raises(ValueError, match="grad_loss must have shape"):
        ops.rbf_correlation_loss_backward(torch.ones(2), *good)
    with pytest.raises(ValueError, match="grad_loss must be one number"):
        ops.rbf_correlation_loss_rescale_(torch.ones(2, 3, 1), torch.ones(3))
    for arguments in ((X, Y[:1], 8.0), (X, Y[0], 8.0), (X, Y, -1.0)):
        with pytest.raises((ValueError, TypeError)):
            ops.rbf_correlation(*arguments)
    with pytest.raises(ValueError, match="grad must have shape"):
        ops.rbf_correlation_backward(torch.ones(2, 3, 3, 1), X, Y, 8.0)
