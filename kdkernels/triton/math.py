"""Elementary functions that keep their digits, the same in float32 and float64 (see csrc/common/simd.h)."""

import triton
import triton.language as tl


@triton.jit
def number(value, COMPUTE: tl.constexpr):
    """A scalar argument of a kernel as COMPUTE. Annotate it tl.float64: Triton passes other floats as float32. In the interpreter it has no .to()."""
    return tl.full([], value, COMPUTE)


@triton.jit
def exp_parts(y):
    """e^y = scale (1 + r + h), scale a power of two, |r| <= ln2 / 2, h = e^r - 1 - r; scale is 1 and r is y for small y."""
    lowest: tl.constexpr = -708.0 if y.dtype == tl.float64 else -87.0
    y = tl.maximum(y, lowest, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(y * 1.4426950408889634 + 0.5)
    h = tl.full(y.shape, 1.0, y.dtype)
    if y.dtype == tl.float64:
        r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
        for k in tl.static_range(12):
            h = 1.0 + h * (r * (1.0 / (14 - k)))
        scale = tl.exp2(n)
    else:
        r = (y - n * 0.693359375) + n * 2.12194440e-4
        for k in tl.static_range(5):
            h = 1.0 + h * (r * (1.0 / (7 - k)))
        scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return scale, r, h * r * r * 0.5


@triton.jit
def exp_falling(y):
    """e^y for y <= 0, or NaN; to the last digits, where the hardware's exponential loses them with growing |y|."""
    lowest: tl.constexpr = -708.0 if y.dtype == tl.float64 else -87.0
    scale, r, h = exp_parts(y)
    return tl.where(y < lowest, 0.0, scale + scale * (r + h))


@triton.jit
def log(u):
    """log(u); in float32 relative to the result also near 1, where the hardware's logarithm is accurate only absolutely."""
    if u.dtype == tl.float64:
        return tl.log(u)
    else:
        offset = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2)
        n = (offset >> 23).to(tl.float32)
        m = ((offset & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
        x = (m - 1.0) / (m + 1.0)
        x2 = x * x
        series = 0.3333333333 + x2 * (0.2 + x2 * (0.1428571429 + x2 * (0.1111111111 + x2 * 0.0909090909)))
        result = (2.0 * x * x2 * series - n * 2.12194440e-4 + 2.0 * x) + n * 0.693359375
        return tl.where((u > 0.0) & (u < float("inf")), result, tl.log(u))


@triton.jit
def log1p(x):
    """log(1 + x); the rounding of 1 + x is given back to first order."""
    u = 1.0 + x
    lost = tl.where((u > 0.0) & (u < float("inf")), ((u - 1.0) - x) / u, 0.0)
    return log(u) - lost


@triton.jit
def centred_kl(convex, drift, w):
    """drift + log(1 + w) with w = convex - drift, from the series of w - log(1 + w) where w is small."""
    series = tl.full(w.shape, 1.0 / 12, w.dtype)
    for k in tl.static_range(10):
        series = 1.0 / (11 - k) - w * series
    kl = tl.where(tl.abs(w) < 0.03, convex - w * w * series, drift + log1p(w))
    return tl.where(kl < 0.0, 0.0, kl)
