// The term of a class whose probabilities differ little between the networks.
#pragma once

#include "../common/gpu.h"

namespace kdkernels::temperature_kl {

// (e^y - 1 - y) / y^2 for |y| <= 1, of a number or a vector. The coefficients minimise the largest
// relative error, which is 1e-8 in float32. In base 2, for t = y / log(2): (2^t - 1 - t log(2)) / t^2.
template <bool base_2, typename V>
KDKERNELS_GPU V convex_polynomial(V y) {
  constexpr double u = base_2 ? 0.6931471805599453 : 1, u2 = u * u, u4 = u2 * u2;
  V sum = y * float(2.7722836e-06 * u4 * u4 * u) + float(2.535483e-05 * u4 * u4);
  sum = sum * y + float(1.9844023e-04 * u4 * u2 * u);
  sum = sum * y + float(1.3885451e-03 * u4 * u2);
  sum = sum * y + float(8.3333105e-03 * u4 * u);
  sum = sum * y + float(4.1666735e-02 * u4);
  sum = sum * y + float(1.6666667e-01 * u2 * u);
  return sum * y + float(0.5 * u2);
}

}  // namespace kdkernels::temperature_kl
