"""Values and gradients of truncated_svd and align_singular_vectors for any strides, compared with
float64. Slices, steps, expanded and permuted dimensions, and sides of 1.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import rounding

from kdkernels import align_singular_vectors, reference, truncated_svd


def _any_layout(data, shape, dtype):
    """Return a leaf tensor, and a function that returns a view of it with the given shape."""
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 3)) for _ in shape]
    offsets = [data.draw(st.integers(0, 2)) for _ in shape]
    expanded = [data.draw(st.booleans()) and i < len(shape) - 2 for i in range(len(shape))]
    sizes = [1 if e else offset + step * n for n, step, offset, e in zip(shape, steps, offsets, expanded, strict=True)]
    seed = data.draw(st.integers(0, 1000))
    leaf = torch.randn([sizes[d] for d in order], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    def view(leaf):
        x = leaf.permute([order.index(d) for d in range(len(shape))])
        for d, (n, step, offset, e) in enumerate(zip(shape, steps, offsets, expanded, strict=True)):
            x = x.expand(*(-1,) * d, n, *(-1,) * (len(shape) - d - 1)) if e else x.narrow(d, offset, x.shape[d] - offset)
            x = x if e else x[(slice(None),) * d + (slice(None, None, step),)].narrow(d, 0, n)
        return x

    return leaf, view


@given(data=st.data())
def test_truncated_svd_with_any_layout(data):
    """Singular values, the projector on the span of v, and the gradient of both."""
    batch = data.draw(st.lists(st.integers(1, 3), max_size=2))
    m, n = data.draw(st.integers(1, 19)), data.draw(st.integers(1, 19))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    k = data.draw(st.integers(1, min(3, m, n)))
    leaf, view = _any_layout(data, (*batch, m, n), dtype)
    outcomes = []
    for function, use_float64 in ((truncated_svd, False), (reference.truncated_svd, True)):
        inputs = (leaf.double() if use_float64 else leaf.clone()).requires_grad_()
        x = view(inputs)
        assert x.shape == (*batch, m, n)
        _, s, v = function(x, k)
        g = torch.Generator().manual_seed(1)
        a, b = torch.randn(n, n, generator=g, dtype=torch.float64).to(s), torch.randn(k, generator=g, dtype=torch.float64).to(s)
        projector = v @ v.mT
        ((projector * a).sum() + (s * b).sum()).backward()
        outcomes.append((s.detach().double(), projector.detach().double(), inputs.grad))
    (s, projector, grad), (true_s, true_projector, true_grad) = outcomes
    squares = torch.linalg.svdvals(view(leaf.double())) ** 2
    after = squares[..., k] if k < squares.shape[-1] else torch.zeros_like(squares[..., 0])
    gap = ((squares[..., k - 1] - after) / squares[..., 0]).min().item() if n > m or k < squares.shape[-1] else 1.0
    smallest = ((squares[..., :-1] - squares[..., 1:])[..., :k] / squares[..., :1]).min().item() if squares.shape[-1] > 1 else 1.0
    eps = rounding(torch.float64 if dtype == torch.float64 else torch.float32) * (8 if dtype == torch.float64 else 1)
    noise = eps * (64 + (m + n) ** 0.5)
    assert (s - true_s).abs().max() <= noise * true_s.max()
    assert grad.dtype == dtype
    if gap < 1e-3 or smallest < 1e-3:
        return  # the vectors depend on rounding
    assert (projector - true_projector).norm(dim=(-2, -1)).max() <= 4 * noise / gap
    magnitude = true_grad.norm() + squares[..., 0].min() ** -0.5
    assert (grad.double() - true_grad).norm() <= (16 * noise / gap / smallest + 2 * rounding(dtype)) * magnitude


@given(data=st.data())
def test_align_singular_vectors_with_any_layout(data):
    batch = data.draw(st.lists(st.integers(1, 3), max_size=2))
    n, num_student, k = (data.draw(st.integers(1, most)) for most in (19, 5, 4))
    dtypes = [data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16])) for _ in range(3)]
    shapes = ((*batch, n, num_student), (*batch, n, k), (*batch, k))
    leaves, views = zip(*(_any_layout(data, shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)), strict=True)
    flip = data.draw(st.sampled_from(["teacher", "student"]))
    cosine = (views[0](leaves[0].double()).mT @ views[1](leaves[1].double())).abs().sort(-2).values
    if cosine[..., -1, :].min() < 1e-4 or (num_student > 1 and (cosine[..., -1, :] - cosine[..., -2, :]).min() < 1e-4 * cosine.max()):
        return  # the match or a sign depends on rounding
    outcomes = []
    for function, use_float64 in ((align_singular_vectors, False), (reference.align_singular_vectors, True)):
        inputs = [(leaf.double() if use_float64 else leaf.clone()).requires_grad_() for leaf in leaves]
        outputs = function(*(view(leaf) for view, leaf in zip(views, inputs, strict=True)), flip=flip)
        sum((o * torch.cos(torch.arange(o.numel(), dtype=torch.float64)).view(o.shape)).sum() for o in outputs).backward()
        outcomes.append([*(o.detach().double() for o in outputs), *(leaf.grad for leaf in inputs)])
    for got, expected in zip(*outcomes, strict=True):
        # The sum over an expanded dimension is computed in the dtype of the leaf.
        limit = 64 * max(rounding(got.dtype), rounding(torch.float32 if torch.float64 not in dtypes[:2] else torch.float64))
        assert (got.double() - expected).norm() <= limit * expected.norm().clamp_min(1.0)
