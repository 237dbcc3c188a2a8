"""KL(base || other) of a tile of rows, in the centred form of docs/temperature_kl.md.

With p = softmax(base / T), d = base - other, a center m close to E_p[d] and y = (m - d) / T:
    w  = E_p[e^y] - 1 = E_p[e^y - 1 - y] - drift
    KL = drift + log(1 + w)
with drift = E_p[-y], which is not 0 only because m is rounded. The sums over the classes are
accumulated block by block. They use the weights e = exp((base - max) / T) instead of p, and are
divided by the sum of the weights at the end. All values per row have the shape [ROWS, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .math import centred_kl, exp_nonpositive, exp_parts, log
from .temperature_kl_rows import block_logits


class Center(NamedTuple):
    """The values subtracted from logits and from their differences before the exponential."""

    base_max: tl.tensor  # the largest logit, or 0 while all are -inf
    # Subtracted from the logits before differences: 0, or the maxima if these are far apart.
    base_center: tl.tensor
    other_center: tl.tensor
    mean: tl.tensor  # m


class _Sums(NamedTuple):
    """The sums over the blocks processed so far."""

    base_max: tl.tensor  # -inf while no finite logit has been seen
    base_sum: tl.tensor  # sum of e
    other_max: tl.tensor
    other_sum: tl.tensor  # sum of exp((other - other_max) / T)
    base_center: tl.tensor
    other_center: tl.tensor
    mean: tl.tensor
    convex: tl.tensor  # sum of e (e^y - 1 - y)
    drift: tl.tensor  # sum of -e y
    overflow: tl.tensor  # whether the convex sum of a block overflowed


class Divergence(NamedTuple):
    """KL(base || other) and values for its gradients. The first four fields are those of Center."""

    base_max: tl.tensor
    base_center: tl.tensor
    other_center: tl.tensor
    mean: tl.tensor
    other_max: tl.tensor
    base_sum: tl.tensor
    other_sum: tl.tensor
    inverse_sum: tl.tensor  # 1 / base_sum
    log_base_sum: tl.tensor
    log_other_sum: tl.tensor
    drift: tl.tensor
    w: tl.tensor
    kl: tl.tensor  # T KL / 4
    shift: tl.tensor  # log p_base - log p_other = d / T - shift
    far_apart: tl.tensor  # the row is computed from two log-sum-exps, because e^y would overflow


class Excess(NamedTuple):
    """The terms of a block [ROWS, BLOCK]; 0 for columns that are not classes."""

    weight: tl.tensor  # e
    difference: tl.tensor  # d
    growth: tl.tensor  # e (e^y - 1)
    convex: tl.tensor  # e (e^y - 1 - y)
    linear: tl.tensor  # e y


@triton.jit
def _bounded_exp(exponent):
    """Compute exp, with the exponent limited so that the result is finite. NaN stays NaN."""
    highest: tl.constexpr = 709.0 if exponent.dtype == tl.float64 else 88.0
    return tl.exp(tl.minimum(exponent, highest, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def excess(base, other, in_row, center, inverse_t):
    """Compute the terms of a block; `center` is a Center or a Divergence."""
    weight = tl.where(in_row, exp_nonpositive((base - center.base_max) * inverse_t), 0.0)
    difference = (base - center.base_center) - (other - center.other_center)
    y = (center.mean - difference) * inverse_t
    scale, r, h = exp_parts(tl.minimum(y, 17.0, propagate_nan=tl.PropagateNan.ALL))
    linear = tl.where(weight == 0.0, 0.0, weight * y)
    growth = weight * (scale * (r + h) + (scale - 1.0))
    convex = tl.where(weight == 0.0, 0.0, weight * (scale * h + (scale * r + ((scale - 1.0) - y))))
    # For y >= 16, add the exponents of e and e^y instead of multiplying, to avoid an overflow.
    steep = in_row & ~(y < 16.0)
    exponent = ((other - center.other_center) + (center.base_center - center.base_max)) * inverse_t + center.mean * inverse_t
    growth = tl.where(steep, _bounded_exp(exponent) - weight, tl.where(in_row, growth, 0.0))
    convex = tl.where(steep, growth - linear, tl.where(in_row, convex, 0.0))
    return Excess(weight, difference, growth, convex, linear)


@triton.jit
def _running_max(largest, logits, in_row):
    return tl.maximum(largest, tl.max(tl.where(in_row, logits, float("-inf")), 1, keep_dims=True))


@triton.jit
def _finite(largest):
    """Return the maximum, or 0 while it is -inf, so that it can be subtracted."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _recenter(sums, center, inverse_t, shrink, sum_before, mean_before):
    """Convert the sums of convex and drift over earlier blocks to the new center.

    The conversion is exact: y becomes y - delta.
    """
    has_weight = sum_before > 0.0  # some class of an earlier block has a probability > 0
    delta = tl.where(has_weight, (mean_before - center.mean) * inverse_t, 0.0)
    scale, r, h = exp_parts(-delta)
    growth = scale * (r + h) + (scale - 1.0)
    convex = (sums.convex * (1.0 + growth) - sums.drift * growth) * shrink + sum_before * (scale * h + (scale * r + ((scale - 1.0) + delta)))
    drift = sums.drift * shrink + sum_before * delta
    # If all earlier classes have probability 0 in the base network, they only add their probability
    # in the other network.
    exponent = ((_finite(sums.other_max) - center.other_center) + (center.base_center - center.base_max)) * inverse_t + center.mean * inverse_t
    other_alone = tl.where(sums.other_sum == 0.0, 0.0, sums.other_sum * _bounded_exp(exponent))
    return tl.where(has_weight, convex, other_alone), tl.where(has_weight, drift, 0.0)


@triton.jit
def _add_block(sums, base, other, in_row, inverse_t):
    """Add a block to the sums."""
    # The log-sum-exp of the other network, for rows in which the networks are far apart.
    other_max = _running_max(sums.other_max, other, in_row)
    other_offset = _finite(other_max)
    other_shrink = tl.where(sums.other_max == float("-inf"), 0.0, tl.exp((_finite(sums.other_max) - other_offset) * inverse_t))
    other_sum = sums.other_sum * other_shrink + tl.sum(tl.where(in_row, tl.exp((other - other_offset) * inverse_t), 0.0), 1, keep_dims=True)

    base_max = _running_max(sums.base_max, base, in_row)
    base_offset = _finite(base_max)
    shrink = tl.where(sums.base_sum > 0.0, tl.exp((_finite(sums.base_max) - base_offset) * inverse_t), 0.0)
    sum_before = sums.base_sum * shrink

    # The mean of d over all blocks so far. A new center shifts d and its mean by the same amount.
    offsets_differ = ~(tl.abs((base_offset - other_offset) * inverse_t) <= 64.0)
    base_center, other_center = tl.where(offsets_differ, base_offset, 0.0), tl.where(offsets_differ, other_offset, 0.0)
    mean_before = sums.mean - ((base_center - sums.base_center) - (other_center - sums.other_center))
    mean_before = tl.where(sum_before > 0.0, mean_before, 0.0)
    weight = tl.where(in_row, exp_nonpositive((base - base_offset) * inverse_t), 0.0)
    difference = (base - base_center) - (other - other_center)
    base_sum = sum_before + tl.sum(weight, 1, keep_dims=True)
    inverse_sum = tl.where(base_sum == 0.0, 0.0, 1.0 / base_sum)
    block_mean = tl.sum(tl.where(weight == 0.0, 0.0, (weight * inverse_sum) * difference), 1, keep_dims=True)
    mean = sum_before * inverse_sum * mean_before + block_mean

    center = Center(base_offset, base_center, other_center, mean)
    convex, drift = _recenter(sums, center, inverse_t, shrink, sum_before, mean_before)
    block = excess(base, other, in_row, center, inverse_t)
    block_convex = tl.sum(block.convex, 1, keep_dims=True)
    overflow = sums.overflow | ((base_sum > 0.0) & ~((block_convex < 1e30) & (block_convex > -1e30)))
    convex, drift = convex + block_convex, drift - tl.sum(block.linear, 1, keep_dims=True)
    return _Sums(base_max, base_sum, other_max, other_sum, base_center, other_center, mean, convex, drift, overflow)


@triton.jit
def _finish(sums, quarter_t, inverse_t, JSD: tl.constexpr):
    """Compute the divergence from the sums over all blocks."""
    inverse_sum = 1.0 / sums.base_sum
    convex, drift = sums.convex * inverse_sum, sums.drift * inverse_sum
    w = convex - drift
    kl = centred_kl(convex, drift, w)
    # All terms are >= 0. A negative sum means that terms were limited to avoid an overflow.
    far_apart = sums.overflow | ~((convex < 1e30) & (convex > -1.0))
    if JSD:  # for large divergences two log-sum-exps are more accurate than the sums
        far_apart = far_apart | ~(kl <= 1.0)
    base_max, other_max = _finite(sums.base_max), _finite(sums.other_max)
    log_base_sum, log_other_sum = log(sums.base_sum), log(sums.other_sum)
    far_apart_shift = ((base_max - sums.base_center) - (other_max - sums.other_center)) * inverse_t + log_base_sum - log_other_sum
    shift = tl.where(far_apart, far_apart_shift, sums.mean * inverse_t + drift - kl)
    # Log-probabilities are stored times T / 4, because without T they may overflow.
    far_apart_kl = sums.mean - far_apart_shift * quarter_t
    kl = tl.where(far_apart, tl.where(far_apart_kl < 0.0, 0.0, far_apart_kl), kl * quarter_t)
    w, drift = tl.where(far_apart, 0.0, w), tl.where(far_apart, 0.0, drift)
    return Divergence(
        base_max, sums.base_center, sums.other_center, sums.mean, other_max, sums.base_sum, sums.other_sum, inverse_sum, log_base_sum,
        log_other_sum, drift, w, kl, shift, far_apart,
    )  # fmt: skip


@triton.jit
def divergence(tile, held, JSD: tl.constexpr, COMPUTE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Compute KL(base || other) of the rows of a tile.

    For the Jensen-Shannon divergence (JSD), networks with KL > 1 count as far apart.
    """
    zero = tl.zeros(tile.inverse_t.shape, COMPUTE)
    lowest = tl.full(tile.inverse_t.shape, float("-inf"), COMPUTE)
    sums = _Sums(lowest, zero, lowest, zero, zero, zero, zero, zero, zero, zero > 0.0)
    for start in range(0, tile.classes, BLOCK):
        base, other, in_row = block_logits(tile, held, start, COMPUTE, ONE_BLOCK, BLOCK)
        sums = _add_block(sums, base, other, in_row, tile.inverse_t)
    return _finish(sums, tile.quarter_t, tile.inverse_t, JSD)
