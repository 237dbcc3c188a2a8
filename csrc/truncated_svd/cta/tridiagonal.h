// G = Q T Q^T with T tridiagonal, by Householder reflections, as csrc/truncated_svd/tridiagonal.h describes it; here the matrix is stored
// whole, so that threads read and write neighbours, and a step is four phases.
#pragma once

#include "tiles.h"

namespace kdkernels::truncated_svd::gpu {

constexpr int kManyRows = 128;

// One sweep of row i's step: the update that is owed, and parts of y = A row_i, of which there are as many as is returned.
template <int Rows, typename Cta, typename T>
KDKERNELS_GPU int sweep(Cta& cta, int i, int ld, T* matrix, const Room<T>& room, T pivot, bool owed) {
  const T *row = matrix + int64_t(i) * ld, *v = row + ld, *w = room.w;
  KDKERNELS_SHARED(w);
  T* parts = room.parts;
  const int apart = (i + Rows - 1) / Rows, most = Cta::kThreads / apart;
  const int share = most > kParts ? kParts : most > 1 ? most : 1;
  cta.each(apart * share, [&](int task) {
    const int r = task % apart;
    T v_r[Rows], w_r[Rows], y[Rows];
#pragma unroll
    for (int t = 0; t < Rows; ++t) {
      const bool inside = r + t * apart < i;
      v_r[t] = owed && inside ? v[r + t * apart] : T(0);
      w_r[t] = inside ? w[r + t * apart] : T(0);
      y[t] = T(0);
    }
    for (int c = task / apart; c < i; c += share) {
      const T v_c = owed ? v[c] : T(0), w_c = w[c], x_c = c + 1 == i ? pivot : row[c];
      T* column = matrix + int64_t(c) * ld + r;
#pragma unroll
      for (int t = 0; t < Rows; ++t) {
        if (r + t * apart >= i) continue;
        const T x = column[t * apart] - (v_r[t] * w_c + w_r[t] * v_c);
        column[t * apart] = x;
        y[t] += x * x_c;
      }
    }
#pragma unroll
    for (int t = 0; t < Rows; ++t)
      if (r + t * apart < i) parts[task / apart * matrix_stride(i) + r + t * apart] = y[t];
  });
  return share;
}

// matrix: symmetric, of size about 1. Row i of its lower triangle keeps the reflection v_i; d, e, tau as in Room.
template <typename Cta, typename T>
KDKERNELS_STAGE void tridiagonalize(Cta& cta, int p, T* matrix, const Room<T>& room) {
  constexpr T eps = Limits<T>::eps, negligible = eps * eps * eps * eps;
  const int ld = matrix_stride(p);
  T *w = room.w, *parts = room.parts, *d = room.d, *e = room.e, *tau = room.tau;
  KDKERNELS_SHARED(w);
  cta.each(p, [&](int c) { w[c] = T(0), tau[c] = T(0), e[c] = T(0); });
  for (int i = p - 1; i >= 0; --i) {
    T* row = matrix + int64_t(i) * ld;
    // Of the update A -= v w^T + w v^T that is owed, and 0 at first; row 1 has no reflection, so row 0 is owed that of row 2.
    const int from = i > 0 ? i + 1 : 2;
    const T* v = matrix + int64_t(from < p ? from : i) * ld;
    const T v_i = cta.read(v[i]), w_i = cta.read(w[i]);
    const bool owed = from < p;
    const T squares = cta.template sum<T>(i + 1, [&](int c) {
      T x = row[c];
      if (owed) x -= (c == i ? v_i : v[c]) * w_i + v_i * w[c];
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
    // What is smaller than the square of a rounding of G is not worth a reflection, and its square would leave the range.
    const bool reflect = squares > negligible;
    const T norm = square_root(squares + last * last), kept = last > T(0) ? -norm : norm, pivot = last - kept;
    const T factor = reflect ? T(2) / (squares + pivot * pivot) : T(0);

    // The update that is owed and the product y = A v of the rows below i, in one sweep. What is the same for all rows is read once for
    // several of them, where there are enough.
    const int share = i >= kManyRows ? sweep<4>(cta, i, ld, matrix, room, pivot, owed) : sweep<1>(cta, i, ld, matrix, room, pivot, owed);
    const T vy = cta.template sum<T>(i, [&](int r) {
      T y = T(0);
      for (int part = 0; part < share; ++part) y += parts[part * matrix_stride(i) + r];
      parts[r] = y;
      if (r + 1 < i) return row[r] * y;
      row[r] = pivot;
      e[r] = reflect ? kept : last;
      tau[i] = factor;
      return pivot * y;
    });
    const T along = factor * (factor * (T(0.5) * vy));  // in this order: the factor is large where v is small
    cta.each(i, [&](int c) { w[c] = factor * parts[c] - along * row[c]; });
  }
}

// z = Q z, or Q^T z, for k vectors z_j = z + j stride, of which each has a warp. reflector(i): row i.
template <typename Cta, typename T, typename F>
KDKERNELS_STAGE void apply_q(Cta& cta, int p, F reflector, const T* tau, bool transposed, int k, T* z, int stride) {
  cta.warps(k, [&](const Warp& warp, int j) {
    T* own = z + j * stride;
    for (int step = 2; step < p; ++step) {
      const int i = transposed ? p + 1 - step : step;
      const T* v = reflector(i);
      const T dot = tau[i] * warp.sum<T>(i, [&](int c) { return v[c] * own[c]; });
      warp.each(i, [&](int c) { own[c] -= dot * v[c]; });
    }
  });
}

}  // namespace kdkernels::truncated_svd::gpu
