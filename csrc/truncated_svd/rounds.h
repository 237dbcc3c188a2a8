// Triplets of double matrices whose kept values span orders of magnitude. A Gram matrix gives sigma_j to a rounding of sigma_1^2 / sigma_j,
// and double has no wider type to square in. So a round takes the values down to kIllConditioned of its largest from the Gram matrix of
// what is left, M - A A^T M with the vectors A of the rounds before, which is as exact as M is: errors are a rounding of sigma_1, those of
// LAPACK. What a matrix gives depends neither on its neighbours nor on threads, which LAPACK's does.
#pragma once

#include "decomposition.h"

namespace kdkernels::truncated_svd {

// out [count, q] = A^T M for a [count, p] and m [p, q].
inline void transposed_product(const double* m, int64_t p, int64_t q, const double* a, int64_t count, double* out) {
  std::fill(out, out + count * q, 0.0);
  for (int64_t i = 0; i < p; ++i)
    for (int64_t j = 0; j < count; ++j) {
      const double factor = a[j * p + i], *row = m + i * q;
      for (int64_t c = 0; c < q; ++c) out[j * q + c] += factor * row[c];
    }
}

inline Triplets by_rounds(const Tensor& x, int64_t k, bool wants_b) {
  const bool tall = x.size(-2) >= x.size(-1);
  const Tensor m = (tall ? x.transpose(-1, -2) : x).contiguous();  // [n, p, q]
  const int64_t n = m.size(0), p = m.size(1), q = m.size(2);
  const auto options = m.options();
  const Tensor a = at::empty({n, k, p}, options), b = at::empty({n, k, q}, options), s = at::empty({n, k}, options);
  double *all_a = a.mutable_data_ptr<double>(), *all_b = b.mutable_data_ptr<double>(), *all_s = s.mutable_data_ptr<double>();
  const double* all_m = m.const_data_ptr<double>();
  std::vector<int64_t> found(n);
  for (;;) {
    // Matrices that have found as many are a batch: each asks for the rest of its own.
    const int64_t before = *std::min_element(found.begin(), found.end()), wanted = k - before;
    if (wanted == 0) break;
    std::vector<int64_t> which;
    for (int64_t i = 0; i < n; ++i)
      if (found[i] == before) which.push_back(i);
    const Tensor left = m.index_select(0, index_of(which));
    double* all_left = left.mutable_data_ptr<double>();
    const auto count = static_cast<int64_t>(which.size());
    if (before > 0)
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const double* own = all_a + which[i] * k * p;
          double* along = all_b + which[i] * k * q;
          transposed_product(all_m + which[i] * p * q, p, q, own, before, along);
          for (int64_t r = 0; r < p; ++r)
            for (int64_t j = 0; j < before; ++j) {
              double* row = all_left + (i * p + r) * q;
              for (int64_t c = 0; c < q; ++c) row[c] -= own[j * p + r] * along[j * q + c];
            }
        }
      });
    const Triplets round = Decomposition<double>(left.transpose(-1, -2), wanted, false, false, false, false, Tier::direct).run();
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double *own = all_a + which[i] * k * p, *sigma = all_s + which[i] * k;
        std::copy_n(round.v.const_data_ptr<double>() + i * wanted * p, wanted * p, own + before * p);
        std::copy_n(round.s.const_data_ptr<double>() + i * wanted, wanted, sigma + before);
        for (int64_t j = before; before > 0 && j < k; ++j)
          if (orthogonalize(own, j, p) == 0) complete(own, j, p);
        const double first = sigma[before];
        const bool rounding = before > 0 && !(first > 4 * std::numeric_limits<double>::epsilon() * sigma[0]);
        int64_t exact = 1;
        while (exact < wanted && (rounding || !(first > 0) || sigma[before + exact] >= kIllConditioned * first)) ++exact;
        found[which[i]] = before + exact;
      }
    });
  }
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      transposed_product(all_m + i * p * q, p, q, all_a + i * k * p, k, all_b + i * k * q);
      normalize_triplets(k, all_b + i * k * q, q, all_s + i * k);
      std::sort(all_s + i * k, all_s + (i + 1) * k, std::greater<double>());
    }
  });
  const Tensor none = at::empty({0, k, x.size(-2)}, options);
  return {!wants_b ? none : tall ? b : a, s, tall ? a : b, {}};
}

}  // namespace kdkernels::truncated_svd
