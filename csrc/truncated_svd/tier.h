// The choice between the ways to decompose a matrix, by shape, with the measurements behind it.
#pragma once

#include "matrices.h"

namespace kdkernels::truncated_svd {

// direct: Gram matrix and tridiagonal form (direct.h, eigen.h); krylov: block Lanczos on M
// (krylov.h); jacobi: rotations (jacobi.h).
enum class Tier { direct, krylov, jacobi };

// Microseconds per matrix on one thread, direct / Krylov, for feature maps of a random network with
// ReLU; AVX-512 on Zen 4 (kdkernels::_svd_tier):
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
// The Krylov tier takes longer for spectra with smaller gaps; in the worst case it gives up after
// most of the time of a direct decomposition. It is therefore chosen only if it is faster by a
// clear margin. In double, it needs too many steps to reach a residual of the size of a rounding
// error.
//
// The Jacobi tier is for very small matrices of which most triplets are wanted: their Gram matrices
// are usually ill-conditioned, and would be computed in vain. Microseconds for 256 matrices of any
// spectrum, direct / Jacobi; AVX2 on Zen 3:
//
//                    k = p / 2                k = p
//    4 x  4 float    110 to 330 / 250-330     280 to  490 / 270- 350
//    8 x  8 float    240 to 660 / 760-910     750 to 1250 / 820- 970
//    8 x  8 double   440 to 1180 / 410-890    1200 to 1430 / 470- 960
//   16 x 16 float    670 to 2050 / 3500-5300  2700 to 4100 / 3700-5400
//   16 x 16 double   1510 to 6100 / 1200-5300 4600 to 7700 / 1600-6100
template <typename T>
Tier tier_for(const Matrices& m, int64_t k) {
  const bool is_double = sizeof(T) == 8, most = is_double && m.p > 8 ? 4 * k >= 3 * m.p : 2 * k > m.p;
  if (m.p <= (is_double ? 16 : 8) && m.q <= 8 * m.p && most) return Tier::jacobi;
  if (is_double || k > 8) return Tier::direct;
  const int64_t min_side = k == 1 ? 80 : k == 2 ? 112 : k <= 4 ? 160 : 300;
  return m.p >= min_side ? Tier::krylov : Tier::direct;
}

}  // namespace kdkernels::truncated_svd
