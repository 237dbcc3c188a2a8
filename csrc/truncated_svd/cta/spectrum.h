// The top of a tridiagonal matrix's spectrum: eigenvalues by multisection, vectors by inverse iteration, the projected solve by
// elimination. The mathematics is that of ../spectrum.h, which the CPU runs in lanes.
#pragma once

#include "tiles.h"

namespace kdkernels::truncated_svd::gpu {

// The k largest eigenvalues, descending, to `lambda`: each has as many threads as there are for it, which divide its interval.
template <typename Cta, typename T>
KDKERNELS_STAGE void largest_eigenvalues(Cta& cta, int p, int k, const Room<T>& room) {
  const T *d = room.d, *e = room.e;
  double *low = room.low, *high = room.high;
  int* above = room.above;
  const T most = cta.template max<T>(T(0), p, [&](int i) {  // Gershgorin
    return d[i] + (i > 0 ? absolute(e[i - 1]) : T(0)) + (i + 1 < p ? absolute(e[i]) : T(0));
  });
  const T top = most * (1 + 4 * Limits<T>::eps);
  cta.each(k, [&](int j) { low[j] = 0, high[j] = top; });
  const int ways = Cta::kThreads / k > 31 ? 31 : Cta::kThreads / k > 1 ? Cta::kThreads / k : 1;
  auto point = [&](int j, int way) {
    return static_cast<T>(low[j]) + (static_cast<T>(high[j]) - static_cast<T>(low[j])) * (T(way + 1) / T(ways + 1));
  };
  double width = 1;
  while (width > 1.0 / (int64_t(1) << (Limits<T>::digits + 2 > 62 ? 62 : Limits<T>::digits + 2))) {
    cta.each(k * ways, [&](int task) {
      const int j = task / ways;
      const T x = point(j, task % ways);
      // As many eigenvalues lie above x as T - x I = L D L^T has positive pivots.
      int count = 0;
      T pivot = T(1), before = T(0);
      for (int i = 0; i < p; ++i) {
        pivot = d[i] - x - before * before / pivot;
        if (pivot == T(0)) pivot = -kTinyPivot<T>;
        count += pivot > T(0);
        before = e[i];
      }
      above[task] = count > j;
    });
    cta.each(k, [&](int j) {
      int way = 0;
      while (way < ways && above[j * ways + way]) ++way;
      const T lower = way > 0 ? point(j, way - 1) : static_cast<T>(low[j]), upper = way < ways ? point(j, way) : static_cast<T>(high[j]);
      low[j] = lower, high[j] = upper;
    });
    width /= ways + 1;
  }
  cta.each(k, [&](int j) { room.lambda[j] = 0.5 * (low[j] + high[j]); });
}

// Makes x_j, j in [from, to), [n] each `stride` apart, orthonormal to one another and to those before. What a vector has little of is
// rounding, and the first unit vector with a part of its own takes its place.
template <typename Cta, typename V>
KDKERNELS_STAGE void orthonormalize(Cta& cta, int from, int to, int n, V* x, int64_t stride, double* dots) {
  for (int j = from; j < to; ++j) {
    V* own = x + j * stride;
    for (int unit = -1; unit < n; ++unit) {
      if (unit >= 0) cta.each(n, [&](int i) { own[i] = V(i == unit); });
      double left = 1;
      for (int pass = 0; pass < 3; ++pass) {
        if (j > 0) {
          cta.warps(j, [&](const Warp& warp, int other) {
            const V* base = x + other * stride;
            const double dot = warp.sum<double>(n, [&](int i) { return static_cast<double>(own[i]) * static_cast<double>(base[i]); });
            warp.each(1, [&](int) { dots[other] = dot; });
          });
          cta.each(n, [&](int i) {
            double value = static_cast<double>(own[i]);
            for (int other = 0; other < j; ++other) value -= dots[other] * static_cast<double>(x[other * stride + i]);
            own[i] = static_cast<V>(value);
          });
        }
        const double norm =
            square_root(cta.template sum<double>(n, [&](int i) { return static_cast<double>(own[i]) * static_cast<double>(own[i]); }));
        left *= norm;
        if (!(left > 1e-4)) break;
        cta.each(n, [&](int i) { own[i] = static_cast<V>(static_cast<double>(own[i]) / norm); });
        if (norm > 0.9) break;
      }
      if (left > (unit < 0 ? 1e-4 : 0.5 / square_root(static_cast<double>(n)))) break;
    }
  }
}

// (T - shift I) x = b by elimination with row interchanges: one thread a system, `count` of them side by side in memory.
struct InverseIteration {
  double *inverse, *first, *second, *multiplier, *swapped;
  int count;

  KDKERNELS_GPU InverseIteration(double* rows, int p, int together)
      : inverse(rows),
        first(inverse + int64_t(p) * together),
        second(first + int64_t(p) * together),
        multiplier(second + int64_t(p) * together),
        swapped(multiplier + int64_t(p) * together),
        count(together) {}

  template <typename T>
  KDKERNELS_GPU void factor(int p, const T* d, const T* e, double shift, int own) const {
    auto reciprocal = [](double pivot) { return 1.0 / (absolute(pivot) < 1e-16 ? 1e-16 : pivot); };
    double diagonal = static_cast<double>(d[0]) - shift, upper = p > 1 ? static_cast<double>(e[0]) : 0.0;
    for (int i = 0; i + 1 < p; ++i) {
      const double below = e[i], next = static_cast<double>(d[i + 1]) - shift, far = i + 2 < p ? static_cast<double>(e[i + 1]) : 0.0;
      const bool swap = absolute(below) > absolute(diagonal);
      const int64_t at = int64_t(i) * count + own;
      inverse[at] = reciprocal(swap ? below : diagonal);
      first[at] = swap ? next : upper;
      second[at] = swap ? far : 0.0;
      multiplier[at] = (swap ? diagonal : below) * inverse[at];
      swapped[at] = swap;
      diagonal = (swap ? upper : next) - multiplier[at] * first[at];
      upper = (swap ? 0.0 : far) - multiplier[at] * second[at];
    }
    const int64_t at = int64_t(p - 1) * count + own;
    inverse[at] = reciprocal(diagonal), first[at] = 0, second[at] = 0, multiplier[at] = 0, swapped[at] = 0;
  }

  // x = (T - shift I)^-1 x, brought to a largest entry of 1: it may be as long as 1e16.
  KDKERNELS_GPU void solve(int p, double* x, int own) const {
    double current = x[0];
    for (int i = 0; i + 1 < p; ++i) {
      const int64_t at = int64_t(i) * count + own;
      const bool swap = swapped[at] != 0;
      const double next = x[i + 1], value = swap ? next : current;
      x[i] = value;
      current = (swap ? current : next) - multiplier[at] * value;
    }
    double one = current * inverse[int64_t(p - 1) * count + own], two = 0, longest = absolute(one);
    x[p - 1] = one;
    for (int i = p - 2; i >= 0; --i) {
      const int64_t at = int64_t(i) * count + own;
      const double value = (x[i] - first[at] * one - second[at] * two) * inverse[at];
      two = one;
      one = value;
      x[i] = value;
      longest = larger(longest, absolute(value));
    }
    for (int i = 0; i < p; ++i) x[i] /= longest;
  }
};

// x [k][p]: orthonormal eigenvectors for lambda [k], which become their Rayleigh quotients.
template <typename Cta, typename T>
KDKERNELS_STAGE void eigenvectors(Cta& cta, int p, int k, const Room<T>& room) {
  constexpr int kSolves = 3;
  double *x = room.x, *lambda = room.lambda;
  for (int begin = 0; begin < k; begin += kTogether) {
    const int together = fewer(k - begin, kTogether);
    const InverseIteration systems(room.rows, p, together);
    cta.each(together, [&](int own) {
      const int j = begin + own;
      // A start that is the same everywhere and has a part along every vector.
      uint64_t seed = 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(j + 1);
      for (int i = 0; i < p; ++i) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        x[int64_t(j) * p + i] = (0.5 + static_cast<double>(seed >> 11) * 1.1102230246251565e-16) * ((seed >> 62) & 1 ? 1.0 : -1.0);
      }
      // A little off: exactly at a multiple eigenvalue the solution is the same vector, whatever the start.
      systems.factor(p, room.d, room.e, lambda[j] + (j > 0 ? 1e-15 : 0.0), own);
    });
    for (int solve = 0; solve < kSolves; ++solve) {
      cta.each(together, [&](int own) { systems.solve(p, x + int64_t(begin + own) * p, own); });
      orthonormalize(cta, begin, begin + together, p, x, p, room.dots);
    }
  }
  cta.warps(k, [&](const Warp& warp, int j) {
    const double* own = x + int64_t(j) * p;
    const double quotient = warp.sum<double>(p, [&](int i) {
      return own[i] * (static_cast<double>(room.d[i]) * own[i] + (i + 1 < p ? 2.0 * static_cast<double>(room.e[i]) * own[i + 1] : 0.0));
    });
    warp.each(1, [&](int) { lambda[j] = quotient; });
  });
}

struct Complex {
  double re, im;
};
KDKERNELS_GPU Complex operator-(Complex a, Complex b) {
  return {a.re - b.re, a.im - b.im};
}
KDKERNELS_GPU Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
KDKERNELS_GPU double magnitude(Complex a) {
  return absolute(a.re) + absolute(a.im);
}

// r = Re[(lambda + i eps - T)^-1] r. rows: kResolventRow arrays [p][count], of which this thread's is number `own`.
template <typename T>
KDKERNELS_STAGE void resolvent(int p, const T* d, const T* e, double lambda, double eps, T* r, double* rows, int count, int own) {
  auto reciprocal = [](Complex a) {
    const double norm = a.re * a.re + a.im * a.im, factor = norm > 0.0 ? 1.0 / norm : 0.0;
    return Complex{a.re * factor, -a.im * factor};
  };
  auto real = [](double re) { return Complex{re, 0.0}; };
  const int64_t next_array = int64_t(p) * count;
  double* row = rows + own;
  // Of U's rows: one over the diagonal, the upper diagonals (the second is real), the right side.
  Complex diagonal{lambda - static_cast<double>(d[0]), eps}, upper = real(p > 1 ? -static_cast<double>(e[0]) : 0.0), right = real(r[0]);
  for (int i = 0; i + 1 < p; ++i, row += count) {
    const Complex below = real(-static_cast<double>(e[i])), next{lambda - static_cast<double>(d[i + 1]), eps};
    const Complex far = real(i + 2 < p ? -static_cast<double>(e[i + 1]) : 0.0), right_next = real(r[i + 1]);
    const bool swap = magnitude(below) > magnitude(diagonal);
    const Complex inverse = reciprocal(swap ? below : diagonal), first = swap ? next : upper, second = swap ? far : real(0.0);
    const Complex side = swap ? right_next : right, multiplier = (swap ? diagonal : below) * inverse;
    row[0] = inverse.re, row[next_array] = inverse.im;
    row[2 * next_array] = first.re, row[3 * next_array] = first.im;
    row[4 * next_array] = second.re;
    row[5 * next_array] = side.re, row[6 * next_array] = side.im;
    diagonal = (swap ? upper : next) - multiplier * first;
    upper = (swap ? real(0.0) : far) - multiplier * second;
    right = (swap ? right : right_next) - multiplier * side;
  }
  Complex one = right * reciprocal(diagonal), two = real(0.0);
  r[p - 1] = static_cast<T>(one.re);
  for (int i = p - 2; i >= 0; --i) {
    row -= count;
    const Complex inverse{row[0], row[next_array]}, first{row[2 * next_array], row[3 * next_array]};
    const Complex second = real(row[4 * next_array]), side{row[5 * next_array], row[6 * next_array]};
    const Complex value = (side - first * one - second * two) * inverse;
    two = one;
    one = value;
    r[i] = static_cast<T>(value.re);
  }
}

}  // namespace kdkernels::truncated_svd::gpu
