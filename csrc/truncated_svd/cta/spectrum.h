// The largest eigenvalues of a tridiagonal matrix by multisection, their eigenvectors by inverse
// iteration, and the projected solve of the derivative by elimination. The mathematics is that of
// ../spectrum.h, which the CPU runs in lanes.
#pragma once

#include "tiles.h"

namespace kdkernels::truncated_svd::gpu {

// Writes the k largest eigenvalues, descending, to `lambda`. The available threads are divided
// among the eigenvalues; those of one eigenvalue divide its interval.
template <typename Cta, typename T>
KDKERNELS_STAGE void largest_eigenvalues(Cta& cta, int p, int k, const WorkingMemory<T>& memory) {
  const T *d = memory.d, *e = memory.e;
  double *low = memory.low, *high = memory.high;
  int* is_above = memory.is_above;
  // An upper bound of the eigenvalues (Gershgorin).
  const T bound =
      cta.template max<T>(T(0), p, [&](int i) { return d[i] + (i > 0 ? absolute(e[i - 1]) : T(0)) + (i + 1 < p ? absolute(e[i]) : T(0)); });
  const T upper_bound = bound * (1 + 4 * Limits<T>::eps);
  cta.each(k, [&](int j) { low[j] = 0, high[j] = upper_bound; });
  const int points = Cta::kThreads / k > 31 ? 31 : Cta::kThreads / k > 1 ? Cta::kThreads / k : 1;
  auto point = [&](int j, int index) {
    return static_cast<T>(low[j]) + (static_cast<T>(high[j]) - static_cast<T>(low[j])) * (T(index + 1) / T(points + 1));
  };
  double width = 1;
  while (width > 1.0 / (int64_t(1) << (Limits<T>::digits + 2 > 62 ? 62 : Limits<T>::digits + 2))) {
    cta.each(k * points, [&](int task) {
      const int j = task / points;
      const T x = point(j, task % points);
      // The number of eigenvalues above x is the number of positive pivots of T - x I = L D L^T.
      int count = 0;
      T pivot = T(1), e_left = T(0);
      for (int i = 0; i < p; ++i) {
        pivot = d[i] - x - e_left * e_left / pivot;
        if (pivot == T(0)) pivot = -kTinyPivot<T>;
        count += pivot > T(0);
        e_left = e[i];
      }
      is_above[task] = count > j;
    });
    cta.each(k, [&](int j) {
      int index = 0;
      while (index < points && is_above[j * points + index]) ++index;
      const T lower = index > 0 ? point(j, index - 1) : static_cast<T>(low[j]),
              upper = index < points ? point(j, index) : static_cast<T>(high[j]);
      low[j] = lower, high[j] = upper;
    });
    width /= points + 1;
  }
  cta.each(k, [&](int j) { memory.lambda[j] = 0.5 * (low[j] + high[j]); });
}

// Makes the vectors x_j [n], j in [from, to), which are `stride` apart, orthonormal to each other
// and to the vectors before them. If little of a vector remains, it consists of rounding errors,
// and the first vector replacement(j, 0), replacement(j, 1), ... that is not nearly in the span of
// the others takes its place: it has the entries replacement(j, number, i). Returns the smallest
// fraction of its length that a vector kept, 0 if one was replaced.
template <typename Cta, typename V, typename Replacement>
KDKERNELS_STAGE double orthonormalize(Cta& cta, int from, int to, int n, V* x, int64_t stride, double* dots, Replacement&& replacement) {
  double least = 1;
  for (int j = from; j < to; ++j) {
    V* vector = x + j * stride;
    for (int number = -1; number < n; ++number) {
      if (number >= 0) {
        cta.each(n, [&](int i) { vector[i] = static_cast<V>(replacement(j, number, i)); });
        least = 0;
      }
      auto length_of_vector = [&] {
        return square_root(
            cta.template sum<double>(n, [&](int i) { return static_cast<double>(vector[i]) * static_cast<double>(vector[i]); }));
      };
      double remaining = 1, length = length_of_vector();
      for (int pass = 0; pass < 3; ++pass) {
        if (j > 0) {
          cta.warps(j, [&](const Warp& warp, int other) {
            const V* base = x + other * stride;
            const double dot = warp.sum<double>(n, [&](int i) { return static_cast<double>(vector[i]) * static_cast<double>(base[i]); });
            warp.each(1, [&](int) { dots[other] = dot; });
          });
          cta.each(n, [&](int i) {
            double value = static_cast<double>(vector[i]);
            for (int other = 0; other < j; ++other) value -= dots[other] * static_cast<double>(x[other * stride + i]);
            vector[i] = static_cast<V>(value);
          });
        }
        const double norm = length_of_vector(), kept = norm / length;
        remaining *= kept;
        if (!(remaining > 1e-4)) break;
        cta.each(n, [&](int i) { vector[i] = static_cast<V>(static_cast<double>(vector[i]) / norm); });
        if (kept > 0.9) break;
        length = 1;
      }
      if (remaining > (number < 0 ? 1e-4 : 0.5 / square_root(static_cast<double>(n)))) {
        if (remaining < least) least = remaining;
        break;
      }
    }
  }
  return least;
}

// The same with unit vectors as replacements.
template <typename Cta, typename V>
KDKERNELS_STAGE void orthonormalize(Cta& cta, int from, int to, int n, V* x, int64_t stride, double* dots) {
  orthonormalize(cta, from, to, n, x, stride, dots, [](int, int number, int i) { return i == number ? 1.0 : 0.0; });
}

// Entry i of start vector j of inverse iteration: magnitudes in [1/2, 3/2), so that the vector has a
// component along every eigenvector, also if T is decoupled. number: for other vectors.
KDKERNELS_GPU double start_entry(int j, int number, int i) {
  uint64_t bits = 0x9e3779b97f4a7c15ull * static_cast<uint64_t>((int64_t(number) << 42) + (int64_t(j + 1) << 21) + i);
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
  return (0.5 + static_cast<double>(bits >> 11) * 0x1p-53) * (((bits >> 5) & 1) ? 1.0 : -1.0);
}

// Solves (T - shift I) x = b by elimination with row interchanges: one thread per system, `count`
// systems side by side in memory.
struct InverseIteration {
  double *inverse_diagonal, *upper_1, *upper_2, *multiplier, *swapped;
  int count;

  KDKERNELS_GPU InverseIteration(double* rows, int p, int at_once)
      : inverse_diagonal(rows),
        upper_1(inverse_diagonal + int64_t(p) * at_once),
        upper_2(upper_1 + int64_t(p) * at_once),
        multiplier(upper_2 + int64_t(p) * at_once),
        swapped(multiplier + int64_t(p) * at_once),
        count(at_once) {}

  template <typename T>
  KDKERNELS_GPU void factor(int p, const T* d, const T* e, double shift, int system) const {
    auto reciprocal = [](double pivot) { return 1.0 / (absolute(pivot) < kTinySolvePivot ? kTinySolvePivot : pivot); };
    double diagonal = static_cast<double>(d[0]) - shift, upper = p > 1 ? static_cast<double>(e[0]) : 0.0;
    for (int i = 0; i + 1 < p; ++i) {
      const double lower = e[i], next_diagonal = static_cast<double>(d[i + 1]) - shift,
                   next_upper = i + 2 < p ? static_cast<double>(e[i + 1]) : 0.0;
      const bool swap = absolute(lower) > absolute(diagonal);
      const int64_t index = int64_t(i) * count + system;
      inverse_diagonal[index] = reciprocal(swap ? lower : diagonal);
      upper_1[index] = swap ? next_diagonal : upper;
      upper_2[index] = swap ? next_upper : 0.0;
      multiplier[index] = (swap ? diagonal : lower) * inverse_diagonal[index];
      swapped[index] = swap;
      diagonal = (swap ? upper : next_diagonal) - multiplier[index] * upper_1[index];
      upper = (swap ? 0.0 : next_upper) - multiplier[index] * upper_2[index];
    }
    const int64_t index = int64_t(p - 1) * count + system;
    inverse_diagonal[index] = reciprocal(diagonal), upper_1[index] = 0, upper_2[index] = 0, multiplier[index] = 0, swapped[index] = 0;
  }

  // x = (T - shift I)^-1 x, scaled to a largest magnitude of 1, because its length may be 1e20.
  KDKERNELS_GPU void solve(int p, double* x, int system) const {
    double current = x[0];
    for (int i = 0; i + 1 < p; ++i) {
      const int64_t index = int64_t(i) * count + system;
      const bool swap = swapped[index] != 0;
      const double next = x[i + 1], value = swap ? next : current;
      x[i] = value;
      current = (swap ? current : next) - multiplier[index] * value;
    }
    double x_1 = current * inverse_diagonal[int64_t(p - 1) * count + system], x_2 = 0, max_magnitude = absolute(x_1);
    x[p - 1] = x_1;
    for (int i = p - 2; i >= 0; --i) {
      const int64_t index = int64_t(i) * count + system;
      const double value = (x[i] - upper_1[index] * x_1 - upper_2[index] * x_2) * inverse_diagonal[index];
      x_2 = x_1;
      x_1 = value;
      x[i] = value;
      max_magnitude = larger(max_magnitude, absolute(value));
    }
    for (int i = 0; i < p; ++i) x[i] /= max_magnitude;
  }
};

// Writes orthonormal eigenvectors to x [k][p], and replaces lambda [k] by their Rayleigh quotients.
//
// A vector can be lost because its shift is by chance as good as exactly the eigenvalue of another
// vector. The one that replaces it needs as many solves as the first one. If little is left of a
// vector, its rounding errors have been amplified: for double, another solve removes them.
template <typename Cta, typename T>
KDKERNELS_STAGE void eigenvectors(Cta& cta, int p, int k, const WorkingMemory<T>& memory) {
  constexpr int kSolves = 3, kMostSolves = 12;
  constexpr double kLittleLeft = 0.03;
  double *x = memory.x, *lambda = memory.lambda;
  for (int begin = 0; begin < k; begin += kVectorsAtOnce) {
    const int at_once = smaller(k - begin, kVectorsAtOnce);
    const InverseIteration systems(memory.rows, p, at_once);
    cta.each(at_once, [&](int system) {
      const int j = begin + system;
      for (int i = 0; i < p; ++i) x[int64_t(j) * p + i] = start_entry(j, 0, i);
      // The shift is slightly off for j > 0. With exactly a multiple eigenvalue, the solution would
      // be the same vector, whatever the start vector is.
      systems.factor(p, memory.d, memory.e, lambda[j] + (j > 0 ? 0x1p-52 * lambda[0] : 0.0), system);
    });
    for (int left = kSolves, solve = 0; left > 0 && solve < kMostSolves; ++solve) {
      cta.each(at_once, [&](int system) { systems.solve(p, x + int64_t(begin + system) * p, system); });
      const double least = orthonormalize(cta, begin, begin + at_once, p, x, p, memory.dots,
                                          [](int j, int number, int i) { return start_entry(j, number + 1, i); });
      left = least == 0 ? kSolves : left > 1 || !(sizeof(T) == 8 && least < kLittleLeft) ? left - 1 : 1;
    }
  }
  cta.warps(k, [&](const Warp& warp, int j) {
    const double* vector = x + int64_t(j) * p;
    const double quotient = warp.sum<double>(p, [&](int i) {
      return vector[i] *
             (static_cast<double>(memory.d[i]) * vector[i] + (i + 1 < p ? 2.0 * static_cast<double>(memory.e[i]) * vector[i + 1] : 0.0));
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

// r = Re[(lambda + i eps - T)^-1] r. rows: kResolventRow arrays [p][count]; this thread uses column
// `system` of each of them.
template <typename T>
KDKERNELS_STAGE void resolvent(int p, const T* d, const T* e, double lambda, double eps, T* r, double* rows, int count, int system) {
  auto reciprocal = [](Complex a) {
    const double norm = a.re * a.re + a.im * a.im, factor = norm > 0.0 ? 1.0 / norm : 0.0;
    return Complex{a.re * factor, -a.im * factor};
  };
  auto real = [](double re) { return Complex{re, 0.0}; };
  const int64_t array_size = int64_t(p) * count;
  double* row = rows + system;
  // The arrays contain, for each row of U: 1 / diagonal, the upper diagonals (the second is real),
  // and the right-hand side.
  Complex diagonal{lambda - static_cast<double>(d[0]), eps}, upper = real(p > 1 ? -static_cast<double>(e[0]) : 0.0), right = real(r[0]);
  for (int i = 0; i + 1 < p; ++i, row += count) {
    const Complex lower = real(-static_cast<double>(e[i])), next_diagonal{lambda - static_cast<double>(d[i + 1]), eps};
    const Complex next_upper = real(i + 2 < p ? -static_cast<double>(e[i + 1]) : 0.0), next_right = real(r[i + 1]);
    const bool swap = magnitude(lower) > magnitude(diagonal);
    const Complex inverse_diagonal = reciprocal(swap ? lower : diagonal), upper_1 = swap ? next_diagonal : upper,
                  upper_2 = swap ? next_upper : real(0.0);
    const Complex row_right = swap ? next_right : right, multiplier = (swap ? diagonal : lower) * inverse_diagonal;
    row[0] = inverse_diagonal.re, row[array_size] = inverse_diagonal.im;
    row[2 * array_size] = upper_1.re, row[3 * array_size] = upper_1.im;
    row[4 * array_size] = upper_2.re;
    row[5 * array_size] = row_right.re, row[6 * array_size] = row_right.im;
    diagonal = (swap ? upper : next_diagonal) - multiplier * upper_1;
    upper = (swap ? real(0.0) : next_upper) - multiplier * upper_2;
    right = (swap ? right : next_right) - multiplier * row_right;
  }
  Complex x_1 = right * reciprocal(diagonal), x_2 = real(0.0);
  r[p - 1] = static_cast<T>(x_1.re);
  for (int i = p - 2; i >= 0; --i) {
    row -= count;
    const Complex inverse_diagonal{row[0], row[array_size]}, upper_1{row[2 * array_size], row[3 * array_size]};
    const Complex upper_2 = real(row[4 * array_size]), row_right{row[5 * array_size], row[6 * array_size]};
    const Complex value = (row_right - upper_1 * x_1 - upper_2 * x_2) * inverse_diagonal;
    x_2 = x_1;
    x_1 = value;
    r[i] = static_cast<T>(value.re);
  }
}

}  // namespace kdkernels::truncated_svd::gpu
