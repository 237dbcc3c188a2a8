"""Checks that every implementation of truncated_svd must pass."""

import torch
from tolerances import rounding

from kdkernels import reference


def check_triplets(x, k, u, s, v):
    """Compare u [..., M, k], s and v of x (float32 or float64) with LAPACK's result in float64."""
    m, n = x.shape[-2:]
    eps = rounding(s.dtype)
    if s.dtype == torch.float64:
        eps *= 8  # LAPACK's result is also rounded to float64
    # On a GPU, torch.linalg.svd uses cuSOLVER, which is less accurate than LAPACK.
    exact = x.double().cpu()
    all_s = torch.linalg.svdvals(exact)
    true_u, true_s, true_v = reference.truncated_svd(exact, k, return_u=True)
    largest = true_s[..., :1].clamp_min(torch.finfo(torch.float64).tiny)
    u, s, v = (t.double().cpu() for t in (u, s, v))
    length = (m + n) ** 0.5
    assert ((s - true_s).abs() <= eps * (6 + length / 2) * largest).all(), f"sigma off by {((s - true_s).abs() / largest).max() / eps:.1f} roundings"
    assert (s >= 0).all()
    assert (s[..., :-1] >= s[..., 1:]).all()
    eye = torch.eye(k, dtype=torch.float64)
    for vectors in (u, v):
        assert ((vectors.mT @ vectors - eye).abs() <= eps * (8 + length)).all(), "vectors are not orthonormal"
    # The triplets satisfy x v = s u and x^T u = s v up to the rounding of x, for any gaps.
    units = exact / largest[..., None]
    for a, left, right in ((units, u, v), (units.mT, v, u)):
        error = (a @ right - left * (s / largest)[..., None, :]).norm(dim=-2)
        assert (error <= eps * (16 + length)).all(), f"triplets are off by {error.max() / eps:.1f} roundings"
    # A vector whose value is separated by a gap agrees with LAPACK's, and so does the span of all
    # vectors. For the larger side the gap to the values 0 of its null space counts too.
    squares = (all_s / largest) ** 2
    distance = (squares[..., None, :] - squares[..., :k, None]).abs()
    distance[..., torch.arange(k), torch.arange(k)] = 1.0
    distance = distance.amin(-1)  # [..., k]
    for computed, true, larger in ((u, true_u, m > n), (v, true_v, n > m)):
        gap = torch.minimum(distance, squares[..., :k]) if larger else distance
        error = (computed - true * (computed * true).sum(-2, keepdim=True)).norm(dim=-2)
        noise = eps * (16 + length) / gap.clamp_min(1e-300)
        assert (error <= noise.clamp(max=2)).all(), f"a vector is off by {(error / noise).max():.1f} of what its gap allows"
        after = squares[..., k] if k < all_s.shape[-1] else torch.zeros_like(squares[..., 0])
        if k < computed.shape[-2]:
            gap = (squares[..., k - 1] - after).clamp_min(1e-300)
            outside = torch.linalg.matrix_norm(computed - true @ (true.mT @ computed))
            assert (outside <= (eps * (16 + length) * k**0.5 / gap).clamp(max=2 * k**0.5)).all()


def check_signs(v):
    """Check that the first entry of largest magnitude of every column is positive.

    Entries within 1e-4 of the largest count as equal, up to rounding.
    """
    magnitude = v.abs()
    firsts = [(magnitude >= bound * magnitude.amax(-2, keepdim=True)).int().argmax(-2, keepdim=True) for bound in (1 - 1e-4 - 1e-6, 1 - 1e-4 + 1e-6)]
    assert ((v.gather(-2, firsts[0]) > 0) | (v.gather(-2, firsts[1]) > 0)).all()


def check_omitted_matrices(svd, batch, shape, k, dtype):
    """Check the gradient if a loss omits the results of matrices with a NaN or infinity.

    The gradient of these matrices is 0, and that of the others does not change.
    """
    x = torch.randn(batch, *shape, dtype=dtype, device=svd.device)
    bad = [1, batch - 1]
    gradients = []
    for broken in (False, True):
        given = x.clone()
        if broken:
            given[1, 2, 1], given[-1, 0, 0] = float("nan"), -float("inf")
        given.requires_grad_()
        u, s, v = svd(given, k, return_u=True)
        keep = torch.ones(batch, dtype=torch.bool, device=x.device)
        keep[bad] = False
        waves = (torch.cos(torch.arange(t[0].numel(), device=x.device)).view(t[0].shape).to(dtype) for t in (u, s, v))
        kept = (torch.where(keep.view(-1, *(1,) * (t.dim() - 1)), t, 0) * wave for t, wave in zip((u, s, v), waves, strict=True))
        sum(t.sum() for t in kept).backward()
        gradients.append(given.grad)
    assert torch.equal(*(g[keep] for g in gradients))
    assert gradients[0][keep].any()
    assert not gradients[1][bad].any()
