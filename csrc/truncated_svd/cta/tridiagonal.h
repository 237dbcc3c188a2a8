// G = Q T Q^T with T tridiagonal, by Householder reflections, as described in
// csrc/truncated_svd/tridiagonal.h. Here both triangles of the matrix are stored, so that
// neighbouring threads access neighbouring numbers, and a step has four phases.
#pragma once

#include "tiles.h"

namespace kdkernels::truncated_svd::gpu {

constexpr int kManyRows = 128;  // from this many rows on, a thread processes several of them

// The sweep in the step of row i: applies the pending update, and computes partial sums of y = A
// row_i. Returns the number of parts of each sum.
template <int Rows, typename Cta, typename T>
KDKERNELS_GPU int sweep(Cta& cta, int i, int ld, T* matrix, const WorkingMemory<T>& memory, T pivot, bool pending) {
  const T *row = matrix + int64_t(i) * ld, *v = row + ld, *w = memory.w;
  KDKERNELS_SHARED(w);
  T* parts = memory.parts;
  const int row_distance = (i + Rows - 1) / Rows, max_parts = Cta::kThreads / row_distance;
  const int part_count = max_parts > kMaxParts ? kMaxParts : max_parts > 1 ? max_parts : 1;
  cta.each(row_distance * part_count, [&](int task) {
    const int r = task % row_distance;
    T v_r[Rows], w_r[Rows], y[Rows];
#pragma unroll
    for (int t = 0; t < Rows; ++t) {
      const bool inside = r + t * row_distance < i;
      v_r[t] = pending && inside ? v[r + t * row_distance] : T(0);
      w_r[t] = inside ? w[r + t * row_distance] : T(0);
      y[t] = T(0);
    }
    for (int c = task / row_distance; c < i; c += part_count) {
      const T v_c = pending ? v[c] : T(0), w_c = w[c], x_c = c + 1 == i ? pivot : row[c];
      T* column = matrix + int64_t(c) * ld + r;
#pragma unroll
      for (int t = 0; t < Rows; ++t) {
        if (r + t * row_distance >= i) continue;
        const T x = column[t * row_distance] - (v_r[t] * w_c + w_r[t] * v_c);
        column[t * row_distance] = x;
        y[t] += x * x_c;
      }
    }
#pragma unroll
    for (int t = 0; t < Rows; ++t)
      if (r + t * row_distance < i) parts[task / row_distance * matrix_stride(i) + r + t * row_distance] = y[t];
  });
  return part_count;
}

// matrix: symmetric, of norm about 1. On return, row i of its lower triangle contains the
// reflection v_i; for d, e and tau see WorkingMemory.
template <typename Cta, typename T>
KDKERNELS_STAGE void tridiagonalize(Cta& cta, int p, T* matrix, const WorkingMemory<T>& memory) {
  constexpr T eps = Limits<T>::eps, negligible = eps * eps * eps * eps;
  const int ld = matrix_stride(p);
  T *w = memory.w, *parts = memory.parts, *d = memory.d, *e = memory.e, *tau = memory.tau;
  KDKERNELS_SHARED(w);
  cta.each(p, [&](int c) { w[c] = T(0), tau[c] = T(0), e[c] = T(0); });
  for (int i = p - 1; i >= 0; --i) {
    T* row = matrix + int64_t(i) * ld;
    // The vector v of the pending update A -= v w^T + w v^T; there is no pending update in the
    // first step. Row 1 has no reflection, so the update that is pending for row 0 is that of row
    // 2.
    const int pending_row = i > 0 ? i + 1 : 2;
    const T* v = matrix + int64_t(pending_row < p ? pending_row : i) * ld;
    const T v_i = cta.read(v[i]), w_i = cta.read(w[i]);
    const bool pending = pending_row < p;
    const T squares = cta.template sum<T>(i + 1, [&](int c) {
      T x = row[c];
      if (pending) x -= (c == i ? v_i : v[c]) * w_i + v_i * w[c];
      if (c == i)
        d[i] = x;
      else
        row[c] = x;
      return c + 1 < i ? x * x : T(0);
    });
    if (i == 0) break;
    const T last = cta.read(row[i - 1]);
    if (i == 1) {
      cta.each(1, [&](int) { e[0] = last; });
      continue;
    }
    // A row whose elements are smaller than the square of the rounding error of G needs no
    // reflection, and the squares of such elements would leave the range of T.
    const bool reflect = squares > negligible;
    const T norm = square_root(squares + last * last), reduced = last > T(0) ? -norm : norm, pivot = last - reduced;
    const T factor = reflect ? T(2) / (squares + pivot * pivot) : T(0);

    // The pending update and the product y = A v for rows 0 to i - 1, in one sweep. If there are
    // enough rows, a thread processes several of them, and reads numbers that are the same for all
    // rows once.
    const int part_count =
        i >= kManyRows ? sweep<4>(cta, i, ld, matrix, memory, pivot, pending) : sweep<1>(cta, i, ld, matrix, memory, pivot, pending);
    const T vy = cta.template sum<T>(i, [&](int r) {
      T y = T(0);
      for (int part = 0; part < part_count; ++part) y += parts[part * matrix_stride(i) + r];
      parts[r] = y;
      if (r + 1 < i) return row[r] * y;
      row[r] = pivot;
      e[r] = reflect ? reduced : last;
      tau[i] = factor;
      return pivot * y;
    });
    // Multiplied in this order, because the factor is large if v is small.
    const T correction = factor * (factor * (T(0.5) * vy));
    cta.each(i, [&](int c) { w[c] = factor * parts[c] - correction * row[c]; });
  }
}

// z = Q z, or z = Q^T z if `transposed`, for k vectors z_j = z + j stride, with one warp per
// vector. reflector(i) is row i.
template <typename Cta, typename T, typename F>
KDKERNELS_STAGE void apply_q(Cta& cta, int p, F reflector, const T* tau, bool transposed, int k, T* z, int stride) {
  cta.warps(k, [&](const Warp& warp, int j) {
    T* vector = z + j * stride;
    for (int step = 2; step < p; ++step) {
      const int i = transposed ? p + 1 - step : step;
      const T* v = reflector(i);
      const T dot = tau[i] * warp.sum<T>(i, [&](int c) { return v[c] * vector[c]; });
      warp.each(i, [&](int c) { vector[c] -= dot * v[c]; });
    }
  });
}

}  // namespace kdkernels::truncated_svd::gpu
