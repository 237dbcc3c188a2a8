// Which tier decomposes which shape.
#pragma once

#include "matrices.h"

namespace kdkernels::truncated_svd {

enum class Tier { direct, krylov };

// Microseconds of a matrix on one thread, direct / Krylov: maps of a random network with ReLU, AVX-512 on Zen 4 (kdkernels::_svd_tier).
//
//     q x p        k = 1         k = 2         k = 4         k = 8
//   196 x  96     50 /  21      53 /  59      54 / 126      65 /  254
//   256 x 112     64 /  19      69 /  60      83 / 135      82 /  288
//   196 x 160    137 /  35     141 /  77     190 / 160     201 /  388
//   196 x 196    231 /  47     230 /  95     248 / 182     258 /  469
//   256 x 256    494 /  63     491 / 119     499 / 231     556 /  721
//   784 x 320   1590 / 222    1610 / 460    1672 / 609    1689 / 1568
//   784 x 512   5508 / 413    5336 / 860    5151 /1003    5459 / 3225
//
// Spectra with smaller gaps take the Krylov tier longer, at worst to be given up after most of the time of a direct decomposition, so it
// has to be ahead by more than a little. In double, a residual of rounding takes it too many steps.
template <typename T>
Tier tier_for(const Matrices& m, int64_t k) {
  if (sizeof(T) == 8 || k > 8) return Tier::direct;
  const int64_t from = k == 1 ? 80 : k == 2 ? 112 : k <= 4 ? 160 : 300;
  return m.p >= from ? Tier::krylov : Tier::direct;
}

}  // namespace kdkernels::truncated_svd
