"""temperature_kl with PyTorch's features (autograd, compile, export, functorch, autocast), and its
errors.
"""

import pytest
import torch
from cases import KL_CASES
from test_temperature_kl import _arguments

from kdkernels import reference, temperature_kl
from kdkernels.options import Direction, Reduction

DIRECTIONS = ["forward", "reverse", "jsd"]
OPTIONS = [
    {},
    {"direction": "reverse", "reduction": "mean"},
    {"direction": "jsd", "beta": 0.3, "reduction": "sum"},
    {"target_eps": 1e-3},
    {"include_entropy": False, "scale_by_t2": False},
    {"reduction": "none"},
    {"dim": 0},
]


def _pair(*shape, **kwargs):
    return torch.randn(*shape, **kwargs), torch.randn(*shape, **kwargs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options, device):
    s, t = (x.requires_grad_() for x in _pair(4, 5, dtype=torch.float64, device=device))
    rows = 5 if options.get("dim") == 0 else 4
    temperature = (0.5 + torch.rand(rows, dtype=torch.float64, device=device)).requires_grad_()
    mask = torch.tensor([True, False, True, True, True][:rows], device=device)

    def loss(*inputs):
        return temperature_kl(*inputs, mask=mask, **options)

    assert torch.autograd.gradcheck(loss, (s, t, temperature))
    assert torch.autograd.gradgradcheck(loss, (s, t, temperature))
    assert torch.autograd.gradgradcheck(lambda s: loss(s, t.detach(), 2.0), (s,))  # the case in which the forward pass saves the gradient


def test_scalar_learnable_temperature(device):
    s, t = _pair(3, 5, dtype=torch.float64, device=device)
    temperature = torch.tensor(1.7, dtype=torch.float64, device=device, requires_grad=True)
    temperature_kl(s, t, temperature).backward()
    assert temperature.grad.shape == ()
    (expected,) = torch.autograd.grad(reference.temperature_kl(s, t, temperature), temperature)
    assert torch.allclose(temperature.grad, expected, rtol=1e-12)


def test_temperature_broadcasts_to_the_rows(device):
    s, t = _pair(3, 5, 4, device=device)
    per_sample = 1 + torch.rand(3, device=device)
    want = torch.stack([temperature_kl(s[i], t[i], per_sample[i].item(), dim=0, reduction="none") for i in range(3)])
    for shape in ((3, 1), (3, 1, 1)):  # broadcast to the rows, without and with the classes' dimension
        got = temperature_kl(s, t, per_sample.reshape(shape), dim=1, reduction="none")
        assert torch.allclose(got, want, rtol=1e-5)


def test_gradient_is_computed_only_for_inputs_that_require_it(device):
    s, t = _pair(3, 5, device=device)
    temperature_kl(s.requires_grad_(), t).backward()
    assert t.grad is None
    s = s.detach()
    temperature_kl(s, t.requires_grad_()).backward()
    assert s.grad is None
    assert t.grad.abs().sum() > 0
    assert not temperature_kl(s, t.detach()).requires_grad
    with torch.no_grad():
        assert not temperature_kl(s, t).requires_grad


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_upstream_gradients_and_retained_graphs(reduction, device):
    """Upstream gradients of ones, other upstream gradients and repeated backward passes match the
    reference.
    """
    s, t = _pair(3, 50, device=device)
    s.requires_grad_()
    loss, expected = (f(s, t, 2.0, reduction=reduction) for f in (temperature_kl, reference.temperature_kl))
    for upstream in (torch.ones_like(loss), torch.full_like(loss, -2.5), torch.ones_like(loss)):
        (got,) = torch.autograd.grad(loss, s, upstream, retain_graph=True)
        (want,) = torch.autograd.grad(expected, s, upstream, retain_graph=True)
        assert torch.allclose(got, want, atol=1e-6)
    # A gradient that accumulates in a leaf must not share memory with the saved tensors.
    s.grad = None
    loss.sum().backward(retain_graph=True)
    loss.sum().backward(retain_graph=True)
    loss.sum().backward()
    assert torch.allclose(s.grad, 3 * want, atol=1e-6)


def test_unit_upstream_gradient_needs_no_extra_pass():
    """The leaf receives the gradient that the forward pass wrote, without a copy or a
    multiplication.
    """
    s, t = _pair(64, 100)
    s.requires_grad_()
    saved_tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved_tensors.append(x) or x, lambda x: x):
        loss = temperature_kl(s, t)
    saved = [x for x in saved_tensors if x.data_ptr() not in (s.data_ptr(), t.data_ptr())]
    assert sum(x.nbytes for x in saved) <= s.nbytes  # at most one tensor of the size of the logits
    address = saved[0].data_ptr()
    saved_tensors.clear()
    saved.clear()
    loss.backward()
    assert s.grad.data_ptr() == address


@pytest.mark.parametrize("case", [c for c in KL_CASES if c.shape[0] and not c.edit and len(c.shape) < 4 and max(c.shape) < 200], ids=lambda c: c.name)
def test_opcheck(case, device):
    x = case.make(device)
    x["student"].requires_grad_(case.name != "strided")
    if x["temperature"] is not None:
        x["temperature"].requires_grad_()
    forward, backward = torch.ops.kdkernels.temperature_kl.default, torch.ops.kdkernels.temperature_kl_backward.default
    torch.library.opcheck(forward, (*_arguments(case, x), False))
    upstream = torch.ones(case.rows if case.reduction == "none" else (), dtype=case.compute_dtype, device=device)
    x = case.make(device)
    torch.library.opcheck(backward, (upstream, *_arguments(case, x), [True, True, True]))


@pytest.mark.parametrize("name", ["temperature_kl_rescale", "temperature_kl_rescale_"])
def test_opcheck_rescale(name, device):
    op = getattr(torch.ops.kdkernels, name).default
    mask = torch.tensor([True, False, True, True], device=device)
    unscaled, powers = torch.empty(0, device=device), torch.tensor([1.0, 2.0, 0.5, 4.0], device=device)
    torch.library.opcheck(op, (torch.randn(3, 4, device=device), unscaled, torch.tensor(2.0, device=device), None, 1))
    torch.library.opcheck(op, (torch.randn(3, 4, device=device), powers, torch.randn(4, device=device), mask, 0))


def test_compile_fullgraph_without_recompilation(device):
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(temperature_kl, fullgraph=True, backend=backend, dynamic=True)
    for batch in (4, 7, 19, 64):
        s, t = _pair(batch, 10, device=device)
        assert torch.equal(compiled(s, t, 4.0), temperature_kl(s, t, 4.0))
    assert len(compilations) == 1


@pytest.mark.parametrize("trained", ["student", "both"])
def test_compile_inductor(trained, device):
    torch._dynamo.reset()

    def step(s, t):
        return temperature_kl(s * 2, t * 2, 4.0) * 3

    s, t = _pair(6, 10, device=device)
    s.requires_grad_()
    t.requires_grad_(trained == "both")
    inputs = (s, t) if trained == "both" else (s,)
    compiled, eager = torch.compile(step, fullgraph=True)(s, t), step(s, t)
    assert torch.allclose(compiled, eager)
    for got, want in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True):
        assert torch.allclose(got, want, atol=1e-7)


def test_compile_inductor_dynamic_training(device):
    """One graph gives correct gradients for varying batch sizes, a learned temperature and masked
    rows.
    """
    torch._dynamo.reset()
    compiled = torch.compile(temperature_kl, fullgraph=True, dynamic=True)
    temperature = torch.tensor(2.0, device=device, requires_grad=True)
    for batch in (5, 9, 16):
        s, t = _pair(batch, 12, device=device)
        s.requires_grad_()
        mask = torch.rand(batch, device=device) > 0.3
        got, want = (torch.autograd.grad(f(s, t, temperature, mask=mask), (s, temperature)) for f in (compiled, reference.temperature_kl))
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, w, atol=1e-5)


def test_export(device):
    class Loss(torch.nn.Module):
        def forward(self, s, t):
            return temperature_kl(s, t, 3.0, reduction="none")

    s, t = _pair(5, 10, device=device)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Loss(), (s, t), dynamic_shapes=({0: batch}, {0: batch}))
    assert "kdkernels.temperature_kl.default" in program.graph_module.code.replace("torch.ops.", "")
    s, t = _pair(9, 10, device=device)
    assert torch.equal(program.module()(s, t), temperature_kl(s, t, 3.0, reduction="none"))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vmap(options, device):
    s, t = _pair(3, 4, 5, device=device)
    mask = torch.rand(3, 5 if options.get("dim") == 0 else 4, device=device) > 0.3
    got = torch.vmap(lambda s, t, m: temperature_kl(s, t, 2.0, mask=m, **options))(s, t, mask)
    want = torch.stack([temperature_kl(s[i], t[i], 2.0, mask=mask[i], **options) for i in range(3)])
    assert torch.allclose(got, want, rtol=1e-5)
    got = torch.vmap(lambda s: temperature_kl(s, t[0], 2.0, **options), in_dims=2)(s.movedim(0, 2))
    want = torch.stack([temperature_kl(s[i], t[0], 2.0, **options) for i in range(3)])
    assert torch.allclose(got, want, rtol=1e-5)


def test_vmap_of_temperatures_and_normalizers(device):
    s, t = _pair(3, 4, 5, device=device)
    temperature, normalizer = 1 + torch.rand(3, device=device), 1 + torch.rand(3, device=device)
    got = torch.vmap(lambda s, t, c, n: temperature_kl(s, t, c, normalizer=n))(s, t, temperature, normalizer)
    want = torch.stack([temperature_kl(s[i], t[i], temperature[i], normalizer=normalizer[i]) for i in range(3)])
    assert torch.allclose(got, want, rtol=1e-5)


def test_functorch_gradients(device):
    """Per-sample gradients. torch.func differentiates the reference."""
    s, t = _pair(3, 5, dtype=torch.float64, device=device)

    def loss(s, t):
        return temperature_kl(s, t, 2.0)

    got = torch.vmap(torch.func.grad(loss))(s, t)
    inputs = s.clone().requires_grad_()
    (want,) = torch.autograd.grad(temperature_kl(inputs, t, 2.0, reduction="sum"), inputs)
    assert torch.allclose(got, want)
    through = torch.func.grad(lambda s: torch.vmap(loss)(s, t).sum())(s)
    assert torch.allclose(through, want)
    leaf = s.clone().requires_grad_()
    (outside,) = torch.autograd.grad(torch.vmap(loss)(leaf, t).sum(), leaf)
    assert torch.allclose(outside, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, device):
    s, t = (x.to(dtype) for x in _pair(16, 500, device=device))
    s.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = temperature_kl(s, t, 4.0)
    assert loss.dtype == torch.float32
    exact = reference.temperature_kl(s.double(), t.double(), 4.0)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6, abs=0)
    loss.backward()
    assert s.grad.dtype == dtype


def test_result_does_not_depend_on_the_number_of_threads():
    s, t = _pair(512, 333)
    s.requires_grad_()
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        loss = temperature_kl(s, t, 4.0)
        results.append((loss.detach(), torch.autograd.grad(loss, s)[0]))
    torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


X = torch.zeros(4, 6)
ERRORS = [
    (dict(student=[1.0]), TypeError, "student must be a tensor, got list"),
    (dict(student=X.long()), TypeError, "student must be float64, float32, bfloat16 or float16 logits, got torch.int64"),
    (dict(teacher=X.to(torch.complex64)), TypeError, "teacher must be"),
    (dict(teacher=torch.zeros(4, 7)), ValueError, "student and teacher must have the same classes in dim=-1, got 6 and 7"),
    (dict(teacher=torch.zeros(5, 6)), ValueError, r"student and teacher must have the same shape, got \(4, 6\) and \(5, 6\)"),
    (dict(teacher=torch.zeros(4, 6, 1)), ValueError, "same shape"),
    (dict(student=torch.zeros(4, 0), teacher=torch.zeros(4, 0)), ValueError, "at least one class"),
    (dict(student=torch.zeros(()), teacher=torch.zeros(())), ValueError, "student must have a dimension of classes, got a 0-dim tensor"),
    (dict(teacher=X.to("meta")), ValueError, "one device"),
    (dict(temperature=0.0), ValueError, "temperature must be a finite number > 0, got 0"),
    (dict(temperature=-1), ValueError, "temperature must be a finite number > 0"),
    (dict(temperature=float("nan")), ValueError, "temperature must be a finite number > 0"),
    (dict(temperature=float("inf")), ValueError, "temperature must be a finite number > 0"),
    (dict(temperature=torch.tensor([1.0, 1.0, 0.0, 1.0])), ValueError, "temperature must be finite and > 0 everywhere, got 0 in row 2"),
    (dict(temperature=torch.ones(3)), ValueError, r"temperature must broadcast to the rows \(4,\)"),
    (dict(temperature=torch.ones(4, dtype=torch.long)), TypeError, "temperature must be floating point"),
    (dict(temperature="4"), TypeError, "temperature must be a number or a tensor, got str"),
    (dict(dim=2), ValueError, r"dim must lie in \[-2, 1\]"),
    (dict(dim=-3), ValueError, r"dim must lie in \[-2, 1\]"),
    (dict(direction="backward"), ValueError, "direction must be one of"),
    (dict(reduction="batch"), ValueError, "reduction must be one of"),
    (dict(beta=1.5, direction="jsd"), ValueError, r"beta must lie in \[0, 1\], got 1.5"),
    (dict(target_eps=-1e-7), ValueError, "target_eps must be"),
    (dict(target_eps=1e-7, direction="reverse"), ValueError, "direction='forward' only"),
    (dict(include_entropy=False, direction="jsd"), ValueError, "direction='forward' only"),
    (dict(mask=torch.ones(4)), TypeError, "mask must be a bool tensor, got a tensor of torch.float32"),
    (dict(mask=torch.ones(4, 6, dtype=torch.bool)), ValueError, r"mask must have the shape of the rows \(4,\), got \(4, 6\)"),
    (dict(normalizer=0), ValueError, "normalizer must be a finite number > 0"),
    (dict(normalizer=torch.ones(2)), ValueError, "normalizer must have one element"),
    (dict(normalizer=torch.ones((), requires_grad=True)), ValueError, "normalizer is not differentiated"),
    (dict(normalizer=3.0, reduction="sum"), ValueError, "normalizer replaces the number of rows"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        temperature_kl(**{"student": X, "teacher": X, **change})


def test_raw_ops_check_shapes_and_options():
    op = torch.ops.kdkernels.temperature_kl.default
    good = [X, X, 1.0, None, None, None, -1, Direction.FORWARD, 0.5, Reduction.SUM, True, True, 0.0, False]
    for position, bad in (
        (1, torch.zeros(4, 5)),
        (3, torch.ones(3)),
        (4, torch.ones(5, dtype=torch.bool)),
        (6, 7),
        (7, 3),
        (7, -1),
        (9, 4),
        (2, 0.0),
    ):
        arguments = list(good)
        arguments[position] = bad
        with pytest.raises((ValueError, TypeError)):
            op(*arguments)
    with pytest.raises(RuntimeError, match="Expected a value of type 'int' for argument 'reduction'"):
        op(*good[:9], "sum", *good[10:])
