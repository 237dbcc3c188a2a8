"""Less common uses of the ops: meta, fake and copy-on-write tensors, compiled autograd, and
transforms inside compiled code.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels as kd
from kdkernels import nn, reference

CALLS = {
    "temperature_kl": (lambda x, y: kd.temperature_kl(x, y, 2.0), (3, 7)),
    "jsd": (lambda x, y: kd.temperature_kl(x, y, 2.0, direction="jsd"), (3, 7)),
    "attention_pool": (lambda x, y: kd.attention_pool(x).sum() + y.sum() * 0, (2, 3, 4, 4)),
    "attention_transfer_loss": (lambda x, y: kd.attention_transfer_loss(x, y), (2, 3, 4, 4)),
    "truncated_svd": (lambda x, y: kd.truncated_svd(x, 2)[2].sum() + y.sum() * 0, (3, 6, 4)),
    "truncated_svds": (lambda x, y: sum(v.square().sum() for _, s, v in kd.truncated_svds([x, y], 2)), (3, 6, 4)),
    "align_singular_vectors": (lambda x, y: kd.align_singular_vectors(x, y)[0].sum(), (3, 6, 4)),
    "rbf_correlation": (lambda x, y: kd.rbf_correlation(x, y).sum(), (2, 5, 3)),
    "rbf_correlation_loss": (lambda x, y: kd.rbf_correlation_loss(x, x * 2, y, y * 2), (2, 5, 3)),
    "svd_kd_loss": (lambda x, y: nn.svd_kd_loss([x, x * 2], [y, y * 2]), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_meta_and_fake_tensors(call, mode):
    """Forward and backward passes on tensors without data."""
    function, shape = CALLS[call]
    if mode == "fake":
        with FakeTensorMode():
            x = torch.randn(shape, requires_grad=True)
            function(x, torch.randn(shape)).backward()
    else:
        x = torch.randn(shape, device="meta", requires_grad=True)
        function(x, torch.randn(shape, device="meta")).backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("call", CALLS)
def test_copy_on_write_tensors_are_not_copied(call):
    function, shape = CALLS[call]
    x, y = torch.randn(shape), torch.randn(shape)
    lazy = [torch._lazy_clone(t) for t in (x, y)]
    assert torch.equal(function(*lazy), function(x, y))
    assert all(torch._C._is_cow_tensor(t) for t in lazy)


@pytest.mark.parametrize("call", CALLS)
def test_compiled_autograd(call):
    function, shape = CALLS[call]
    x, y = torch.randn(shape), torch.randn(shape)
    gradients = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, y)
        if enabled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(lambda c: f(x * c))(torch.tensor([1.0, 2.0])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("call", ["temperature_kl", "attention_transfer_loss", "rbf_correlation_loss"])
def test_transforms_inside_compiled_code(call, transform):
    function, shape = CALLS[call]
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)

    def f(x, y):
        return TRANSFORMS[transform](lambda x: function(x, y), x)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, y), f(x, y))


@pytest.mark.parametrize("labels", [torch.tensor([0, 3, 1, 2]), torch.eye(5)[:4]], ids=["classes", "probabilities"])
def test_kd_loss_compiles_to_one_graph(labels):
    s, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(nn.kd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t, labels), nn.kd_loss(s, t, labels))


def test_module_repr_causes_no_warning(recwarn):
    learnable = nn.TemperatureKLLoss(3.0, learnable=True)
    assert "temperature=3, learnable=True" in repr(learnable)
    with torch.no_grad():
        learnable.log_temperature.add_(1.0)
    assert "temperature=8.15485" in repr(learnable)
    assert "temperature=3, learnable=True" in repr(nn.TemperatureKLLoss(3.0, learnable=True).to("meta"))
    assert not recwarn.list


def test_half_precision_features_are_pooled_in_float32():
    s, t = torch.randn(8, 16, 8, 8).relu().bfloat16(), torch.randn(8, 16, 4, 4).relu().bfloat16()
    for function in (kd.attention_transfer_loss, reference.attention_transfer_loss):
        torch.testing.assert_close(function(s, t), kd.attention_transfer_loss(s.float(), t.float()), rtol=1e-5, atol=0)


def test_reference_of_svd_kd_limits_k_like_the_loss():
    student = [torch.randn(2, *s, dtype=torch.float64) for s in ((4, 3, 3), (5, 2, 2), (3, 2, 4))]
    teacher = [torch.randn(2, *s, dtype=torch.float64) for s in ((4, 5, 3), (5, 2, 1), (3, 2, 2))]
    for loss in ("authors", "mean"):
        for k in (1, 2, 3, 9):
            torch.testing.assert_close(nn.svd_kd_loss(student, teacher, k, loss=loss), reference.svd_kd_loss(student, teacher, k, loss=loss))
