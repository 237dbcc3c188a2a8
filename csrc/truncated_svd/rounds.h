// Triplets of float64 matrices whose kept singular values span orders of magnitude. A Gram matrix
// gives sigma_j with a rounding error of sigma_1^2 / sigma_j, and for float64 there is no wider
// dtype in which to square. Therefore each round takes only the singular values down to
// kIllConditioned times its largest one. The next round continues with the Gram matrix of the
// residual M - A A^T M, where A are the vectors of the rounds before; the residual is as accurate
// as M. The errors are one rounding of sigma_1, as those of LAPACK. The results for a matrix do not
// depend on the other matrices or on the number of threads, unlike those of LAPACK.
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

inline Triplets decompose_in_rounds(const Tensor& x, int64_t k, bool needs_b) {
  const bool tall = x.size(-2) >= x.size(-1);
  const Tensor m = (tall ? x.transpose(-1, -2) : x).contiguous();  // [n, p, q]
  const int64_t n = m.size(0), p = m.size(1), q = m.size(2);
  const auto options = m.options();
  const Tensor a = at::empty({n, k, p}, options), b = at::empty({n, k, q}, options), s = at::empty({n, k}, options);
  double *all_a = a.mutable_data_ptr<double>(), *all_b = b.mutable_data_ptr<double>(), *all_s = s.mutable_data_ptr<double>();
  const double* all_m = m.const_data_ptr<double>();
  std::vector<int64_t> found(n);
  for (;;) {
    // The matrices with the smallest number of triplets found form a batch, because all of them
    // need the same number of further triplets.
    const int64_t min_found = *std::min_element(found.begin(), found.end()), wanted = k - min_found;
    if (wanted == 0) break;
    std::vector<int64_t> indices;
    for (int64_t i = 0; i < n; ++i)
      if (found[i] == min_found) indices.push_back(i);
    const Tensor residual = m.index_select(0, index_tensor(indices));
    double* all_residuals = residual.mutable_data_ptr<double>();
    const auto count = static_cast<int64_t>(indices.size());
    if (min_found > 0)
      parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const double* a_vectors = all_a + indices[i] * k * p;
          double* projections = all_b + indices[i] * k * q;
          transposed_product(all_m + indices[i] * p * q, p, q, a_vectors, min_found, projections);
          for (int64_t r = 0; r < p; ++r)
            for (int64_t j = 0; j < min_found; ++j) {
              double* row = all_residuals + (i * p + r) * q;
              for (int64_t c = 0; c < q; ++c) row[c] -= a_vectors[j * p + r] * projections[j * q + c];
            }
        }
      });
    const Triplets round = Decomposition<double>(residual.transpose(-1, -2), wanted, false, false, false, false, Tier::direct).run();
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double *a_vectors = all_a + indices[i] * k * p, *sigma = all_s + indices[i] * k;
        std::copy_n(round.v.const_data_ptr<double>() + i * wanted * p, wanted * p, a_vectors + min_found * p);
        std::copy_n(round.s.const_data_ptr<double>() + i * wanted, wanted, sigma + min_found);
        for (int64_t j = min_found; min_found > 0 && j < k; ++j)
          if (orthogonalize(a_vectors, j, p) == 0) complete_basis(a_vectors, j, p);
        const double first = sigma[min_found];
        const bool only_rounding = min_found > 0 && !(first > 4 * std::numeric_limits<double>::epsilon() * sigma[0]);
        int64_t accurate = 1;
        while (accurate < wanted && (only_rounding || !(first > 0) || sigma[min_found + accurate] >= kIllConditioned * first)) ++accurate;
        found[indices[i]] = min_found + accurate;
      }
    });
  }
  parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      transposed_product(all_m + i * p * q, p, q, all_a + i * k * p, k, all_b + i * k * q);
      normalize_triplets(k, all_b + i * k * q, q, all_s + i * k);
      std::sort(all_s + i * k, all_s + (i + 1) * k, std::greater<double>());
    }
  });
  const Tensor none = at::empty({0, k, x.size(-2)}, options);
  return {!needs_b ? none : tall ? b : a, s, tall ? a : b, {}};
}

}  // namespace kdkernels::truncated_svd
