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
constexpr double kShiftOffset = sizeof(T) == 4 ? 0x1p-26 : 0x1p-52;

// The vectors of a cluster are computed again if orthogonalisation leaves less than this fraction of
// the length of one of them, because the rest may consist of rounding errors.
constexpr double kLittleLeft = 1e-6;

// The residual of an eigenvector of a cluster, as a fraction of the largest eigenvalue, above which
// the vectors of the cluster are rotated. It is some roundings of T; for double it must be above the
// rounding errors of the products.
template <typename T>
constexpr double kResidual = (sizeof(T) == 4 ? 1 : 4) * static_cast<double>(std::numeric_limits<T>::epsilon());

// The products of `vector` with R rows of x, `stride` numbers long.
template <typename T, int R>
KDKERNELS_INLINE void row_products(const T* x, int64_t stride, const T* vector, T* dots) {
  Vec<T> sums[R] = {};
  for (int64_t i = 0; i < stride; i += kLanes<T>) {
    const Vec<T> part = simd::load<T>(vector + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] += simd::load<T>(x + r * stride + i) * part;
  }
  for (int r = 0; r < R; ++r) dots[r] = simd::sum<T>(sums[r]);
}

// vector += the sum of factors[r] times row r of x, for R rows.
template <typename T, int R>
KDKERNELS_INLINE void add_rows(const T* x, int64_t stride, const T* factors, T* vector) {
  for (int64_t i = 0; i < stride; i += kLanes<T>) {
    Vec<T> sum = simd::load<T>(vector + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum += simd::splat<T>(factors[r]) * simd::load<T>(x + r * stride + i);
    simd::store<T>(vector + i, sum);
  }
}

// Calls body(std::integral_constant<int, R>, first) for parts of [first, last) of R = 4 rows or 1.
template <typename Body>
void in_fours_and_ones(int64_t first, int64_t last, Body&& body) {
  for (; first + 4 <= last; first += 4) body(std::integral_constant<int, 4>{}, first);
  for (; first < last; ++first) body(std::integral_constant<int, 1>{}, first);
}

// Makes the rows [first, last) of x [k, stride], which have p numbers, orthonormal, one after
// another. Returns the smallest fraction of its length that a vector kept: 0 if nothing was left of
// one, so that another took its place.
inline double orthonormalize_cluster(double* x, int64_t first, int64_t last, int64_t p, int64_t stride) {
  double least = 1;
  for (int64_t j = first; j < last; ++j) {
    double* vector = x + j * stride;
    // Another pass is needed if the first one leaves little of the vector. If nothing is left,
    // another vector takes its place.
    double length = 0;
    for (int pass = 0, restarts = 0; pass < 2 && !(length > 0.5); ++pass) {
      in_fours_and_ones(first, j, [&](auto rows, int64_t other) {
        double factors[rows()];
        row_products<double, rows()>(x + other * stride, stride, vector, factors);
        for (double& factor : factors) factor = -factor;
        add_rows<double, rows()>(x + other * stride, stride, factors, vector);
      });
      length = std::sqrt(product<double>(vector, vector, stride));
      if (!(length > 1e-12) && restarts < 2 * p) {
        // Not a unit vector: if T is decoupled, it may have no component in the space of the cluster.
        fill_start_vectors(p, vector, static_cast<uint64_t>(j * 2 * p + ++restarts));
        const double factor = 1 / std::sqrt(product<double>(vector, vector, stride));
        for (int64_t i = 0; i < p; ++i) vector[i] *= factor;
        pass = -1;
        least = 0;
        continue;
      }
      least = std::min(least, length);
      const Doubles factor = simd::splat<double>(1 / length);
      for (int64_t i = 0; i < stride; i += kLanes<double>) simd::store<double>(vector + i, simd::load<double>(vector + i) * factor);
    }
  }
  return least;
}

// (x, y) = (c x - s y, s x + c y)
inline void rotate(double* x, double* y, int64_t count, double c, double s) {
  for (int64_t i = 0; i < count; ++i) {
    const double old = x[i];
    x[i] = c * old - s * y[i];
    y[i] = s * old + c * y[i];
  }
}

// x [count, stride]: orthonormal vectors, whose space contains eigenvectors of the tridiagonal matrix
// T (d [p], e [p - 1]). If one of them is not itself an eigenvector, up to `tolerance`, rotates them
// until they are: the matrix H of the products x_i^T T x_j is diagonalised with Jacobi rotations
// (Rayleigh-Ritz). Writes the eigenvalues to lambda [count].
// images: memory for as many numbers as x.
inline void rotate_cluster(int64_t p, const double* d, const double* e, int64_t count, double* x, int64_t stride, double tolerance,
                           double* lambda, double* images) {
  double largest = 0;
  for (int64_t j = 0; j < count; ++j) {
    const double* vector = x + j * stride;
    double *image = images + j * stride, quotient = 0, squares = 0;
    for (int64_t i = 0; i < p; ++i) {
      image[i] = d[i] * vector[i] + (i > 0 ? e[i - 1] * vector[i - 1] : 0.0) + (i + 1 < p ? e[i] * vector[i + 1] : 0.0);
      quotient += vector[i] * image[i];
    }
    std::fill(image + p, image + stride, 0.0);
    for (int64_t i = 0; i < p; ++i) squares += (image[i] - quotient * vector[i]) * (image[i] - quotient * vector[i]);
    lambda[j] = quotient;
    largest = std::max(largest, squares);
  }
  if (std::sqrt(largest) <= tolerance) return;
  Buffer<double> h(count * count);
  for (int64_t j = 0; j < count; ++j) {
    double* row = h.get() + j * count;
    in_fours_and_ones(0, j + 1,
                      [&](auto rows, int64_t i) { row_products<double, rows()>(x + i * stride, stride, images + j * stride, row + i); });
    for (int64_t i = 0; i < j; ++i) h.get()[i * count + j] = row[i];
  }
  constexpr int max_sweeps = 12;
  bool rotated = true;
  for (int sweep = 0; sweep < max_sweeps && rotated; ++sweep) {
    rotated = false;
    for (int64_t j = 1; j < count; ++j)
      for (int64_t i = 0; i < j; ++i) {
        double *row_i = h.get() + i * count, *row_j = h.get() + j * count;
        if (!(std::abs(row_i[j]) > tolerance / 16)) continue;
        rotated = true;
        const double cotangent = (row_j[j] - row_i[i]) / (2 * row_i[j]);
        const double t = std::copysign(1 / (std::abs(cotangent) + std::hypot(1.0, cotangent)), cotangent);
        const double c = 1 / std::hypot(1.0, t), s = t * c;
        const double shift = t * row_i[j], diagonal_i = row_i[i] - shift, diagonal_j = row_j[j] + shift;
        rotate(row_i, row_j, count, c, s);
        for (int64_t r = 0; r < count; ++r) h.get()[r * count + i] = row_i[r], h.get()[r * count + j] = row_j[r];
        row_i[i] = diagonal_i, row_j[j] = diagonal_j, row_i[j] = row_j[i] = 0;
        rotate(x + i * stride, x + j * stride, stride, c, s);
      }
  }
  for (int64_t j = 0; j < count; ++j) lambda[j] = h.get()[j * count + j];
}

// Memory for improve_clusters().
struct ClusterWorkspace {
  ClusterWorkspace(int64_t p, int64_t k) : rows(p), lanes(p), vectors(k * padded<double>(p)), images(k * padded<double>(p)) {}
  Buffer<TridiagonalLU<1>::Row> rows;
  Buffer<Doubles> lanes;
  Buffer<double> vectors, images;  // [k, padded(p)]: the vectors, and T times the vectors of a cluster
};

// Whether the shifts [k], descending, contain a cluster.
inline bool has_cluster(const double* shifts, int64_t k, double min_gap) {
  for (int64_t j = 0; j + 1 < k; ++j)
    if (shifts[j] - shifts[j + 1] <= min_gap) return true;
  return false;
}

// Replaces vectors [first, last) of work.vectors by solutions with the shifts that are larger by
// `offset`.
inline void solve_cluster(int64_t p, const double* d, const double* e, const double* shifts, double offset, int64_t first, int64_t last,
                          ClusterWorkspace& work) {
  constexpr int lanes = kLanes<double>;
  const int64_t stride = padded<double>(p);
  for (; first < last; first += lanes) {
    const int64_t count = std::min<int64_t>(lanes, last - first);
    double* x = work.vectors.get() + first * stride;
    Doubles shift{};
    for (int l = 0; l < lanes; ++l) shift[l] = shifts[first + std::min<int64_t>(l, count - 1)] + offset;
    for (int64_t i = 0; i < p; ++i)
      for (int l = 0; l < lanes; ++l) work.lanes.get()[i][l] = x[std::min<int64_t>(l, count - 1) * stride + i];
    inverse_iteration<1>(p, d, e, 1, &shift, work.lanes.get(), 1, work.rows.get());
    for (int64_t l = 0; l < count; ++l)
      for (int64_t i = 0; i < p; ++i) x[l * stride + i] = work.lanes.get()[i][l];
  }
}

// d [p], e [p - 1]: one tridiagonal matrix; shifts [k], descending: its eigenvalues from bisection.
// Improves work.vectors and their Rayleigh quotients lambda [k].
//
// Making vectors orthogonal amplifies their components outside of the space of the cluster, which
// another solve removes. Its shifts are a little larger than the eigenvalues, so that it multiplies
// all vectors of the cluster by about the same number, and leaves them nearly orthogonal. If almost
// nothing is left of a vector, because its shift is by chance as good as exactly the eigenvalue of
// another one, it is computed again, with other shifts.
template <typename T>
void improve_clusters(int64_t p, const double* d, const double* e, int64_t k, const double* shifts, double min_gap, double* lambda,
                      ClusterWorkspace& work) {
  constexpr int max_attempts = 3, solves = 3;
  const int64_t stride = padded<double>(p);
  double* x = work.vectors.get();
  for (int64_t first = 0, last; first < k; first = last) {
    for (last = first + 1; last < k && shifts[last - 1] - shifts[last] <= min_gap;) ++last;
    if (last == first + 1) continue;
    auto orthonormalize = [&] { return orthonormalize_cluster(x, first, last, p, stride) > kLittleLeft; };
    bool complete = orthonormalize();
    for (int attempt = 0; attempt < max_attempts; ++attempt) {
      for (int solve = 0; !complete && solve < solves; ++solve) {
        solve_cluster(p, d, e, shifts, (2 + attempt) * kShiftOffset<T> * shifts[0], first, last, work);
        orthonormalize();
      }
      solve_cluster(p, d, e, shifts, 0.01 * min_gap, first, last, work);
      complete = orthonormalize();
      if (complete) break;
    }
    rotate_cluster(p, d, e, last - first, x + first * stride, stride, kResidual<T> * shifts[0], lambda + first, work.images.get());
  }
}

// Makes nearly orthonormal rows of a [k, stride] orthonormal up to rounding: each pair shares the
// correction, so that the error of the product is squared.
template <typename T>
void orthonormalize_rows(T* a, int64_t k, int64_t stride) {
  for (int64_t j = 1; j < k; ++j)
    in_fours_and_ones(0, j, [&](auto rows, int64_t first) {
      T products[rows()];
      row_products<T, rows()>(a + first * stride, stride, a + j * stride, products);
      for (int r = 0; r < rows(); ++r) {
        const T half = T(-0.5) * products[r];
        if (std::abs(half) <= std::numeric_limits<T>::epsilon() / 2) continue;
        add_multiple<T>(half, a + j * stride, stride, a + (first + r) * stride);
        add_multiple<T>(half, a + (first + r) * stride, stride, a + j * stride);
      }
    });
}

}  // namespace kdkernels::truncated_svd
