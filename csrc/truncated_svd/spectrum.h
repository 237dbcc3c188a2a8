// The largest eigenvalues of symmetric tridiagonal matrices, by bisection; their eigenvectors, by
// inverse iteration; and the projected solve of the derivative, by elimination with a complex shift.
#pragma once

#include "lanes.h"
#include "thresholds.h"

namespace kdkernels::truncated_svd {

// The k largest eigenvalues of symmetric tridiagonal matrices in lanes, by bisection with Sturm
// counts.
//
// T - x I = L D L^T has the pivots q_i = d_i - x - e_{i-1}^2 / q_{i-1}. As many of them are
// positive as T has eigenvalues above x (Sylvester's law of inertia). Bisection needs no start
// value, no gaps and no convergence test: after a fixed number of halvings the error is the
// rounding error of T's norm.
//
// W. Barth, R. S. Martin, J. H. Wilkinson. Calculation of the Eigenvalues of a Symmetric
// Tridiagonal Matrix by the Method of Bisection. Numerische Mathematik 9, 1967.

// The functions take the matrices in one of two layouts. Either every lane has a matrix of its own,
// and entry i of a diagonal is a vector. Or all lanes have the same matrix, with another eigenvalue
// in each lane, and entry i is a number. The arithmetic in a lane is the same in both.
template <typename T>
KDKERNELS_INLINE Vec<T> entry(const Vec<T>* diagonal, int64_t i) {
  return diagonal[i];
}
template <typename T>
KDKERNELS_INLINE Vec<T> entry(const T* diagonal, int64_t i) {
  return simd::splat<T>(diagonal[i]);
}

// Counts the eigenvalues above each of N shifts x. Several shifts at once keep the divider busy.
template <typename T, int N, typename Entry>
KDKERNELS_INLINE void count_above(int64_t p, const Entry* d, const Entry* e2, const Vec<T>* x, Mask<T>* count) {
  Vec<T> pivot[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    count[j] = Mask<T>{};
    pivot[j] = simd::splat<T>(1);
  }
  for (int64_t i = 0; i < p; ++i) {
    const Vec<T> diagonal = entry<T>(d, i), coupling = entry<T>(e2, i);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      pivot[j] = diagonal - x[j] - coupling / pivot[j];
      pivot[j] = pivot[j] == T(0) ? simd::splat<T>(-kTinyPivot<T>) : pivot[j];
      count[j] -= pivot[j] > T(0);  // a true lane is -1
    }
  }
}

// N vectors of eigenvalues: wanted[n] is how many eigenvalues are at least as large as each. Each
// step counts at S points of every interval, which leaves one of S + 1 parts.
template <typename T, int N, int S, typename Entry>
void bisect(int64_t p, const Entry* d, const Entry* e2, Vec<T> low, Vec<T> high, const Mask<T>* wanted, Vec<T>* lambda) {
  constexpr double bits_per_step = S == 1 ? 1 : S == 2 ? 1.58 : 2.32;  // log2(S + 1), rounded down
  constexpr int steps = static_cast<int>((std::numeric_limits<T>::digits + 2) / bits_per_step + 0.999);
  Vec<T> lower[N], upper[N], point[N * S];
  for (int j = 0; j < N; ++j) lower[j] = low, upper[j] = high;
  for (int step = 0; step < steps; ++step) {
    Mask<T> count[N * S];
    for (int j = 0; j < N; ++j) {
      if (S == 1) {
        point[j] = T(0.5) * (lower[j] + upper[j]);
      } else {
        const Vec<T> width = upper[j] - lower[j];
        for (int s = 0; s < S; ++s) point[j * S + s] = lower[j] + width * (T(s + 1) / T(S + 1));
      }
    }
    count_above<T, N * S>(p, d, e2, point, count);
    for (int j = 0; j < N; ++j) {
      Vec<T> new_lower = lower[j], new_upper = upper[j];
      for (int s = 0; s < S; ++s) new_lower = count[j * S + s] >= wanted[j] ? point[j * S + s] : new_lower;
      for (int s = S - 1; s >= 0; --s) new_upper = count[j * S + s] >= wanted[j] ? new_upper : point[j * S + s];
      lower[j] = new_lower;
      upper[j] = new_upper;
    }
  }
  for (int j = 0; j < N; ++j) lambda[j] = T(0.5) * (lower[j] + upper[j]);
}

// The same as bisect<T, 1, 1>, bit by bit, in less time: one vector of counts waits for its divisions.
// Each step counts at the midpoint and at both points that the next step of the bisection could
// choose.
template <typename T, typename Entry>
void bisect_by_two(int64_t p, const Entry* d, const Entry* e2, Vec<T> low, Vec<T> high, Mask<T> wanted, Vec<T>* lambda) {
  constexpr int steps = std::numeric_limits<T>::digits + 2;
  Vec<T> lower = low, upper = high;
  for (int step = 0; step < steps; step += 2) {
    const Vec<T> middle = T(0.5) * (lower + upper), point[] = {middle, T(0.5) * (lower + middle), T(0.5) * (middle + upper)};
    Mask<T> count[3];
    count_above<T, 3>(p, d, e2, point, count);
    const Mask<T> above = count[0] >= wanted;
    lower = above ? middle : lower;
    upper = above ? upper : middle;
    if (step + 1 == steps) break;
    const Vec<T> next = above ? point[2] : point[1];
    const Mask<T> above_next = (above ? count[2] : count[1]) >= wanted;
    lower = above_next ? next : lower;
    upper = above_next ? upper : next;
  }
  *lambda = T(0.5) * (lower + upper);
}

// Calls body(std::integral_constant<int, N>, first) for parts of [0, count) of N <= 4 vectors.
template <typename Body>
void in_fours(int64_t count, Body&& body) {
  int64_t first = 0;
  for (; count - first >= 3; first += 4) body(std::integral_constant<int, 4>{}, first);
  if (count - first == 2)
    body(std::integral_constant<int, 2>{}, first);
  else if (count - first == 1)
    body(std::integral_constant<int, 1>{}, first);
}

// d [p]; e2 [p]: the squares of e, shifted by one so that e2[0] = 0. Writes the k largest
// eigenvalues, which must be in [low, high], to lambda, descending. lambda has room for a multiple
// of four.
template <typename T>
void largest_eigenvalues(int64_t p, const Vec<T>* d, const Vec<T>* e2, Vec<T> low, Vec<T> high, int64_t k, Vec<T>* lambda) {
  in_fours(k, [&](auto n, int64_t first) {
    Mask<T> wanted[n()];
    for (int j = 0; j < n(); ++j) wanted[j] = Mask<T>{} + static_cast<typename simd::IntOf<T>::type>(first + j + 1);
    if (k == n())  // for k <= 2, sections keep the divider busy
      bisect<T, n(), 4 / n()>(p, d, e2, low, high, wanted, lambda);
    else
      bisect<T, n(), 1>(p, d, e2, low, high, wanted, lambda + first);
  });
}

// Eigenvalues from..to - 1 of one matrix, in lanes.
template <typename T>
void largest_eigenvalues_one(int64_t p, const T* d, const T* e2, T low, T high, int64_t from, int64_t to, Vec<T>* lambda) {
  in_fours((to - from + kLanes<T> - 1) / kLanes<T>, [&](auto n, int64_t first) {
    Mask<T> wanted[n()];
    for (int j = 0; j < n(); ++j)
      for (int l = 0; l < kLanes<T>; ++l) wanted[j][l] = static_cast<typename simd::IntOf<T>::type>(from + (first + j) * kLanes<T> + l + 1);
    const Vec<T> lowest = simd::splat<T>(low), highest = simd::splat<T>(high);
    if constexpr (n() == 1) {  // as many sections as for a group
      if (from == 0 && to == 1) return bisect<T, 1, 4>(p, d, e2, lowest, highest, wanted, lambda);
      if (from == 0 && to == 2) return bisect<T, 1, 2>(p, d, e2, lowest, highest, wanted, lambda);
      bisect_by_two<T>(p, d, e2, lowest, highest, wanted[0], lambda + first);
    } else {
      bisect<T, n(), 1>(p, d, e2, lowest, highest, wanted, lambda + first);
    }
  });
}

// Eigenvectors of symmetric tridiagonal matrices, by inverse iteration in double precision.
//
// (T - lambda I) x = b is solved by Gaussian elimination with row interchanges, lane by lane with
// selects. A vanishing pivot is replaced (kTinySolvePivot). Three such systems are solved in turn.
// The vectors of eigenvalues that are far apart are then orthogonal up to rounding; clusters.h
// treats the others.
//
// G. Peters, J. H. Wilkinson. The Calculation of Specified Eigenvectors by Inverse Iteration. In:
// Handbook for Automatic Computation II, 1971.

using Doubles = Vec<double>;

// The factors of T - shift I = P L U, row by row, for N vectors of shifts.
template <int N>
struct TridiagonalLU {
  struct Row {
    Doubles inverse_diagonal[N], upper_1[N], upper_2[N];  // of U: 1 / diagonal, and the two upper diagonals
    Doubles multiplier[N];                                // of L
    Mask<double> swapped[N];
  };

  template <typename Entry>
  static void factor(int64_t p, const Entry* d, const Entry* e, const Doubles* shift, Row* rows) {
    const Doubles min_pivot = simd::splat<double>(kTinySolvePivot);
    auto reciprocal = [&](Doubles pivot) { return 1.0 / (abs<double>(pivot) < min_pivot ? min_pivot : pivot); };
    Doubles diagonal[N], upper[N];
    for (int n = 0; n < N; ++n) diagonal[n] = entry<double>(d, 0) - shift[n], upper[n] = p > 1 ? entry<double>(e, 0) : Doubles{};
    for (int64_t i = 0; i + 1 < p; ++i) {
      const Doubles lower = entry<double>(e, i), next = entry<double>(d, i + 1),
                    next_upper = i + 2 < p ? entry<double>(e, i + 1) : Doubles{};
      Row& row = rows[i];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Doubles next_diagonal = next - shift[n];
        const Mask<double> swapped = abs<double>(lower) > abs<double>(diagonal[n]);
        row.swapped[n] = swapped;
        row.inverse_diagonal[n] = reciprocal(swapped ? lower : diagonal[n]);
        row.upper_1[n] = swapped ? next_diagonal : upper[n];
        row.upper_2[n] = swapped ? next_upper : Doubles{};
        row.multiplier[n] = (swapped ? diagonal[n] : lower) * row.inverse_diagonal[n];
        diagonal[n] = (swapped ? upper[n] : next_diagonal) - row.multiplier[n] * row.upper_1[n];
        upper[n] = (swapped ? Doubles{} : next_upper) - row.multiplier[n] * row.upper_2[n];
      }
    }
    for (int n = 0; n < N; ++n) rows[p - 1].inverse_diagonal[n] = reciprocal(diagonal[n]);
  }

  // x = (T - shift I)^-1 x; element i of vector n is x[i * stride + n].
  static void solve(int64_t p, const Row* rows, Doubles* x, int64_t stride) {
    Doubles current[N], x_1[N], x_2[N];
    for (int n = 0; n < N; ++n) current[n] = x[n];
    for (int64_t i = 0; i + 1 < p; ++i) {
      const Row& row = rows[i];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Doubles next = x[(i + 1) * stride + n];
        const Doubles value = row.swapped[n] ? next : current[n];
        x[i * stride + n] = value;
        current[n] = (row.swapped[n] ? current[n] : next) - row.multiplier[n] * value;
      }
    }
    for (int n = 0; n < N; ++n) {
      x_1[n] = current[n] * rows[p - 1].inverse_diagonal[n], x_2[n] = Doubles{};
      x[(p - 1) * stride + n] = x_1[n];
    }
    for (int64_t i = p - 2; i >= 0; --i) {
      const Row& row = rows[i];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Doubles value = (x[i * stride + n] - row.upper_1[n] * x_1[n] - row.upper_2[n] * x_2[n]) * row.inverse_diagonal[n];
        x_2[n] = x_1[n];
        x_1[n] = value;
        x[i * stride + n] = value;
      }
    }
  }
};

// The start vectors of inverse iteration: vector j has the entries start[j], start[j + 1], ... of
// one sequence of pseudo-random numbers, so that it has a component along every eigenvector, and
// the vectors are linearly independent.
inline void fill_start_vectors(int64_t count, double* start, uint64_t number = 1) {
  uint64_t seed = 0x9e3779b97f4a7c15ull * number;
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    start[i] = (0.5 + static_cast<double>(seed >> 11) * 0x1p-53) * ((seed >> 62) & 1 ? 1.0 : -1.0);
  }
}

// `solves` inverse iterations from x for N vectors of eigenvalues lambda, which are replaced by
// Rayleigh quotients. Element i of vector n is x[i * stride + n]; the results have length 1.
template <int N, typename Entry>
void inverse_iteration(int64_t p, const Entry* d, const Entry* e, int solves, Doubles* lambda, Doubles* x, int64_t stride,
                       typename TridiagonalLU<N>::Row* rows) {
  TridiagonalLU<N>::factor(p, d, e, lambda, rows);
  auto scale = [&](const Doubles* factor) {
    for (int64_t i = 0; i < p; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) x[i * stride + n] *= factor[n];
  };
  for (int solve = 0; solve < solves; ++solve) {
    TridiagonalLU<N>::solve(p, rows, x, stride);
    // The solution may have a length of 1 / kTinySolvePivot. It is scaled, so that squares stay in range.
    Doubles factor[N] = {};
    for (int64_t i = 0; i < p; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) factor[n] = simd::max(factor[n], abs<double>(x[i * stride + n]));
    for (int n = 0; n < N; ++n) factor[n] = 1.0 / factor[n];
    scale(factor);
  }
  Doubles squares[N] = {}, quotient[N] = {};
  for (int64_t i = 0; i < p; ++i) {
    const Doubles diagonal = entry<double>(d, i), coupling = i + 1 < p ? 2.0 * entry<double>(e, i) : Doubles{};
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Doubles value = x[i * stride + n], next = i + 1 < p ? x[(i + 1) * stride + n] : Doubles{};
      squares[n] += value * value;
      quotient[n] += value * (diagonal * value + coupling * next);
    }
  }
  Doubles factor[N];
  for (int n = 0; n < N; ++n) {
    lambda[n] = quotient[n] / squares[n];
    factor[n] = 1.0 / simd::sqrt(squares[n]);
  }
  scale(factor);
}

// The projected solve of the derivative, in double precision: z = Re[(lambda + i eps - T)^-1] r for
// tridiagonal matrices T in lanes.
//
// An eigenvector of T with the eigenvalue mu is multiplied by x / (x^2 + eps^2), with x = lambda -
// mu. This is about 1 / x if the eigenvalues are far apart, 0 if they are equal, and continuous in
// between. So the complex shift gives exactly the Lorentzian regularisation, without an eigenvector
// of T. The system is solved by elimination with row interchanges, as in TridiagonalLU.

struct Complex {
  Doubles re, im;
};
KDKERNELS_INLINE Complex operator-(Complex a, Complex b) {
  return {a.re - b.re, a.im - b.im};
}
KDKERNELS_INLINE Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
KDKERNELS_INLINE Complex select(Mask<double> m, Complex yes, Complex no) {
  return {m ? yes.re : no.re, m ? yes.im : no.im};
}
KDKERNELS_INLINE Doubles magnitude(Complex a) {
  return abs<double>(a.re) + abs<double>(a.im);
}

struct ResolventRow {
  Complex inverse_diagonal, upper_1, upper_2, right;
};

// Replaces r [p] by z. rows: memory for p rows. If T is zero, lambda is 0 and eps is 0, z is 0.
inline void resolvent(int64_t p, const Doubles* d, const Doubles* e, Doubles lambda, Doubles eps, Doubles* r, ResolventRow* rows) {
  auto reciprocal = [](Complex a) {
    const Doubles norm = a.re * a.re + a.im * a.im;
    const Doubles factor = norm > 0.0 ? 1.0 / norm : Doubles{};
    return Complex{a.re * factor, -a.im * factor};
  };
  auto real = [](Doubles re) { return Complex{re, Doubles{}}; };
  const Complex zero{};
  Complex diagonal{lambda - d[0], eps}, upper = real(p > 1 ? -e[0] : Doubles{}), right = real(r[0]);
  for (int64_t i = 0; i + 1 < p; ++i) {
    const Complex lower = real(-e[i]), next_diagonal{lambda - d[i + 1], eps}, next_upper = real(i + 2 < p ? -e[i + 1] : Doubles{}),
                  next_right = real(r[i + 1]);
    const Mask<double> swapped = magnitude(lower) > magnitude(diagonal);
    ResolventRow& row = rows[i];
    row.inverse_diagonal = reciprocal(select(swapped, lower, diagonal));
    row.upper_1 = select(swapped, next_diagonal, upper);
    row.upper_2 = select(swapped, next_upper, zero);
    row.right = select(swapped, next_right, right);
    const Complex multiplier = select(swapped, diagonal, lower) * row.inverse_diagonal;
    diagonal = select(swapped, upper, next_diagonal) - multiplier * row.upper_1;
    upper = select(swapped, zero, next_upper) - multiplier * row.upper_2;
    right = select(swapped, right, next_right) - multiplier * row.right;
  }
  Complex x_1 = right * reciprocal(diagonal), x_2{};
  r[p - 1] = x_1.re;
  for (int64_t i = p - 2; i >= 0; --i) {
    const ResolventRow& row = rows[i];
    const Complex value = (row.right - row.upper_1 * x_1 - row.upper_2 * x_2) * row.inverse_diagonal;
    x_2 = x_1;
    x_1 = value;
    r[i] = value.re;
  }
}

}  // namespace kdkernels::truncated_svd
