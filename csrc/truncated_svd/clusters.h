// Eigenvectors of eigenvalues that are close to each other. Inverse iteration gives each of them
// alone, so they are not orthogonal if the gap is near the rounding error of the eigenvalues. Here
// the vectors of a cluster are made orthogonal, improved by one more inverse iteration, and made
// orthogonal again. If eigenvalues differ only by rounding errors, the results are a basis of their
// eigenspace.
#pragma once

#include "products.h"
#include "spectrum.h"

namespace kdkernels::truncated_svd {

// Two neighbouring eigenvalues belong to one cluster if they differ by less than this fraction of
// the largest eigenvalue. For float the shifts of inverse iteration have errors of 1e-7, and three
// solves must suppress the neighbours below the rounding error of float. For double the vectors
// have products of about 1e-16 divided by the gap, whose squares remain after orthonormalize().
template <typename T>
constexpr double kCluster = sizeof(T) == 4 ? 1e-4 : 1e-7;

// This fraction of the largest eigenvalue is added to the shifts of inverse iteration. If a shift
// happened to be exactly an eigenvalue, the start vectors of its close neighbours would converge to
// its eigenvector too, until nothing is left of their own. (Powers of two: their products are exact,
// so it does not matter whether the compiler fuses the addition.)
template <typename T>
constexpr double kShiftOffset = sizeof(T) == 4 ? 0x1p-26 : 0x1p-50;

// Makes the rows [first, last) of x [k, stride], which have p numbers, orthonormal, one after
// another.
inline void orthonormalize_cluster(double* x, int64_t first, int64_t last, int64_t p, int64_t stride) {
  for (int64_t j = first; j < last; ++j) {
    double* vector = x + j * stride;
    // Another pass is needed if the first one leaves little of the vector. If nothing is left,
    // another vector takes its place.
    double length = 0;
    for (int pass = 0, restarts = 0; pass < 2 && !(length > 0.5); ++pass) {
      for (int64_t other = first; other < j; ++other)
        add_multiple<double>(-product<double>(x + other * stride, vector, stride), x + other * stride, stride, vector);
      length = std::sqrt(product<double>(vector, vector, stride));
      if (!(length > 1e-12) && restarts < 2 * p) {
        std::fill(vector, vector + stride, 0.0);
        vector[(j + restarts++) % p] = 1;
        pass = -1;
        continue;
      }
      const Doubles factor = simd::splat<double>(1 / length);
      for (int64_t i = 0; i < stride; i += kLanes<double>) simd::store<double>(vector + i, simd::load<double>(vector + i) * factor);
    }
  }
}

// Memory for improve_clusters().
struct ClusterWorkspace {
  ClusterWorkspace(int64_t p, int64_t k) : rows(p), lanes(p), vectors(k * padded<double>(p)) {}
  Buffer<TridiagonalLU<1>::Row> rows;
  Buffer<Doubles> lanes;
  Buffer<double> vectors;  // [k, padded(p)]
};

// Whether the shifts [k], descending, contain a cluster.
inline bool has_cluster(const double* shifts, int64_t k, double min_gap) {
  for (int64_t j = 0; j + 1 < k; ++j)
    if (shifts[j] - shifts[j + 1] <= min_gap) return true;
  return false;
}

// d [p], e [p - 1]: one tridiagonal matrix; shifts [k], descending: its eigenvalues from bisection.
// Improves work.vectors and their Rayleigh quotients lambda [k].
//
// Making vectors orthogonal amplifies their components outside of the space of the cluster, which
// another solve removes. Its shifts are a little larger than the eigenvalues, so that it multiplies
// all vectors of the cluster by about the same number, and leaves them nearly orthogonal.
inline void improve_clusters(int64_t p, const double* d, const double* e, int64_t k, const double* shifts, double min_gap, double* lambda,
                             ClusterWorkspace& work) {
  const double offset = 0.01 * min_gap;
  constexpr int lanes = kLanes<double>;
  const int64_t stride = padded<double>(p);
  double* x = work.vectors.get();
  for (int64_t first = 0, last; first < k; first = last) {
    for (last = first + 1; last < k && shifts[last - 1] - shifts[last] <= min_gap;) ++last;
    if (last == first + 1) continue;
    orthonormalize_cluster(x, first, last, p, stride);
    for (int64_t part = first; part < last; part += lanes) {
      const int64_t count = std::min<int64_t>(lanes, last - part);
      Doubles shift{};
      for (int l = 0; l < lanes; ++l) shift[l] = shifts[part + std::min<int64_t>(l, count - 1)] + offset;
      for (int64_t i = 0; i < p; ++i)
        for (int l = 0; l < lanes; ++l) work.lanes.get()[i][l] = x[(part + std::min<int64_t>(l, count - 1)) * stride + i];
      inverse_iteration<1>(p, d, e, 1, &shift, work.lanes.get(), 1, work.rows.get());
      for (int64_t l = 0; l < count; ++l)
        for (int64_t i = 0; i < p; ++i) x[(part + l) * stride + i] = work.lanes.get()[i][l];
    }
    orthonormalize_cluster(x, first, last, p, stride);
    for (int64_t j = first; j < last; ++j) {
      const double* vector = x + j * stride;
      double quotient = 0;
      for (int64_t i = 0; i < p; ++i) quotient += vector[i] * (d[i] * vector[i] + (i + 1 < p ? 2 * e[i] * vector[i + 1] : 0.0));
      lambda[j] = quotient;
    }
  }
}

// Makes nearly orthonormal rows of a [k, stride] orthonormal up to rounding: each pair shares the
// correction, so that the error of the product is squared.
template <typename T>
void orthonormalize_rows(T* a, int64_t k, int64_t stride) {
  for (int64_t j = 1; j < k; ++j)
    for (int64_t i = 0; i < j; ++i) {
      const T half = static_cast<T>(-0.5 * product<T>(a + i * stride, a + j * stride, stride));
      if (std::abs(half) <= std::numeric_limits<T>::epsilon() / 2) continue;
      add_multiple<T>(half, a + j * stride, stride, a + i * stride);
      add_multiple<T>(half, a + i * stride, stride, a + j * stride);
    }
}

}  // namespace kdkernels::truncated_svd
