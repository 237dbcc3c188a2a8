// G = Q T Q^T with T tridiagonal, by Householder reflections, for a group of matrices in lanes.
//
// The rows are processed from the last to the second. The reflection I - tau v v^T reduces row i to
// its diagonal element and the element to the left of it; v has i elements. The reflection changes
// the leading i x i block of A to A - v w^T - w v^T, with y = A v, w = tau y - (tau^2 v'y / 2) v.
// The update of one step and the product y of the next step read the same triangle, so one sweep
// does both. v is stored in place of its row.
//
// tridiagonal_one.h does the same for one matrix, with the same bits: both add the same terms in the
// same order. A sum over a row has one partial sum for each lane of a vector (PartialSums). The
// products with a matrix or with v have a partial sum for each kProductTerms terms: if the terms are
// equal, as for d I + c, the rounding errors of one long sum would all have the same sign.
//
// G. H. Golub, C. F. Van Loan. Matrix Computations, 4th ed., section 8.3.1.
#pragma once

#include "lanes.h"

namespace kdkernels::truncated_svd {

constexpr int64_t triangle(int64_t p) {
  return p * (p + 1) / 2;
}

constexpr int kProductTerms = 32;  // a multiple of the rows of a sweep and of the number of lanes

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSweepRows = 4;
#else
constexpr int kSweepRows = 2;
#endif

// A sum of many terms: term c is added to partial sum c modulo the number of lanes. One matrix keeps
// the partial sums in the lanes of a vector; a group has a vector for each of them.
template <typename T>
struct PartialSums {
  Vec<T> parts[kLanes<T>] = {};
  // The order of the additions is that of simd::sum().
  Vec<T> total() {
    for (int width = kLanes<T> / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return parts[0];
  }
};

// The sum over c < count of x[c] y[c], lane by lane.
template <typename T>
KDKERNELS_INLINE Vec<T> dot_in_lanes(const Vec<T>* x, const Vec<T>* y, int64_t count) {
  PartialSums<T> sum;
  int64_t c = 0;
  for (; c + kLanes<T> <= count; c += kLanes<T>)
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<T>; ++l) sum.parts[l] += x[c + l] * y[c + l];
  for (int l = 0; c < count; ++c, ++l) sum.parts[l] += x[c] * y[c];
  return sum.total();
}

// The pending rank-two update of the triangle, and the vector to multiply the triangle with.
template <typename T>
struct Sweep {
  const Vec<T>*v, *w;  // A -= v w^T + w v^T
  const Vec<T>* x;
  // total + y = A x: y has the products with the last rows or columns, up to kProductTerms.
  Vec<T>*y, *total;
};

// Processes rows [r, r + R): first their columns left of r, then the small triangle at the
// diagonal.
template <typename T, int R>
KDKERNELS_INLINE void sweep_rows(const Sweep<T>& s, int64_t r, Vec<T>* a) {
  Vec<T>* row[R];
  Vec<T> v[R], w[R], x[R], y[R], total[R];
#pragma GCC unroll 4
  for (int t = 0; t < R; ++t) {
    row[t] = a + triangle(r + t);
    v[t] = s.v[r + t], w[t] = s.w[r + t], x[t] = s.x[r + t];
    y[t] = total[t] = Vec<T>{};
  }
  for (int64_t begin = 0; begin < r; begin += kProductTerms) {
    const int64_t end = std::min<int64_t>(begin + kProductTerms, r);
    for (int64_t c = begin; c < end; ++c) {
      const Vec<T> vc = s.v[c], wc = s.w[c], xc = s.x[c];
      Vec<T> yc = s.y[c];
#pragma GCC unroll 4
      for (int t = 0; t < R; ++t) {
        const Vec<T> updated = row[t][c] - v[t] * wc - w[t] * vc;
        row[t][c] = updated;
        y[t] += updated * xc;
        yc += updated * x[t];
      }
      s.y[c] = yc;
    }
    if (end - begin < kProductTerms) break;
#pragma GCC unroll 4
    for (int t = 0; t < R; ++t) {
      total[t] += y[t];
      y[t] = Vec<T>{};
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < R; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < t; ++c) {
      const Vec<T> updated = row[t][r + c] - v[t] * w[c] - w[t] * v[c];
      row[t][r + c] = updated;
      y[t] += updated * x[c];
      y[c] += updated * x[t];
    }
    const Vec<T> diagonal = row[t][r + t] - v[t] * w[t] - w[t] * v[t];
    row[t][r + t] = diagonal;
    y[t] += diagonal * x[t];
  }
#pragma GCC unroll 4
  for (int t = 0; t < R; ++t) s.y[r + t] = y[t], s.total[r + t] = total[t];
  if ((r + R) % kProductTerms == 0) {
    for (int64_t c = 0; c < r + R; ++c) {
      s.total[c] += s.y[c];
      s.y[c] = Vec<T>{};
    }
  }
}

// a: the packed lower triangles, of norm about 1. On return, row i >= 2 contains its v, d [p] and e
// [p - 1] contain the diagonals of T, and tau [p] the factors (0: no reflection). work: memory for
// 3 p vectors.
template <typename T>
void tridiagonalize(int64_t p, Vec<T>* a, Vec<T>* d, Vec<T>* e, Vec<T>* tau, Vec<T>* work) {
  // A row whose elements are smaller than the square of the rounding error of G needs no
  // reflection, and the squares of such elements would leave the range of T.
  constexpr T eps = std::numeric_limits<T>::epsilon();
  constexpr T negligible = eps * eps * eps * eps;
  Vec<T>*y = work, *w = work + p, *zeros = work + 2 * p, *total = work + 3 * p;
  std::fill(w, w + p, Vec<T>{});
  std::fill(zeros, zeros + p, Vec<T>{});
  tau[0] = Vec<T>{};
  if (p > 1) tau[1] = Vec<T>{};
  const Vec<T>* v = zeros;  // of the pending update
  for (int64_t i = p - 1; i >= 0; --i) {
    Vec<T>* row = a + triangle(i);
    for (int64_t c = 0; c <= i; ++c) row[c] = row[c] - v[i] * w[c] - w[i] * v[c];
    d[i] = row[i];
    if (i == 0) break;
    const Vec<T> last = row[i - 1];
    if (i == 1) {
      e[0] = last;
      continue;
    }
    const Vec<T> squares = dot_in_lanes<T>(row, row, i - 1);
    const Mask<T> reflect = squares > negligible;
    const Vec<T> norm = simd::sqrt(squares + last * last);
    // With the opposite sign of `last`, last - reduced does not cancel.
    const Vec<T> reduced = last > T(0) ? -norm : norm;
    const Vec<T> pivot = last - reduced;
    e[i - 1] = reflect ? reduced : last;
    tau[i] = reflect ? T(2) / (squares + pivot * pivot) : Vec<T>{};
    row[i - 1] = pivot;

    std::fill(y, y + i, Vec<T>{});
    const Sweep<T> sweep{v, w, row, y, total};
    int64_t r = 0;
    for (; r + kSweepRows <= i; r += kSweepRows) sweep_rows<T, kSweepRows>(sweep, r, a);
    for (; r < i; ++r) sweep_rows<T, 1>(sweep, r, a);
    for (int64_t c = 0; c < i; ++c) y[c] = total[c] + y[c];
    const Vec<T> vy = dot_in_lanes<T>(row, y, i);
    // Multiplied in this order, because tau is large if v is small.
    const Vec<T> correction = tau[i] * (tau[i] * (T(0.5) * vy));
    for (int64_t c = 0; c < i; ++c) w[c] = tau[i] * y[c] - correction * row[c];
    v = row;
  }
}

// x = (I - tau v v^T) x for N vectors x at z, z + stride, ...
template <typename T, int N>
KDKERNELS_INLINE void reflect(const Vec<T>* v, int64_t count, Vec<T> tau, Vec<T>* z, int64_t stride) {
  Vec<T> dot[N] = {};
  for (int64_t begin = 0; begin < count; begin += kProductTerms) {
    Vec<T> part[N] = {};
    for (int64_t c = begin, end = std::min<int64_t>(begin + kProductTerms, count); c < end; ++c) {
      const Vec<T> vc = v[c];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) part[j] += vc * z[j * stride + c];
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) dot[j] += part[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) dot[j] *= tau;
  for (int64_t c = 0; c < count; ++c) {
    const Vec<T> vc = v[c];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) z[j * stride + c] -= dot[j] * vc;
  }
}

// z = Q z, or z = Q^T z if `transposed`, for k vectors [k][p].
template <typename T>
void apply_q(int64_t p, const Vec<T>* a, const Vec<T>* tau, bool transposed, int64_t k, Vec<T>* z) {
  for (int64_t step = 2; step < p; ++step) {
    const int64_t i = transposed ? p + 1 - step : step;
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) reflect<T, 4>(a + triangle(i), i, tau[i], z + j * p, p);
    for (; j + 2 <= k; j += 2) reflect<T, 2>(a + triangle(i), i, tau[i], z + j * p, p);
    for (; j < k; ++j) reflect<T, 1>(a + triangle(i), i, tau[i], z + j * p, p);
  }
}

}  // namespace kdkernels::truncated_svd
