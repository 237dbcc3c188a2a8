// Which tier decomposes which shape.
#pragma once

#include "matrices.h"

namespace kdkernels::truncated_svd {

enum class Tier { direct, krylov };

template <typename T>
Tier tier_for(const Matrices& m, int64_t k) {
  const bool krylov = sizeof(T) == 4 && k <= 8 && (m.p > 256 || (m.p >= 112 && k <= 2) || (m.p >= 176 && k <= 4));
  return krylov ? Tier::krylov : Tier::direct;
}

}  // namespace kdkernels::truncated_svd
