"""Accurate elementary functions in float32 and float64, as in csrc/common/simd.h."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cast_scalar(value, COMPUTE: tl.constexpr):
    """Convert a scalar argument of a kernel to the dtype COMPUTE.

    Annotate the argument as tl.float64, because Triton passes other floats as float32. ``.to()``
    cannot be used, because in the interpreter scalar arguments do not have it.
    """
    return tl.full([], value, COMPUTE)


@triton.jit
def divide(a, b):
    """Compute a / b, rounded to nearest.

    By default Triton divides float32 numbers approximately, and the compiler may fuse the quotient
    with a later subtraction, so that x / y - x / y is not 0.
    """
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(a):
    """Compute the square root, rounded to nearest. By default it is approximate in float32."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def exp_parts(y):
    """Split e^y = scale (1 + r + h) into scale, r and h.

    scale is a power of two, |r| <= ln2 / 2 and h = e^r - 1 - r. For small y, scale is 1 and r is y.
    """
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
def exp2_parts(t):
    """Split 2^t = scale (1 + r + h), as exp_parts, for t in [-infinity, 126].

    Adding 1.5 * 2^23 rounds t to an integer, whose low bits are then the exponent of the scale.
    """
    t = tl.maximum(t, -126.0)
    shifted = t + 12582912.0
    f = t - (shifted - 12582912.0)
    scale = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    # ln(2)^n / n!
    series = 1.3333558146e-3 + f * (1.5403530393e-4 + f * 1.5252733804e-5)
    series = 0.2402265069591 + f * (5.5504108664822e-2 + f * (9.6181291076285e-3 + f * series))
    return scale, f * LN2, (f * f) * series


@triton.jit
def exp_nonpositive(y):
    """Compute e^y for y <= 0 or NaN.

    The result is accurate to the last digits. The hardware's exponential is less accurate for large
    |y|.
    """
    lowest: tl.constexpr = -708.0 if y.dtype == tl.float64 else -87.0
    scale, r, h = exp_parts(y)
    return tl.where(y < lowest, 0.0, scale + scale * (r + h))


@triton.jit
def log(u):
    """Compute log(u) with a small relative error, also near u = 1.

    In float32 the hardware's logarithm has only a small absolute error there.
    """
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
    """Compute log(1 + x), correcting the rounding of 1 + x to first order."""
    u = 1.0 + x
    correction = tl.where((u > 0.0) & (u < float("inf")), ((u - 1.0) - x) / u, 0.0)
    return log(u) - correction


@triton.jit
def centred_kl(convex, drift, w):
    """Compute drift + log(1 + w) for w = convex - drift.

    For small w the series of w - log(1 + w) is used.
    """
    series = tl.full(w.shape, 1.0 / 12, w.dtype)
    for k in tl.static_range(10):
        series = 1.0 / (11 - k) - w * series
    kl = tl.where(tl.abs(w) < 0.03, convex - w * w * series, drift + log1p(w))
    return tl.where(kl < 0.0, 0.0, kl)
