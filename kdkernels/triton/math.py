"""Elementary functions that keep their digits, the same in float32 and float64 (see csrc/simd.h)."""

import triton
import triton.language as tl


@triton.jit
def exp_parts(y):
    """e^y = scale (1 + r + h), scale a power of two, |r| <= ln2 / 2, h = e^r - 1 - r; scale is 1 and r is y for small y. y is kept in range."""
    n = tl.floor(y * 1.4426950408889634 + 0.5)
    h = tl.full(y.shape, 1.0, y.dtype)
    if y.dtype == tl.float64:
        n = tl.maximum(n, -1020.0)
        r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
        for k in tl.static_range(12):
            h = 1.0 + h * (r * (1.0 / (14 - k)))
    else:
        n = tl.maximum(n, -125.0)
        r = (y - n * 0.693359375) + n * 2.12194440e-4
        for k in tl.static_range(5):
            h = 1.0 + h * (r * (1.0 / (7 - k)))
    return tl.exp2(n), r, h * r * r * 0.5


@triton.jit
def log1p(x):
    """log(1 + x); the rounding of 1 + x is given back to first order."""
    u = 1.0 + x
    lost = tl.where((u > 0.0) & (u < float("inf")), ((u - 1.0) - x) / u, 0.0)
    return tl.log(u) - lost


@triton.jit
def centred_kl(convex, drift, w):
    """drift + log(1 + w) with w = convex - drift, from the series of w - log(1 + w) where w is small."""
    series = tl.full(w.shape, 1.0 / 12, w.dtype)
    for k in tl.static_range(10):
        series = 1.0 / (11 - k) - w * series
    kl = tl.where(tl.abs(w) < 0.03, convex - w * w * series, drift + log1p(w))
    return tl.where(kl < 0.0, 0.0, kl)
