"""Values and gradients of temperature_kl, from the divergence of a tile of rows.

p and q are the probabilities of the base and the other network. docs/temperature_kl.md and
csrc/temperature_kl/forms.h explain the values and gradients:
    KL                    V = KL(p || q)
    with eps              V = sum (p + eps) (log(p + eps) - log q)
    without entropy       V = -sum (p + eps) log q
    Jensen-Shannon        V = beta KL(p || M) + (1 - beta) KL(q || M),  M = beta p + (1 - beta) q
The gradients are dV / d(other / T), and T times dV / d(base / T), which is a mean of differences of
logits. The latter, and T V, are divided by 4, like the logits in divergence().
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .math import exp_nonpositive, exp_parts, log, log1p
from .temperature_kl_divergence import excess
from .temperature_kl_rows import block_logits

# Values, and sums of logits times gradients, are stored multiplied by this factor, so that they do
# not overflow if logits are close to the largest finite number.
SUM_UNIT = tl.constexpr(2.0**-12)


class KLMeans(NamedTuple):
    """The value of a row and the means for the gradient of the base logits, [ROWS, 1]."""

    value: tl.tensor  # T V times SUM_UNIT
    base: tl.tensor  # E_p[base - max]
    eps_term: tl.tensor  # T E_p[log(1 + eps / p)]


class JSDMeans(NamedTuple):
    """The value of a row and the means for the gradients of the JSD, [ROWS, 1]."""

    value: tl.tensor  # T V times SUM_UNIT
    log_p_ratio: tl.tensor  # E_p[log(p / M)]
    log_q_ratio: tl.tensor  # E_q[log(q / M)]
    # The sums of the gradients of all classes except one with a probability above 1/2. The gradient
    # of that class is the negative of the sum. Direct computation would be inaccurate, because the
    # mean that is subtracted from its term is nearly equal to this term.
    minority_base: tl.tensor
    minority_other: tl.tensor


class JSDTerms(NamedTuple):
    """The terms of each class, [ROWS, BLOCK]."""

    p: tl.tensor
    q: tl.tensor
    log_p_ratio: tl.tensor  # log(p / M)
    log_q_ratio: tl.tensor  # log(q / M)
    p_psi: tl.tensor  # p psi(a u), terms of E_p[log(p / M)]
    q_psi: tl.tensor  # q psi(beta v), terms of E_q[log(q / M)]


@triton.jit
def _probability(base, in_row, d, inverse_t):
    return tl.where(in_row, exp_nonpositive((base - d.base_max) * inverse_t), 0.0) * d.inverse_sum


@triton.jit
def _zero_gradient(d):
    """Return the gradient of a class without probability: 0, but NaN in a row with a NaN."""
    return tl.where(d.kl == d.kl, 0.0, float("nan"))


@triton.jit
def _sum_rows(terms, in_row):
    return tl.sum(tl.where(in_row, terms, 0.0), 1, keep_dims=True)


@triton.jit
def _log_1_plus_eps_over(p, log_weight, d, eps):
    """Compute log(1 + eps / p) without cancellation. log_weight = (base - max) / T."""
    return tl.where(p > eps, log1p(eps / p), log(p + eps) - (log_weight - d.log_base_sum))


@triton.jit
def kl_means(
    tile, held, d, eps, HAS_EPS: tl.constexpr, ENTROPY: tl.constexpr, COMPUTE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute the value: that of the divergence, plus the terms of eps and of the entropy."""
    mean_base, mean_eps_term = tl.zeros(d.kl.shape, COMPUTE), tl.zeros(d.kl.shape, COMPUTE)
    added = tl.zeros(d.kl.shape, COMPUTE)
    value = d.kl * SUM_UNIT
    if HAS_EPS or not ENTROPY:
        for start in range(0, tile.classes, BLOCK):
            base, other, in_row = block_logits(tile, held, start, COMPUTE, ONE_BLOCK, BLOCK)
            p = _probability(base, in_row, d, tile.inverse_t)
            relative = base - d.base_max
            mean_base += tl.sum(tl.where(p == 0.0, 0.0, p * relative), 1, keep_dims=True)
            if HAS_EPS:
                near_log_q = ((other - d.other_center) + (d.base_center - d.base_max)) + (d.shift - d.log_base_sum) * tile.quarter_t
                log_q = tl.where(d.far_apart, (other - d.other_max) - d.log_other_sum * tile.quarter_t, near_log_q)
                eps_term = tl.where(p == 0.0, 0.0, p * _log_1_plus_eps_over(p, relative * tile.inverse_t, d, eps) * tile.quarter_t)
                mean_eps_term += tl.sum(eps_term, 1, keep_dims=True)
                by_eps = eps_term + eps * (log(p + eps) * tile.quarter_t - log_q) if ENTROPY else -eps * log_q
                added += _sum_rows(by_eps * SUM_UNIT, in_row)
        value += added
        if not ENTROPY:
            value += (d.log_base_sum * tile.quarter_t - mean_base) * SUM_UNIT
    return KLMeans(value, mean_base, mean_eps_term)


@triton.jit
def kl_gradients(base, other, in_row, tile, d, means, eps, HAS_EPS: tl.constexpr, ENTROPY: tl.constexpr):
    """Compute the gradients of a block with respect to the base and the other logits."""
    terms = excess(base, other, in_row, d, tile.inverse_t)
    p, relative = terms.weight * d.inverse_sum, base - d.base_max
    far_q = tl.exp((other - d.other_max) * tile.inverse_t) / d.other_sum
    growth = tl.where(d.far_apart, far_q * d.base_sum - terms.weight, terms.growth)
    grad_other = (growth - d.w * terms.weight) * d.inverse_sum / (1.0 + d.w)  # q - p
    if HAS_EPS:
        grad_other += eps * (tile.classes * (p + grad_other) - 1.0)
    log_ratio = (terms.difference - d.mean) - d.drift * tile.quarter_t
    if not ENTROPY:
        log_ratio = log_ratio - (relative - means.base)
    elif HAS_EPS:
        log_ratio = log_ratio + _log_1_plus_eps_over(p, relative * tile.inverse_t, d, eps) * tile.quarter_t - means.eps_term
    return tl.where(p == 0.0, _zero_gradient(d), p * log_ratio), grad_other


@triton.jit
def _log_and_psi(x, one_plus_x):
    """Compute log(1 + x), psi(x) = x - log(1 + x), and whether psi is computed from the series.

    The argument one_plus_x is used if x is close to -1, where 1 + x would be inaccurate.
    """
    one = tl.where(x > -0.25, 1.0 + x, one_plus_x)
    near = tl.abs(x) < 0.29
    small_x = tl.where(near, x, 0.0)
    s = small_x / (2.0 + small_x)  # log(1 + x) = 2 atanh(s)
    s2 = s * s
    terms: tl.constexpr = 11 if x.dtype == tl.float64 else 5
    series = tl.full(x.shape, 1.0 / (2 * terms + 1), x.dtype)
    for k in tl.static_range(terms - 1):
        series = series * s2 + 1.0 / (2 * (terms - 1 - k) + 1)
    rest = 2.0 * s * s2 * series
    result = tl.where(near, 2.0 * s + rest, log(one))
    return result, tl.where(near, small_x * s - rest, x - result), near


@triton.jit
def _jsd_terms(base, other, in_row, tile, d, beta):
    """Compute the terms of a block, as in csrc/temperature_kl/jsd.h.

    u = q / p - 1, v = p / q - 1, a = 1 - beta and b = beta.
    """
    tiny: tl.constexpr = 2.3e-308 if base.dtype == tl.float64 else 1.2e-38
    limit: tl.constexpr = 708.0 if base.dtype == tl.float64 else 87.0
    a, b = tl.maximum(tl.full([], 1.0 - beta, base.dtype), tiny), tl.maximum(tl.full([], beta, base.dtype), tiny)
    p = _probability(base, in_row, d, tile.inverse_t)
    log_ratio = ((base - d.base_center) - (other - d.other_center)) * tile.inverse_t - d.shift  # log(p / q)
    scale, r, h = exp_parts(tl.maximum(-limit, tl.minimum(limit, -log_ratio)))
    u = scale * (r + h) + (scale - 1.0)
    ratio = scale * (r + h) + scale
    inverse = 1.0 / ratio
    v = -u * inverse
    # q is p times the ratio. If p is too small for this, q is computed from the exponent; if the
    # networks are far apart, from the log-sum-exp of the other network.
    near_log_q = ((other - d.other_center) + (d.base_center - d.base_max)) * tile.inverse_t + (d.shift - d.log_base_sum)
    exponent = tl.where(d.far_apart, (other - d.other_max) * tile.inverse_t, near_log_q)
    q_from_exponent = tl.exp(tl.minimum(exponent, limit, propagate_nan=tl.PropagateNan.ALL)) * tl.where(d.far_apart, 1.0 / d.other_sum, 1.0)
    q = tl.where(d.far_apart | ~(log_ratio > -16.0), q_from_exponent, p * ratio)
    log_m_p, psi_p, near_p = _log_and_psi(a * u, b + a * ratio)  # log(M / p)
    log_m_q, psi_q, near_q = _log_and_psi(b * v, a + b * inverse)
    p_psi = tl.where(near_p, p * psi_p, a * (q - p) - p * log_m_p)
    q_psi = tl.where(near_q, q * psi_q, b * (p - q) - q * log_m_q)
    p_psi = tl.where(p == 0.0, a * q, p_psi)
    q_psi = tl.where(q == 0.0, b * p, q_psi)
    return JSDTerms(p, q, -log_m_p, -log_m_q, p_psi, q_psi)


@triton.jit
def _jsd_minority(tile, held, d, beta, mean_p, mean_q, COMPUTE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the gradients of the base and the other logits over classes of probability <= 1/2."""
    grad_base, grad_other = tl.zeros(mean_p.shape, COMPUTE), tl.zeros(mean_p.shape, COMPUTE)
    a, b = tl.full([], 1.0 - beta, COMPUTE), tl.full([], beta, COMPUTE)
    for start in range(0, tile.classes, BLOCK):
        base, other, in_row = block_logits(tile, held, start, COMPUTE, ONE_BLOCK, BLOCK)
        terms = _jsd_terms(base, other, in_row, tile, d, beta)
        p, q = terms.p, terms.q
        grad_other += _sum_rows(a * q * (terms.log_q_ratio - mean_q), in_row & (q <= 0.5) & (q > 0.0))
        grad_base += _sum_rows(b * p * (terms.log_p_ratio - mean_p), in_row & (p <= 0.5) & (p > 0.0))
    return grad_base, grad_other


@triton.jit
def jsd_means(
    tile, held, d, beta, GRADIENTS: tl.constexpr, COMPUTE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute the value of the JSD and, with GRADIENTS, the means for the gradients."""
    mean_p, mean_q = tl.zeros(d.kl.shape, COMPUTE), tl.zeros(d.kl.shape, COMPUTE)
    largest_probability = tl.zeros(d.kl.shape, COMPUTE)
    for start in range(0, tile.classes, BLOCK):
        base, other, in_row = block_logits(tile, held, start, COMPUTE, ONE_BLOCK, BLOCK)
        terms = _jsd_terms(base, other, in_row, tile, d, beta)
        block_largest = tl.max(tl.where(in_row, tl.maximum(terms.p, terms.q), 0.0), 1, keep_dims=True)
        largest_probability = tl.maximum(largest_probability, block_largest)
        mean_p += _sum_rows(terms.p_psi, in_row)
        mean_q += _sum_rows(terms.q_psi, in_row)
    a, b = tl.full([], 1.0 - beta, COMPUTE), tl.full([], beta, COMPUTE)
    value = (b * mean_p + a * mean_q) * (tile.quarter_t * SUM_UNIT)
    minority_base, minority_other = tl.zeros(d.kl.shape, COMPUTE), tl.zeros(d.kl.shape, COMPUTE)
    if GRADIENTS:  # noqa: SIM102 - evaluated at compile time
        if tl.max(tl.max(largest_probability, 1), 0) > 0.5:
            minority_base, minority_other = _jsd_minority(tile, held, d, beta, mean_p, mean_q, COMPUTE, ONE_BLOCK, BLOCK)
    return JSDMeans(value, mean_p, mean_q, minority_base, minority_other)


@triton.jit
def jsd_gradients(base, other, in_row, tile, d, means, beta):
    """Compute the gradients of a block with respect to the base and the other logits."""
    terms = _jsd_terms(base, other, in_row, tile, d, beta)
    a, b = tl.full([], 1.0 - beta, base.dtype), tl.full([], beta, base.dtype)
    p, q = terms.p, terms.q
    grad_base = tl.where(p == 0.0, _zero_gradient(d), b * p * (terms.log_p_ratio - means.log_p_ratio))
    grad_other = tl.where(q == 0.0, _zero_gradient(d), a * q * (terms.log_q_ratio - means.log_q_ratio))
    grad_base = tl.where(p > 0.5, -means.minority_base, grad_base) * tile.quarter_t
    return grad_base, tl.where(q > 0.5, -means.minority_other, grad_other)
