// The largest eigenvalues of symmetric tridiagonal matrices in lanes, by bisection; their
// eigenvectors, by inverse iteration; and the projected solve of the derivative, by elimination
// with a complex shift.
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

// Counts the eigenvalues above each of N shifts x. Several shifts at once keep the divider busy.
template <typename T, int N>
KDKERNELS_INLINE void count_above(int64_t p, const Vec<T>* d, const Vec<T>* e2, const Vec<T>* x, Mask<T>* count) {
  Vec<T> pivot[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    count[j] = Mask<T>{};
    pivot[j] = simd::splat<T>(1);
  }
  for (int64_t i = 0; i < p; ++i) {
    const Vec<T> coupling = e2[i];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      pivot[j] = d[i] - x[j] - coupling / pivot[j];
      pivot[j] = pivot[j] == T(0) ? simd::splat<T>(-kTinyPivot<T>) : pivot[j];
      count[j] -= pivot[j] > T(0);  // a true lane is -1
    }
  }
}

// d [p]; e2 [p]: the squares of e, shifted by one so that e2[0] = 0. Writes the k largest
// eigenvalues, which must be in [low, high], to lambda [k], descending.
template <typename T>
void largest_eigenvalues(int64_t p, const Vec<T>* d, const Vec<T>* e2, Vec<T> low, Vec<T> high, int64_t k, Vec<T>* lambda) {
  constexpr int halvings = std::numeric_limits<T>::digits + 2;
  constexpr int at_once = 4;
  for (int64_t first = 0; first < k; first += at_once) {
    Vec<T> lower[at_once], upper[at_once], middle[at_once];
    for (int j = 0; j < at_once; ++j) lower[j] = low, upper[j] = high;
    for (int step = 0; step < halvings; ++step) {
      Mask<T> count[at_once];
      for (int j = 0; j < at_once; ++j) middle[j] = T(0.5) * (lower[j] + upper[j]);
      if (k - first >= 3)
        count_above<T, 4>(p, d, e2, middle, count);
      else if (k - first == 2)
        count_above<T, 2>(p, d, e2, middle, count);
      else
        count_above<T, 1>(p, d, e2, middle, count);
      for (int64_t j = 0; j < std::min<int64_t>(at_once, k - first); ++j) {
        const Mask<T> above = count[j] > static_cast<typename simd::IntOf<T>::type>(first + j);
        lower[j] = above ? middle[j] : lower[j];
        upper[j] = above ? upper[j] : middle[j];
      }
    }
    for (int64_t j = 0; j < std::min<int64_t>(at_once, k - first); ++j) lambda[first + j] = T(0.5) * (lower[j] + upper[j]);
  }
}

// Eigenvectors of symmetric tridiagonal matrices in lanes, by inverse iteration in double
// precision.
//
// (T - lambda I) x = b is solved by Gaussian elimination with row interchanges, lane by lane with
// selects. A vanishing pivot is replaced by the rounding error of T's norm (which is 1). Three such
// systems are solved in turn, and each solution is made orthogonal to the eigenvectors of larger
// eigenvalues. The result is an eigenvector; if several eigenvalues differ only by rounding errors,
// the results for them are a basis of their eigenspace.
//
// G. Peters, J. H. Wilkinson. The Calculation of Specified Eigenvectors by Inverse Iteration. In:
// Handbook for Automatic Computation II, 1971.

using Doubles = Vec<double>;

// The factors of T - shift I = P L U, row by row.
struct TridiagonalLU {
  struct Row {
    Doubles inverse_diagonal, upper_1, upper_2;  // of U: 1 / diagonal, and the two upper diagonals
    Doubles multiplier;                          // of L
    Mask<double> swapped;
  };

  static void factor(int64_t p, const Doubles* d, const Doubles* e, Doubles shift, Row* rows) {
    const Doubles min_pivot = simd::splat<double>(1e-16);
    auto reciprocal = [&](Doubles pivot) { return 1.0 / (abs<double>(pivot) < min_pivot ? min_pivot : pivot); };
    Doubles diagonal = d[0] - shift, upper = p > 1 ? e[0] : Doubles{};
    for (int64_t i = 0; i + 1 < p; ++i) {
      const Doubles lower = e[i], next_diagonal = d[i + 1] - shift, next_upper = i + 2 < p ? e[i + 1] : Doubles{};
      Row& row = rows[i];
      row.swapped = abs<double>(lower) > abs<double>(diagonal);
      row.inverse_diagonal = reciprocal(row.swapped ? lower : diagonal);
      row.upper_1 = row.swapped ? next_diagonal : upper;
      row.upper_2 = row.swapped ? next_upper : Doubles{};
      row.multiplier = (row.swapped ? diagonal : lower) * row.inverse_diagonal;
      diagonal = (row.swapped ? upper : next_diagonal) - row.multiplier * row.upper_1;
      upper = (row.swapped ? Doubles{} : next_upper) - row.multiplier * row.upper_2;
    }
    rows[p - 1] = {reciprocal(diagonal), Doubles{}, Doubles{}, Doubles{}, Mask<double>{}};
  }

  // x = (T - shift I)^-1 x
  static void solve(int64_t p, const Row* rows, Doubles* x) {
    Doubles current = x[0];
    for (int64_t i = 0; i + 1 < p; ++i) {
      const Row& row = rows[i];
      const Doubles next = x[i + 1];
      x[i] = row.swapped ? next : current;
      current = (row.swapped ? current : next) - row.multiplier * x[i];
    }
    Doubles x_1 = current * rows[p - 1].inverse_diagonal, x_2{};
    x[p - 1] = x_1;
    for (int64_t i = p - 2; i >= 0; --i) {
      const Row& row = rows[i];
      const Doubles value = (x[i] - row.upper_1 * x_1 - row.upper_2 * x_2) * row.inverse_diagonal;
      x_2 = x_1;
      x_1 = value;
      x[i] = value;
    }
  }
};

inline Doubles dot(int64_t p, const Doubles* x, const Doubles* y) {
  Doubles sum{};
  for (int64_t i = 0; i < p; ++i) sum += x[i] * y[i];
  return sum;
}

inline void scale_by(int64_t p, Doubles factor, Doubles* x) {
  for (int64_t i = 0; i < p; ++i) x[i] *= factor;
}

// d [p], e [p - 1]; lambda [k], descending, from bisection. Writes orthonormal eigenvectors to x
// [k][p], and replaces lambda by their Rayleigh quotients. rows: memory for p rows of factors.
inline void eigenvectors(int64_t p, const Doubles* d, const Doubles* e, int64_t k, Doubles* lambda, Doubles* x, TridiagonalLU::Row* rows) {
  constexpr int kSolves = 3;
  for (int64_t j = 0; j < k; ++j) {
    Doubles* vector = x + j * p;
    // A deterministic start vector that has a component along every eigenvector.
    uint64_t seed = 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(j + 1);
    for (int64_t i = 0; i < p; ++i) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      vector[i] = simd::splat<double>(0.5 + static_cast<double>(seed >> 11) * 0x1p-53) * ((seed >> 62) & 1 ? 1.0 : -1.0);
    }
    // The shift is slightly off for j > 0. With exactly a multiple eigenvalue, the solution would
    // be the eigenvector that was found first, whatever the start vector is.
    TridiagonalLU::factor(p, d, e, lambda[j] + (j > 0 ? 1e-15 : 0.0), rows);
    for (int solve = 0; solve < kSolves; ++solve) {
      TridiagonalLU::solve(p, rows, vector);
      // The solution may have a length of 1 / 1e-16. It is scaled first, so that squares stay in
      // range.
      Doubles max_magnitude{};
      for (int64_t i = 0; i < p; ++i) max_magnitude = simd::max(max_magnitude, abs<double>(vector[i]));
      scale_by(p, 1.0 / max_magnitude, vector);
      // Two passes: for a cluster of eigenvalues, the first pass may leave little of the vector.
      for (int pass = 0; pass < 2 && (j > 0 || pass == 0); ++pass) {
        for (int64_t other = 0; other < j; ++other) {
          const Doubles projection = dot(p, x + other * p, vector);
          for (int64_t i = 0; i < p; ++i) vector[i] -= projection * x[other * p + i];
        }
        scale_by(p, 1.0 / simd::sqrt(dot(p, vector, vector)), vector);
      }
    }
    Doubles quotient{};
    for (int64_t i = 0; i < p; ++i) quotient += vector[i] * (d[i] * vector[i] + (i + 1 < p ? 2.0 * e[i] * vector[i + 1] : Doubles{}));
    lambda[j] = quotient;
  }
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
