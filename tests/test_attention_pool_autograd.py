"""attention_pool and attention_transfer_loss with PyTorch's features (autograd, compile, export,
functorch, autocast), and their errors.
"""

import pytest
import torch
from feature_cases import FEATURE_CASES, FeatureCase

import kdkernels
from kdkernels import attention_pool, attention_transfer_loss, reference
from kdkernels.options import Normalize, Reduce, Variant

POOLS = [
    (2.0, {}),
    (1.5, {"reduce": "sum", "normalize": "l2"}),
    (2.7, {"reduce": "max", "normalize": "softmax"}),
    (4.0, {"normalize": "l2"}),
    (1.0, {"reduce": "max"}),
]
LOSSES = [(2.0, {}), (2.0, {"variant": "paper"}), (1.5, {"reduce": "max"}), (2.7, {"variant": "paper", "reduce": "sum"})]


def _features(*shape, **options):
    return torch.randn(*shape, **options)


@pytest.mark.parametrize(("p", "options"), POOLS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_pool(p, options, layout, device):
    x = FeatureCase("", (2, 5, 3, 4), torch.float64, layout).make(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_pool(x, p, **options), (x,))
    assert torch.autograd.gradgradcheck(lambda x: attention_pool(x, p, **options), (x,))


@pytest.mark.parametrize(("p", "options"), LOSSES, ids=str)
def test_gradcheck_loss(p, options, device):
    s, t = (_features(2, c, 3, 4, dtype=torch.float64, device=device).requires_grad_() for c in (5, 3))

    def loss(s, t):
        return attention_transfer_loss(s, t, p, **options)

    assert torch.autograd.gradcheck(loss, (s, t))
    assert torch.autograd.gradgradcheck(loss, (s, t))
    assert torch.autograd.gradgradcheck(lambda s: loss(s, t.detach()), (s,))  # the case in which the forward pass saves the gradient


def test_gradient_is_computed_only_for_inputs_that_require_it(device):
    s, t = _features(2, 4, 5, 5, device=device), _features(2, 3, 5, 5, device=device)
    attention_transfer_loss(s.requires_grad_(), t).backward()
    assert t.grad is None
    s = s.detach()
    attention_transfer_loss(s, t.requires_grad_()).backward()
    assert s.grad is None
    assert t.grad.abs().sum() > 0
    assert not attention_transfer_loss(s, t.detach()).requires_grad
    with torch.no_grad():
        assert not attention_pool(t).requires_grad


def test_upstream_gradients_and_retained_graphs(device):
    s, t = _features(3, 8, 6, 6, device=device).requires_grad_(), _features(3, 4, 6, 6, device=device)
    loss, expected = attention_transfer_loss(s, t), reference.attention_transfer_loss(s, t)
    for upstream in (torch.ones_like(loss), torch.full_like(loss, -2.5), torch.ones_like(loss)):
        (got,) = torch.autograd.grad(loss, s, upstream, retain_graph=True)
        (want,) = torch.autograd.grad(expected, s, upstream, retain_graph=True)
        torch.testing.assert_close(got, want)
    s.grad = None
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(s.grad, 3 * want)


def test_unit_upstream_gradient_needs_no_extra_pass():
    """The leaf receives the gradient that the forward pass wrote.

    No other tensor of the features' size is saved.
    """
    s, t = _features(8, 16, 10, 10).requires_grad_(), _features(8, 16, 10, 10)
    saved_tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved_tensors.append(x) or x, lambda x: x):
        loss = attention_transfer_loss(s, t)
    saved = [x for x in saved_tensors if x.data_ptr() not in (s.data_ptr(), t.data_ptr())]
    (grad,) = [x for x in saved if x.shape == s.shape]
    assert sum(x.nbytes for x in saved) <= s.nbytes + t.nbytes // 16  # the gradient and the teacher's map
    address = grad.data_ptr()
    del grad
    saved_tensors.clear()
    saved.clear()
    loss.backward()
    assert s.grad.data_ptr() == address


SMALL = [c for c in FEATURE_CASES if torch.Size(c.shape).numel() < 3000 and not c.edit and c.shape[0] and "expanded" not in c.layout]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_opcheck(case, device):
    ops = torch.ops.kdkernels
    x = case.make(device)
    y = FeatureCase("", (case.shape[0], 3, *case.shape[2:]), case.dtype).make(device, seed=2)
    torch.library.opcheck(ops.attention_pool.default, (x.requires_grad_(not case.layout.endswith("slice")), 2.0, Reduce.MAX, Normalize.L2, 1e-12))
    torch.library.opcheck(ops.attention_transfer_loss.default, (x, y, 1.5, Variant.AUTHORS, Reduce.MEAN, 1e-12, False))
    x = case.make(device)
    maps, norm, channel = ops.attention_pool(x, 2.0, Reduce.MAX, Normalize.L2, 1e-12)
    torch.library.opcheck(ops.attention_pool_backward.default, (torch.randn_like(maps), x, maps, norm, channel, 2.0, Reduce.MAX, Normalize.L2, 1e-12))
    one = torch.ones((), dtype=maps.dtype, device=device)
    torch.library.opcheck(ops.attention_transfer_loss_backward.default, (one, x, y, 2.0, Variant.AUTHORS, Reduce.MEAN, 1e-12, [True, True]))


def test_opcheck_rescale(device):
    op = torch.ops.kdkernels.attention_transfer_loss_rescale_.default
    one, powers = torch.empty(0, device=device), torch.tensor([0.5, 2.0], device=device)
    torch.library.opcheck(op, (torch.randn(2, 3, 4, device=device), one, torch.tensor(2.0, device=device)))
    torch.library.opcheck(op, (torch.randn(2, 3, 4, device=device).half(), powers, torch.tensor(3.0, device=device)))


def test_compile_inductor(device):
    torch._dynamo.reset()

    def step(s, t):
        return attention_transfer_loss(s * 2, t, 1.5) * 3 + attention_pool(s, normalize="l2").square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        s, t = _features(batch, 6, 5, 5, device=device).requires_grad_(), _features(batch, 4, 5, 5, device=device)
        got, want = compiled(s, t), step(s, t)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, s)[0] for v in (got, want)), rtol=1e-4, atol=1e-6)


def test_export(device):
    class Maps(torch.nn.Module):
        def forward(self, x):
            return attention_pool(x, 2.0, normalize="l2")

    program = torch.export.export(Maps(), (_features(3, 4, 5, 5, device=device),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "kdkernels.attention_pool.default" in program.graph_module.code.replace("torch.ops.", "")
    x = _features(7, 4, 5, 5, device=device)
    assert torch.equal(program.module()(x), attention_pool(x, 2.0, normalize="l2"))


def test_functorch(device):
    s, t = _features(3, 2, 4, 5, 5, dtype=torch.float64, device=device), _features(3, 2, 6, 5, 5, dtype=torch.float64, device=device)
    for p, options in POOLS:
        got = torch.vmap(lambda x, p=p, options=options: attention_pool(x, p, **options), in_dims=1)(s.transpose(0, 1))
        torch.testing.assert_close(got, torch.stack([attention_pool(x, p, **options) for x in s]))
    for p, options in LOSSES:

        def loss(s, t, p=p, options=options):
            return attention_transfer_loss(s, t, p, **options)

        want = torch.stack([loss(a, b) for a, b in zip(s, t, strict=True)])
        torch.testing.assert_close(torch.vmap(loss)(s, t), want)
        torch.testing.assert_close(torch.vmap(loss, in_dims=(0, None))(s, t[0]), torch.stack([loss(a, t[0]) for a in s]))
        leaf = s.clone().requires_grad_()
        (expected,) = torch.autograd.grad(torch.stack([loss(a, b) for a, b in zip(leaf, t, strict=True)]).sum(), leaf)
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(s, t), expected)
        (outside,) = torch.autograd.grad(torch.vmap(loss)(leaf, t).sum(), leaf)
        torch.testing.assert_close(outside, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, device):
    s, t = (300 * _features(4, 16, 6, 6, device=device)).to(dtype).requires_grad_(), (1e-4 * _features(4, 8, 6, 6, device=device)).to(dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = attention_transfer_loss(s, t)
        maps = attention_pool(s)
    assert loss.dtype == maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert loss.item() == pytest.approx(reference.attention_transfer_loss(s.double(), t.double()).item(), rel=1e-5, abs=0)
    loss.backward()
    assert s.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(5, 16, 20, 20), (1, 16, 80, 80)])
def test_result_does_not_depend_on_the_number_of_threads(shape):
    s, t = _features(*shape).requires_grad_(), _features(*shape)
    results, threads = [], torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        loss = attention_transfer_loss(s, t)
        results.append((loss.detach(), torch.autograd.grad(loss, s)[0]))
    torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_module(device):
    s, t = ([_features(2, c, n, n, device=device) for c, n in sizes] for sizes in (((4, 8), (6, 4)), ((8, 8), (5, 4))))
    module = kdkernels.nn.AttentionTransferLoss()
    expected = sum(attention_transfer_loss(a, b) for a, b in zip(s, t, strict=True))
    torch.testing.assert_close(module(s, t), expected)
    torch.testing.assert_close(module(s[0], t[0]), attention_transfer_loss(s[0], t[0]))
    mixed = kdkernels.nn.AttentionTransferLoss([1.0, 2.0], reduce=["sum", "max"], variant="paper")
    expected = attention_transfer_loss(s[0], t[0], 1, variant="paper") + attention_transfer_loss(s[1], t[1], 2, reduce="max", variant="paper")
    torch.testing.assert_close(mixed(s, t), expected)
    assert repr(module) == "AttentionTransferLoss(p=2.0, reduce='mean', variant='authors')"
    with pytest.raises(ValueError, match="p must be a finite number > 0, got -1"):
        kdkernels.nn.AttentionTransferLoss(-1)
    with pytest.raises(ValueError, match="the same number of features, at least one, got 2 and 1"):
        module(s, t[:1])
    with pytest.raises(ValueError, match="p must be one value, or one for each of the 1 pairs, got 2"):
        mixed(s[0], t[0])


X = torch.zeros(2, 3, 4, 4)
POOL_ERRORS = [
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (dict(x=X.long()), TypeError, "x must be float64, float32, bfloat16 or float16 features, got torch.int64"),
    (dict(x=X[0, 0]), ValueError, r"x must have the shape \[B, C, \*spatial\]"),
    (dict(x=X[:, :0]), ValueError, "at least one channel and one spatial position"),
    (dict(p=0), ValueError, "p must be a finite number > 0, got 0"),
    (dict(p=float("inf")), ValueError, "p must be a finite number > 0"),
    (dict(eps=0), ValueError, "eps must be a finite number > 0"),
    (dict(reduce="min"), ValueError, "reduce must be one of"),
    (dict(normalize="l1"), ValueError, "normalize must be one of"),
]
LOSS_ERRORS = [
    (dict(student=None), TypeError, "student must be a tensor, got NoneType"),
    (dict(teacher=X.to(torch.complex64)), TypeError, "teacher must be"),
    (dict(teacher=X[:1]), ValueError, r"same batch size and number of dimensions, got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"),
    (dict(teacher=X.flatten(2)), ValueError, "same batch size and number of dimensions"),
    (dict(teacher=X.to("meta")), ValueError, "one device"),
    (dict(p=-2), ValueError, "p must be"),
    (dict(variant="mean"), ValueError, "variant must be one of"),
    (dict(reduce="min"), ValueError, "reduce must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), POOL_ERRORS, ids=[m for *_, m in POOL_ERRORS])
def test_errors_of_pool_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        attention_pool(**{"x": X, **change})


@pytest.mark.parametrize(("change", "error", "message"), LOSS_ERRORS, ids=[m for *_, m in LOSS_ERRORS])
def test_errors_of_loss_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        attention_transfer_loss(**{"student": X, "teacher": X, **change})


def test_raw_ops_check_shapes_and_options():
    ops = torch.ops.kdkernels
    maps, norm, channel = ops.attention_pool(X, 2.0, Reduce.MAX, Normalize.L2, 1e-12)
    good = [maps, X, maps, norm, channel, 2.0, Reduce.MAX, Normalize.L2, 1e-12]
    bad = {0: maps[:1], 1: X[:, :, :2], 2: maps.double(), 3: norm[:1], 4: channel + 3, 5: 0.0, 6: 3, 7: -1, 8: 0.0}
    for position, value in bad.items():
        arguments = list(good)
        arguments[position] = value
        with pytest.raises((ValueError, TypeError)):
            ops.attention_pool_backward(*arguments)
    for arguments in ((X, X[:1], 2.0, Variant.AUTHORS), (X, X[..., :3], 2.0, Variant.AUTHORS), (X, X, 2.0, 2), (X, X[:, :0], 2.0, Variant.AUTHORS)):
        with pytest.raises((ValueError, TypeError)):
            ops.attention_transfer_loss(*arguments, Reduce.MEAN, 1e-12, False)


@pytest.mark.parametrize("shape", [(4, 2048, 16, 16), (8, 1024, 8, 8), (16, 1024, 2, 2)], ids=str)
def test_gradient_is_accurate_for_many_channels(shape, device):
    """The error of the gradient is at most twice that of PyTorch's pairwise sums.

    Maps of thousands of channels differ by a few percent only, so the gradient is computed from
    small differences.
    """
    torch.manual_seed(0)
    s, t = _features(*shape, device=device).requires_grad_(), _features(*shape, device=device)
    exact = s.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.attention_transfer_loss(exact, t.double()), exact)
    errors = []
    for function in (attention_transfer_loss, reference.attention_transfer_loss):
        (got,) = torch.autograd.grad(function(s, t), s)
        errors.append(((got.double() - expected).abs().max() / expected.abs().max()).item())
    assert errors[0] <= 2 * errors[1] + 1e-7, errors
