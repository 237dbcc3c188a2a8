"""Every op under torch's transforms, and compositions of two of them, matches the reference.

A transform maps a scalar function of x to another scalar function of x (a derivative is contracted
with fixed weights), so transforms compose. The outermost step is the user's: the value, a gradient,
a tangent, or a vectorised Jacobian or Hessian.
"""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels import reference
from kdkernels.options import Direction, Normalize, Reduce, Reduction, Sign, Variant


def _irregular_numbers(shape, seed):
    """Return irregular numbers without a random generator, which vmap does not allow."""
    count = torch.Size(shape).numel()
    return (torch.arange(1, count + 1, dtype=torch.float64).square() * (1.7 + 0.61 * seed) + seed).cos().reshape(shape) * 1.3


def _weights(shape, seed=5):
    return _irregular_numbers(shape, seed + 10)


def _input(*shape, seed=0):
    return _irregular_numbers(shape, seed)


def _contract(*results):
    """Return a scalar that depends on every element of the results."""
    return sum((r * _weights(r.shape, 9)).sum() for r in results)


def _svd_results(triplets):
    """Return results that do not depend on signs: singular values, projectors, and the sum of the
    triplets.
    """
    u, s, v = triplets
    return s, v @ v.mT, (u * s.unsqueeze(-2)) @ v.mT


def _truncated_svds(module, x):
    other = _input(3, 6, seed=4)
    if module is kd:
        return kd.truncated_svds([x, other, x * 2 + other[:3, :4].mean()], 2, return_u=True)
    return [module.truncated_svd(m, 2, return_u=True) for m in (x, other, x * 2 + other[:3, :4].mean())]


# name: (function of (module, x), shape of x). `module` is kdkernels or kdkernels.reference.
OPS = {
    "temperature_kl": (lambda m, x: m.temperature_kl(x, _input(3, 5, seed=1), 2.0), (3, 5)),
    "temperature_kl reverse": (lambda m, x: m.temperature_kl(x, _input(3, 5, seed=1), 2.0, direction="reverse", reduction="sum"), (3, 5)),
    "temperature_kl jsd": (
        lambda m, x: _contract(m.temperature_kl(x, _input(3, 5, seed=1), direction="jsd", beta=0.3, reduction="none", dim=0)),
        (3, 5),
    ),
    "temperature_kl, target_eps": (lambda m, x: m.temperature_kl(x, _input(3, 5, seed=1), 3.0, target_eps=0.01), (3, 5)),
    "temperature_kl, teacher and T from x": (lambda m, x: m.temperature_kl(x, (x * 2).sin(), 1.5 + x[:, 0].cos(), reduction="mean"), (3, 5)),
    "attention_pool": (lambda m, x: _contract(m.attention_pool(x, 2.0, normalize="l2")), (2, 3, 4)),
    "attention_pool max": (lambda m, x: _contract(m.attention_pool(x, 1.5, reduce="max", normalize="softmax")), (2, 3, 4)),
    "attention_transfer_loss": (lambda m, x: m.attention_transfer_loss(x, _input(2, 5, 4, seed=1)), (2, 3, 4)),
    "attention_transfer_loss, teacher from x": (lambda m, x: m.attention_transfer_loss(x, x.sin() + x**2, 3.0, variant="paper"), (2, 3, 4)),
    "rbf_correlation": (lambda m, x: _contract(m.rbf_correlation(x, x[:, :2].sin())), (2, 3, 2)),
    "rbf_correlation_loss": (
        lambda m, x: m.rbf_correlation_loss(x, x[:, :2].sin(), _input(2, 3, 2, seed=1), _input(2, 2, 2, seed=2), 2.0, reduction="batchmean"),
        (2, 3, 2),
    ),
    "truncated_svd": (lambda m, x: _contract(*_svd_results(m.truncated_svd(x, 2, return_u=True))), (4, 3)),
    "truncated_svds": (lambda m, x: _contract(*(r for t in _truncated_svds(m, x) for r in _svd_results(t))), (3, 4)),
    "align_singular_vectors": (
        lambda m, x: _contract(*m.align_singular_vectors(x, _input(4, 2, seed=1) + x[:, :2].sin(), x[0, :2].exp())),
        (4, 3),
    ),
    "svd_kd_loss": (
        lambda m, x: (m.nn if m is kd else m).svd_kd_loss(
            [x, x[:, :2].sin()], [_input(2, 3, 4, seed=1), _input(2, 2, 4, seed=2)], k=1, **({"weighting": "none"} if m is kd else {})
        ),
        (2, 3, 4),
    ),
}


def _reverse(f):
    return lambda x: (torch.func.grad(f)(x) * _weights(x.shape)).sum()


def _vjp(f):
    return lambda x: (torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0] * _weights(x.shape)).sum()


def _jvp(f):
    return lambda x: torch.func.jvp(f, (x,), (_weights(x.shape),))[1]


def _jacrev(f):
    return lambda x: (torch.func.jacrev(f)(x) * _weights(x.shape, 6)).sum()


def _jacfwd(f):
    return lambda x: (torch.func.jacfwd(f)(x) * _weights(x.shape, 7)).sum()


def _vmap(f):
    def sum_over_factors(x):
        factors = torch.tensor([1.0, 0.5, -1.5], dtype=x.dtype)
        return (torch.vmap(lambda c: f(x * c))(factors) * factors).sum()

    return sum_over_factors


def _square(f):
    """Return a function whose upstream gradient depends on x."""
    return lambda x: f(x) ** 2 + f(x * 0.5) * x.sum()


def _checkpoint(f):
    return lambda x: checkpoint(f, x, use_reentrant=False)


def _graph(f):
    """Return a function of the gradient of plain autograd, with create_graph=True."""

    def gradient(x):
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        return (torch.autograd.grad(f(x), x, create_graph=True)[0] * _weights(x.shape, 8)).sum()

    return gradient


def _same(f):
    return f


FUNC_TRANSFORMS = (_square, _reverse, _jvp, _vmap, _jacrev, _jacfwd)
ALL_TRANSFORMS = (_same, *FUNC_TRANSFORMS, _vjp, _checkpoint, _graph)


def _gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def _tangent(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, _weights(x.shape, 3)))).tangent


def _batched_gradients(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.tensor([1.0, -2.0], dtype=x.dtype), is_grads_batched=True)[0]


def _linearised(f, x):
    return torch.func.linearize(f, x)[1](_weights(x.shape, 3))


# The outermost steps, and the transforms inside of them. torch does not support nested forward
# mode.
OUTER = {
    "value": (lambda f, x: f(x), ALL_TRANSFORMS),
    "gradient": (_gradient, ALL_TRANSFORMS),
    "tangent": (_tangent, (_same, _square, _reverse, _vmap, _jacrev, _vjp, _checkpoint, _graph)),
    "batched gradients": (_batched_gradients, (_same, _square, _vmap, _checkpoint, _graph)),
    "jacobian, vectorised": (
        lambda f, x: torch.autograd.functional.jacobian(lambda y: torch.stack([f(y), f(y * 0.5)]), x, vectorize=True),
        (_same, _square, _reverse),
    ),
    "jacobian, forward mode": (
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
        (_same, _square, _vmap, _reverse),
    ),
    "linearise": (_linearised, (_same,)),
    "Hessian": (lambda f, x: torch.autograd.functional.hessian(f, x), (_same, _square, _vmap, _checkpoint)),
    "Hessian, vectorised": (lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True), (_same, _square)),
    "Hessian, forward over reverse": (
        lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True, outer_jacobian_strategy="forward-mode"),
        (_same, _square),
    ),
}


def _checkpoint_has_forward_mode() -> bool:
    """Return whether torch's checkpoint supports forward mode. In torch 2.10 it does not."""
    try:
        return _tangent(_checkpoint(lambda x: x.sin().sum()), torch.ones(3)) is not None
    except NotImplementedError:
        return False


def _assert_reference(transform, outer, name):
    function, shape = OPS[name]
    x = _input(*shape)
    if transform is _checkpoint and outer is _tangent and not _checkpoint_has_forward_mode():
        for module in (reference, kd):
            with pytest.raises(NotImplementedError, match="must implement the jvp function"):
                outer(transform(lambda y, module=module: function(module, y)), x)
        return
    want, got = (outer(transform(lambda y, module=module: function(module, y)), x) for module in (reference, kd))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("outer", OUTER)
def test_outermost_steps_on_transforms_match_the_reference(outer, name):
    """Apply each outermost step to each transform, also to those whose upstream gradient depends on
    the input.
    """
    step, transforms = OUTER[outer]
    if outer == "linearise" and name.startswith(("truncated_svd", "svd_kd")):  # plain torch gives NaN here
        with pytest.raises(NotImplementedError, match=r"use torch\.func\.jvp"):
            step(lambda y: OPS[name][0](kd, y), _input(*OPS[name][1]))
        return
    for transform in transforms:
        _assert_reference(transform, step, name)


@pytest.mark.parametrize("name", OPS)
def test_compositions_of_two_torch_func_transforms_match_the_reference(name):
    for a, b in itertools.product(FUNC_TRANSFORMS, repeat=2):
        _assert_reference(lambda f, a=a, b=b: a(b(f)), OUTER["value"][0], name)


def _third_derivative(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    for seed in (1, 2):
        y = (torch.autograd.grad(y, x, create_graph=True)[0] * _weights(x.shape, seed)).sum()
    return torch.autograd.grad(y, x)[0]


@pytest.mark.parametrize("name", [n for n in OPS if not n.startswith(("align", "svd_kd"))])
def test_third_derivatives_match_the_reference(name):
    _assert_reference(_square, _third_derivative, name)


@pytest.mark.parametrize("name", ["temperature_kl", "attention_pool", "attention_transfer_loss", "truncated_svd", "align_singular_vectors"])
def test_raw_ops_raise_in_forward_mode(name):
    """An op that is called directly, not through its public function, raises in forward mode."""
    ops = torch.ops.kdkernels
    x = torch.rand(2, 3, 4, dtype=torch.float64)
    calls = {
        "temperature_kl": lambda x: ops.temperature_kl(
            x, x * 2, 1.0, None, None, None, -1, Direction.FORWARD, 0.5, Reduction.SUM, True, True, 0.0, False
        ),
        "attention_pool": lambda x: ops.attention_pool(x, 2.0, Reduce.MEAN, Normalize.NONE, 1e-12),
        "attention_transfer_loss": lambda x: ops.attention_transfer_loss(x, x * 2, 2.0, Variant.AUTHORS, Reduce.MEAN, 1e-12, False),
        "truncated_svd": lambda x: ops.truncated_svd(x, 1, Sign.MAX_ABS, True, 1e-12, False),
        "align_singular_vectors": lambda x: ops.align_singular_vectors(x, x * 2, None, True),
    }
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        calls[name](forward_ad.make_dual(x, torch.ones_like(x)))
