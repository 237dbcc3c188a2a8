"""attention_pool and attention_transfer_loss with any strides, in half precision with a loss
scaler, and on any number of threads.
"""

import random

import pytest
import torch
from layouts import random_layout, random_shape

from kdkernels import attention_pool, attention_transfer_loss, reference
from kdkernels.options import Normalize, Reduce, Variant

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _close(name, got, want, dtype, scale=0.0):
    """Check the error relative to the largest element, or to the terms that cancel (`scale`).

    The tolerance covers the rounding of the features' dtype and of the sums.
    """
    rtol = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    error = (got.double() - want).abs().max().item() if got.numel() else 0.0
    assert error <= rtol * max(want.abs().max().item(), scale) + 1e-12, f"{name}: off by {error:.2e}"


def _bound(x, p, reduce, normalize):
    """Return a bound of the derivative of a map with respect to x.

    For normalized maps it is the bound before the projection orthogonal to the map.
    """
    bound = p * x.abs().max().item() ** (p - 1) / (x.shape[1] if reduce == "mean" else 1)
    if normalize != "l2":
        return bound
    return bound / reference.attention_pool(x, p, reduce=reduce).flatten(1).norm(dim=1).min().clamp_min(1e-12).item()


@pytest.mark.parametrize("seed", range(4))
def test_any_layout_and_dtypes(seed):
    """Values and gradients for random shapes (including sizes of 1), strides and dtypes match the
    reference in float64.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(100):
        shape = random_shape(rng, rng.choice((3, 4, 4, 5)))
        dtype, p = rng.choice(DTYPES), rng.choice((1.0, 1.5, 2.0, 2.7))
        options = {"reduce": rng.choice(("mean", "sum", "max")), "normalize": rng.choice((None, "l2", "softmax"))}
        x = random_layout(rng, shape, dtype, 0.7)
        other = random_layout(rng, [shape[0], rng.choice((1, 3, 8)), *shape[2:]], rng.choice(DTYPES), 0.7)
        case = f"{dtype} {shape} {x.stride()} p={p} {options}"
        features, wide = x.detach().requires_grad_(), x.detach().double().contiguous().requires_grad_()
        got, want = attention_pool(features, p, **options), reference.attention_pool(wide, p, **options)
        _close(f"maps of {case}", got, want.detach(), got.dtype)
        upstream = random_layout(rng, got.shape, got.dtype)
        gradients = (torch.autograd.grad(y, x, upstream.to(y.dtype))[0] for y, x in ((got, features), (want, wide)))
        _close(
            f"gradient of {case}", *gradients, dtype, _bound(wide.detach(), p, options["reduce"], options["normalize"]) * upstream.abs().max().item()
        )

        options = {"reduce": options["reduce"], "variant": rng.choice(("authors", "paper"))}
        case = f"{case} and {other.dtype} {other.shape} {other.stride()} {options}"
        t, wide_t = other.detach(), other.detach().double().contiguous()
        q = [reference.attention_pool(x.detach(), p, reduce=options["reduce"], normalize="l2").flatten(1) for x in (wide, wide_t)]
        distance = (q[0] - q[1]).norm(dim=1).min().item()
        # The gradient of a norm is undefined if the maps agree, for example if both are constant
        # over all positions.
        loss_derivative = 4 / q[0].numel() if options["variant"] == "authors" else (1 + 2 / max(distance, 1e-17)) / shape[0]
        for both in (False, True):  # the gradient that the forward pass saves, and the gradient that the backward pass computes
            inputs = [(features, wide)]
            if both:
                t, wide_t = t.requires_grad_(), wide_t.requires_grad_()
                inputs.append((t, wide_t))
            got, want = (
                f(a, b, p, **options) for f, a, b in ((attention_transfer_loss, features, t), (reference.attention_transfer_loss, wide, wide_t))
            )
            gradients = (torch.autograd.grad(y, x) for y, x in ((got, [i[0] for i in inputs]), (want, [i[1] for i in inputs])))
            for a, b, (x, exact) in zip(*gradients, inputs, strict=True):
                scale = loss_derivative * _bound(exact.detach(), p, options["reduce"], "l2")
                coarser_dtype = max((x.dtype, got.dtype), key=lambda d: torch.finfo(d).eps)
                _close(f"gradient of the loss of {case}", a, b, coarser_dtype, scale)


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (3, 1, 4, 5), (1, 8, 1, 1), (2, 1, 1, 1), (2, 16, 1, 7)], ids=str)
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_dimensions_of_size_1_with_any_stride(shape, reduce):
    """The stride of a dimension of size 1 is arbitrary, so the gradient's layout must not be
    derived from it.
    """
    for step in (1, 2, 16):
        for dim in range(4):
            sizes = [n * (step if d == dim else 1) + 3 for d, n in enumerate(shape)]
            for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)):
                memory = torch.randn([sizes[d] for d in order]).permute([order.index(d) for d in range(4)])
                cut = tuple(slice(0, n * (step if d == dim else 1), step if d == dim else 1) for d, n in enumerate(shape))
                x = memory[cut].detach().requires_grad_()
                wide = x.detach().double().contiguous().requires_grad_()
                upstream = torch.randn(attention_pool(x).shape)
                (got,) = torch.autograd.grad(attention_pool(x, reduce=reduce), x, upstream)
                (want,) = torch.autograd.grad(reference.attention_pool(wide, reduce=reduce), wide, upstream.double())
                torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_empty_batches_with_any_strides(reduce):
    """An expanded empty batch has strides of 0, which contiguous() does not change."""
    for x in (torch.zeros(1, 1, 1).expand(0, 4, 5), torch.zeros(1, 4, 1).expand(0, 4, 5), torch.empty(5, 4, 0).permute(2, 1, 0)):
        x = x.detach().requires_grad_()
        for maps in (attention_pool(x, reduce=reduce), attention_pool(x, reduce=reduce, normalize="l2")):
            assert maps.shape == (0, 5)
            assert torch.autograd.grad(maps.sum(), x)[0].shape == x.shape
        for loss in (attention_transfer_loss(x, torch.empty(0, 2, 5), reduce=reduce), attention_transfer_loss(x, x.detach(), reduce=reduce)):
            assert loss.item() == 0
            assert torch.autograd.grad(loss, x)[0].shape == x.shape


@pytest.mark.parametrize("kept", [False, True], ids=["", "kept graph"])
@pytest.mark.parametrize("upstream", [1.0, 65536.0, 1000 * 65536.0, 3e-3])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_rounded_after_the_upstream_factor(dtype, p, upstream, kept):
    """With a loss scaler the gradient of the features is the exact gradient, rounded at most twice.

    This holds also for values that are small before scaling.
    """
    torch.manual_seed(0)
    s, t = (torch.randn(8, c, 12, 12).to(dtype) for c in (16, 4))
    s.requires_grad_()
    wide = s.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(attention_transfer_loss(s, t, p) * upstream, s, retain_graph=kept)
    (want,) = torch.autograd.grad(reference.attention_transfer_loss(wide, t.double(), p) * upstream, wide)
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    fits = want.abs() < largest
    error = (got.double() - want)[fits].abs()
    assert (error <= 1.01 * torch.finfo(dtype).eps * want[fits].abs() + 2 * tiny * torch.finfo(dtype).eps + 2e-5 * want.abs().max() * 2**-11).all()
    assert torch.equal(got.isinf(), ~fits)


def test_half_precision_gradients_are_the_same_when_compiled():
    torch._dynamo.reset()
    s, t = torch.randn(4, 8, 6, 6).half().requires_grad_(), torch.randn(4, 3, 6, 6).half()

    def scaled(s):
        return attention_transfer_loss(s, t) * 65536.0

    got, want = (torch.autograd.grad(f(s), s)[0] for f in (torch.compile(scaled, fullgraph=True, backend="aot_eager"), scaled))
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)


def test_triton_saves_half_precision_gradients_like_the_cpu():
    from kdkernels.triton import attention_pool as kernels

    op = torch.ops.kdkernels.attention_transfer_loss
    for p, reduce in ((2.0, Reduce.MEAN), (0.5, Reduce.SUM), (3.0, Reduce.MAX)):
        s, t = torch.randn(3, 5, 4, 3).half(), torch.randn(3, 2, 4, 3)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = (p, Variant.AUTHORS, reduce, 1e-12, True)
        loss, grad, scale, maps = (x.cpu() for x in kernels.attention_transfer_loss(s.to(device), t.to(device), *options))
        want_loss, want, want_scale, want_maps = op(s, t, *options)
        torch.testing.assert_close(loss, want_loss)
        torch.testing.assert_close(maps, want_maps)
        assert torch.equal(scale.frexp()[0], torch.full_like(scale, 0.5))
        assert grad.isfinite().all()
        exact = want.double() * want_scale.view(-1, 1, 1, 1)
        torch.testing.assert_close(grad.double() * scale.view(-1, 1, 1, 1), exact, rtol=4e-3, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(1, 70, 20, 20), (1, 33, 9, 15), (3, 130, 12, 13)], ids=str)
def test_bits_do_not_depend_on_threads_and_batch(shape, layout):
    """A sample has bitwise the same results alone and in a batch, and with one to four threads,
    which divide its positions.
    """
    x = torch.randn(4, *shape[1:])
    x = x.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else x
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for part in (x, x[: shape[0]]):
                maps = attention_pool(part, 1.5, normalize="l2")
                a = part.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                (grad,) = torch.autograd.grad(attention_pool(a, 2.0, normalize="l2"), a, torch.ones_like(maps))
                results.append((maps[:1], grad[:1]))
    finally:
        torch.set_num_threads(threads)
    for maps, grad in results[1:]:
        assert torch.equal(maps, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_raw_ops_raise_for_unsupported_inputs():
    """Wrong sizes, dtypes and options in every position raise, instead of reading memory out of
    bounds.
    """
    ops = torch.ops.kdkernels
    x = torch.randn(2, 3, 4, 4)
    maps, norm, channel = ops.attention_pool(x, 2.0, Reduce.MAX, Normalize.L2, 1e-12)
    bad = [
        torch.zeros(2, 3, 0),
        torch.zeros(2, 0, 4),
        torch.zeros(2, 3),
        x.to(torch.float8_e4m3fn),
        x.long(),
        x.to(torch.complex64),
        x[:1],
        x[:, :, :3],
    ]
    one = torch.ones(())
    for wrong in bad:
        for call in (
            lambda w: ops.attention_pool_backward(maps, w, maps, norm, channel, 2.0, Reduce.MAX, Normalize.L2, 1e-12),
            lambda w: ops.attention_pool_backward(w, x, maps, norm, channel, 2.0, Reduce.MAX, Normalize.L2, 1e-12),
            lambda w: ops.attention_pool_backward(maps, x, w, norm, channel, 2.0, Reduce.MAX, Normalize.L2, 1e-12),
            lambda w: ops.attention_pool_backward(maps, x, maps, w, channel, 2.0, Reduce.MAX, Normalize.L2, 1e-12),
            lambda w: ops.attention_pool_backward(maps, x, maps, norm, w, 2.0, Reduce.MAX, Normalize.L2, 1e-12),
            lambda w: ops.attention_transfer_loss(x, w, 2.0, Variant.AUTHORS, Reduce.MEAN, 1e-12, True),
            lambda w: ops.attention_transfer_loss(w, x, 2.0, Variant.AUTHORS, Reduce.MEAN, 1e-12, True),
            lambda w: ops.attention_transfer_loss_backward(w, x, x, 2.0, Variant.AUTHORS, Reduce.MEAN, 1e-12, [True, True]),
            lambda w: ops.attention_transfer_loss_backward(one, w, x, 2.0, Variant.AUTHORS, Reduce.MEAN, 1e-12, [True, True]),
            lambda w: ops.attention_transfer_loss_rescale_(x.clone(), w, one),
            lambda w: ops.attention_transfer_loss_rescale_(x.clone(), torch.ones(2), w),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                call(wrong)
    for wrong in bad[:6]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.attention_pool(wrong, 2.0, Reduce.MEAN, Normalize.NONE, 1e-12)
    for arguments in ((0.0, 0, 0, 1e-12), (2.0, 3, 0, 1e-12), (2.0, 0, 3, 1e-12), (2.0, 0, 0, float("nan"))):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.attention_pool(x, *arguments)
