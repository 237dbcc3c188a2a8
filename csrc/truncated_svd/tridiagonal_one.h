// The stages of tridiagonal.h for one matrix, whose rows are in lanes: faster than a group if there
// are few matrices, or if a group of them does not fit in the cache. Every sum has the same terms in
// the same order as there, so the results have the same bits.
//
// The whole symmetric matrix is stored. The product y = A x then adds one row after another, x[j]
// times row j, and needs no sum across lanes. An element above the diagonal must have the bits of
// its mirror image, so the two products that are subtracted from it change places there.
#pragma once

#include "tridiagonal.h"

namespace kdkernels::truncated_svd {

// Copies the lower triangle of a [p, stride] to the upper one, and clears the columns from p on.
template <typename T>
void mirror_triangle(int64_t p, int64_t stride, T* a) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < p; i += lanes) {
    for (int64_t j = 0; j <= i; j += lanes) {
      Vec<T> block[lanes];
      for (int l = 0; l < lanes; ++l) block[l] = i + l < p ? simd::load<T>(a + (i + l) * stride + j) : Vec<T>{};
      if (i == j)
        for (int l = 0; l < lanes; ++l)
          for (int c = l + 1; c < lanes; ++c) block[l][c] = block[c][l];
      else
        transpose<T>(block);
      for (int l = 0; l < lanes && j + l < p; ++l) simd::store<T>(a + (j + l) * stride + i, block[l]);
    }
  }
  // The columns from p on are now 0 in all rows: the rows from p on counted as 0.
}

// The sum over c < count of x[c] y[c]; see PartialSums.
template <typename T>
KDKERNELS_INLINE T dot_of_rows(const T* x, const T* y, int64_t count) {
  Vec<T> sum{};
  int64_t c = 0;
  for (; c + kLanes<T> <= count; c += kLanes<T>) sum += simd::load<T>(x + c) * simd::load<T>(y + c);
  if (c < count) {
    const Mask<T> inside = first_lanes<T>(count - c);
    const Vec<T> last_x = simd::load<T>(x + c), last_y = simd::load<T>(y + c);
    sum += (inside ? last_x : Vec<T>{}) * (inside ? last_y : Vec<T>{});
  }
  return simd::sum<T>(sum);
}

// Subtracts v w^T + w v^T from rows [j, j + R) of a, columns [0, end), and adds x[j] times each of
// them to y. R must divide the number of lanes, and j must be a multiple of R.
template <typename T, int R>
KDKERNELS_INLINE void sweep_rows_one(int64_t j, int64_t end, int64_t stride, const T* v, const T* w, const T* x, T* a, T* y) {
  T* row[R];
  Vec<T> vj[R], wj[R], xj[R];
#pragma GCC unroll 4
  for (int t = 0; t < R; ++t) {
    row[t] = a + (j + t) * stride;
    vj[t] = simd::splat<T>(v[j + t]), wj[t] = simd::splat<T>(w[j + t]), xj[t] = simd::splat<T>(x[j + t]);
  }
  // Processes one vector of columns; subtract(t, value, vc, wc) is the updated part of row j + t.
  auto sweep = [&](int64_t c, auto&& subtract) {
    const Vec<T> vc = simd::load<T>(v + c), wc = simd::load<T>(w + c);
    Vec<T> yc = simd::load<T>(y + c);
#pragma GCC unroll 4
    for (int t = 0; t < R; ++t) {
      const Vec<T> updated = subtract(t, simd::load<T>(row[t] + c), vc, wc);
      simd::store<T>(row[t] + c, updated);
      yc += updated * xj[t];
    }
    simd::store<T>(y + c, yc);
  };
  auto below = [&](int t, Vec<T> value, Vec<T> vc, Vec<T> wc) { return value - vj[t] * wc - wj[t] * vc; };
  auto above = [&](int t, Vec<T> value, Vec<T> vc, Vec<T> wc) { return value - wj[t] * vc - vj[t] * wc; };
  const int64_t diagonal = j / kLanes<T> * kLanes<T>;
  for (int64_t c = 0; c < diagonal; c += kLanes<T>) sweep(c, below);
  sweep(diagonal, [&](int t, Vec<T> value, Vec<T> vc, Vec<T> wc) {
    return first_lanes<T>(j + t - diagonal + 1) ? below(t, value, vc, wc) : above(t, value, vc, wc);
  });
  for (int64_t c = diagonal + kLanes<T>; c < end; c += kLanes<T>) sweep(c, above);
}

// a [p, stride]: a symmetric matrix, from mirror_triangle(). On return, row i >= 2 contains its v in
// the first i columns. d [p], e [p - 1], tau [p]. work: memory for 5 stride numbers.
template <typename T>
void tridiagonalize_one(int64_t p, int64_t stride, T* a, T* d, T* e, T* tau, T* work) {
  constexpr T eps = std::numeric_limits<T>::epsilon();
  constexpr T negligible = eps * eps * eps * eps;
  constexpr int rows_at_once = kLanes<T> < kSweepRows ? kLanes<T> : kSweepRows;
  T *y = work, *w = work + stride, *v = work + 2 * stride, *x = work + 3 * stride, *total = work + 4 * stride;
  std::fill(w, w + 3 * stride, T(0));
  tau[0] = 0;
  if (p > 1) tau[1] = 0;
  for (int64_t i = p - 1; i >= 0; --i) {
    T* row = a + i * stride;
    const Vec<T> vi = simd::splat<T>(v[i]), wi = simd::splat<T>(w[i]);
    for (int64_t c = 0; c <= i; c += kLanes<T>)
      simd::store<T>(row + c, simd::load<T>(row + c) - vi * simd::load<T>(w + c) - wi * simd::load<T>(v + c));
    d[i] = row[i];
    if (i == 0) break;
    const T last = row[i - 1];
    if (i == 1) {
      e[0] = last;
      continue;
    }
    const T squares = dot_of_rows<T>(row, row, i - 1);
    const bool reflect = squares > negligible;
    const T norm = std::sqrt(squares + last * last);
    const T reduced = last > T(0) ? -norm : norm;
    const T pivot = last - reduced;
    e[i - 1] = reflect ? reduced : last;
    tau[i] = reflect ? T(2) / (squares + pivot * pivot) : T(0);
    row[i - 1] = pivot;
    const int64_t end = padded<T>(i);
    std::copy_n(row, i, x);
    std::fill(x + i, x + end, T(0));

    std::fill(y, y + end, T(0));
    std::fill(total, total + end, T(0));
    int64_t r = 0;
    for (; r + rows_at_once <= i; r += rows_at_once) {
      sweep_rows_one<T, rows_at_once>(r, end, stride, v, w, x, a, y);
      if ((r + rows_at_once) % kProductTerms == 0) {
        for (int64_t c = 0; c < end; c += kLanes<T>) simd::store<T>(total + c, simd::load<T>(total + c) + simd::load<T>(y + c));
        std::fill(y, y + end, T(0));
      }
    }
    for (; r < i; ++r) sweep_rows_one<T, 1>(r, end, stride, v, w, x, a, y);
    for (int64_t c = 0; c < end; c += kLanes<T>) simd::store<T>(y + c, simd::load<T>(total + c) + simd::load<T>(y + c));
    const T vy = dot_of_rows<T>(x, y, i);
    const T correction = tau[i] * (tau[i] * (T(0.5) * vy));
    const Vec<T> tau_i = simd::splat<T>(tau[i]), factor = simd::splat<T>(correction);
    for (int64_t c = 0; c < end; c += kLanes<T>) simd::store<T>(w + c, tau_i * simd::load<T>(y + c) - factor * simd::load<T>(x + c));
    std::fill(w + i, w + end, T(0));
    std::swap(v, x);
  }
}

// x = (I - tau v v^T) x for N vectors of lanes, each lane another x: element c is z[c * stride].
template <typename T, int N>
KDKERNELS_INLINE void reflect_one(const T* v, int64_t count, T tau, Vec<T>* z, int64_t stride) {
  Vec<T> dot[N] = {};
  for (int64_t begin = 0; begin < count; begin += kProductTerms) {
    Vec<T> part[N] = {};
    for (int64_t c = begin, end = std::min<int64_t>(begin + kProductTerms, count); c < end; ++c) {
      const Vec<T> vc = simd::splat<T>(v[c]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) part[n] += vc * z[c * stride + n];
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) dot[n] += part[n];
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) dot[n] *= tau;
  for (int64_t c = 0; c < count; ++c) {
    const Vec<T> vc = simd::splat<T>(v[c]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) z[c * stride + n] -= dot[n] * vc;
  }
}

// z = Q z for `vectors` vectors of lanes, z [p][vectors]: see apply_q(). a [p, row_stride] contains
// v in its rows.
template <typename T>
void apply_q_one(int64_t p, const T* a, int64_t row_stride, const T* tau, int64_t vectors, Vec<T>* z) {
  auto apply = [&](auto count, int64_t n) {
    for (int64_t i = 2; i < p; ++i) reflect_one<T, count()>(a + i * row_stride, i, tau[i], z + n, vectors);
  };
  int64_t n = 0;
  for (; n + 4 <= vectors; n += 4) apply(std::integral_constant<int, 4>{}, n);
  for (; n + 2 <= vectors; n += 2) apply(std::integral_constant<int, 2>{}, n);
  for (; n < vectors; ++n) apply(std::integral_constant<int, 1>{}, n);
}

}  // namespace kdkernels::truncated_svd
