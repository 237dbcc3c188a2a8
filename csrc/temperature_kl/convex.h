// The term of a class whose probabilities differ little between the networks.
#pragma once

#include "../common/gpu.h"

namespace kdkernels::temperature_kl {

// (e^y - 1 - y) / y^2 for |y| <= 1, of a number or a vector. The coefficients minimise the largest
// relative error, which is 1e-8 in float32.
template <typename V>
KDKERNELS_GPU V convex_polynomial(V y) {
  V sum = y * 2.7722836e-06f + 2.535483e-05f;
  sum = sum * y + 1.9844023e-04f;
  sum = sum * y + 1.3885451e-03f;
  sum = sum * y + 8.3333105e-03f;
  sum = sum * y + 4.1666735e-02f;
  sum = sum * y + 1.6666667e-01f;
  return sum * y + 0.5f;
}

// (2^t - 1 - t log(2)) / t^2 for |t| <= 1 / log(2): the same polynomial of y = t log(2).
KDKERNELS_GPU float convex_polynomial_base_2(float t) {
  float sum = t * 1.02392185e-07f + 1.35102812e-06f;
  sum = sum * t + 1.525485e-05f;
  sum = sum * t + 1.53997171e-04f;
  sum = sum * t + 1.33335218e-03f;
  sum = sum * t + 9.61814448e-03f;
  sum = sum * t + 5.55041097e-02f;
  return sum * t + 2.40226507e-01f;
}

}  // namespace kdkernels::temperature_kl
