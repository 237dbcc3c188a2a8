// The top of the spectrum of symmetric tridiagonal matrices in lanes: eigenvalues by bisection, eigenvectors by inverse iteration, and
// the projected solve of the derivative by elimination with a complex shift.
#pragma once

#include "lanes.h"
#include "thresholds.h"

namespace kdkernels::truncated_svd {

// The k largest eigenvalues of symmetric tridiagonal matrices in lanes, by bisection with Sturm counts.
//
// The pivots q_i = d_i - x - e_{i-1}^2 / q_{i-1} of T - x I = L D L^T have as many positive ones as T has eigenvalues above x (Sylvester's
// law of inertia). Bisection needs no start, no gap and no test of convergence: a fixed number of halvings gives the rounding of T's norm.
//
// W. Barth, R. S. Martin, J. H. Wilkinson. Calculation of the Eigenvalues of a Symmetric Tridiagonal Matrix by the Method of Bisection.
// Numerische Mathematik 9, 1967.

// For N shifts at once, which keeps the divisions busy: how many eigenvalues lie above each.
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

// d [p]; e2 [p]: the squares of e, shifted by one, so that e2[0] = 0. lambda [k], descending, for eigenvalues in [low, high].
template <typename T>
void largest_eigenvalues(int64_t p, const Vec<T>* d, const Vec<T>* e2, Vec<T> low, Vec<T> high, int64_t k, Vec<T>* lambda) {
  constexpr int halvings = std::numeric_limits<T>::digits + 2;
  constexpr int together = 4;
  for (int64_t first = 0; first < k; first += together) {
    Vec<T> lower[together], upper[together], middle[together];
    for (int j = 0; j < together; ++j) lower[j] = low, upper[j] = high;
    for (int step = 0; step < halvings; ++step) {
      Mask<T> count[together];
      for (int j = 0; j < together; ++j) middle[j] = T(0.5) * (lower[j] + upper[j]);
      if (k - first >= 3)
        count_above<T, 4>(p, d, e2, middle, count);
      else if (k - first == 2)
        count_above<T, 2>(p, d, e2, middle, count);
      else
        count_above<T, 1>(p, d, e2, middle, count);
      for (int64_t j = 0; j < std::min<int64_t>(together, k - first); ++j) {
        const Mask<T> above = count[j] > static_cast<typename simd::IntOf<T>::type>(first + j);
        lower[j] = above ? middle[j] : lower[j];
        upper[j] = above ? upper[j] : middle[j];
      }
    }
    for (int64_t j = 0; j < std::min<int64_t>(together, k - first); ++j) lambda[first + j] = T(0.5) * (lower[j] + upper[j]);
  }
}

// Eigenvectors of symmetric tridiagonal matrices in lanes, by inverse iteration in double precision.
//
// (T - lambda I) x = b is solved by Gaussian elimination with row interchanges, made lane by lane with selects; a vanishing pivot is
// replaced by a rounding of T's norm, which is 1. The solution of three such systems, each made orthogonal to the vectors of larger
// eigenvalues, is an eigenvector, or, where eigenvalues lie within roundings of each other, one of a basis of their eigenspace.
//
// G. Peters, J. H. Wilkinson. The Calculation of Specified Eigenvectors by Inverse Iteration. In: Handbook for Automatic Computation II,
// 1971.

using Doubles = Vec<double>;

// The factors of T - shift I = P L U, row by row.
struct TridiagonalLU {
  struct Row {
    Doubles inverse, first, second;  // of U: one over its diagonal, its two upper diagonals
    Doubles multiplier;              // of L
    Mask<double> swapped;
  };

  static void factor(int64_t p, const Doubles* d, const Doubles* e, Doubles shift, Row* rows) {
    const Doubles least = simd::splat<double>(1e-16);
    auto reciprocal = [&](Doubles pivot) { return 1.0 / (abs<double>(pivot) < least ? least : pivot); };
    Doubles diagonal = d[0] - shift, upper = p > 1 ? e[0] : Doubles{};
    for (int64_t i = 0; i + 1 < p; ++i) {
      const Doubles below = e[i], next = d[i + 1] - shift, far = i + 2 < p ? e[i + 1] : Doubles{};
      Row& row = rows[i];
      row.swapped = abs<double>(below) > abs<double>(diagonal);
      row.inverse = reciprocal(row.swapped ? below : diagonal);
      row.first = row.swapped ? next : upper;
      row.second = row.swapped ? far : Doubles{};
      row.multiplier = (row.swapped ? diagonal : below) * row.inverse;
      diagonal = (row.swapped ? upper : next) - row.multiplier * row.first;
      upper = (row.swapped ? Doubles{} : far) - row.multiplier * row.second;
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
    Doubles one = current * rows[p - 1].inverse, two{};
    x[p - 1] = one;
    for (int64_t i = p - 2; i >= 0; --i) {
      const Row& row = rows[i];
      const Doubles value = (x[i] - row.first * one - row.second * two) * row.inverse;
      two = one;
      one = value;
      x[i] = value;
    }
  }
};

inline Doubles dot(int64_t p, const Doubles* x, const Doubles* y) {
  Doubles sum{};
  for (int64_t i = 0; i < p; ++i) sum += x[i] * y[i];
  return sum;
}

inline void scale_to(int64_t p, Doubles factor, Doubles* x) {
  for (int64_t i = 0; i < p; ++i) x[i] *= factor;
}

// d [p], e [p - 1], lambda [k] descending, as bisection left them. x [k][p]: orthonormal eigenvectors; lambda: their Rayleigh quotients.
// rows: p rows of factors.
inline void eigenvectors(int64_t p, const Doubles* d, const Doubles* e, int64_t k, Doubles* lambda, Doubles* x, TridiagonalLU::Row* rows) {
  constexpr int kSolves = 3;
  for (int64_t j = 0; j < k; ++j) {
    Doubles* own = x + j * p;
    // A start that is the same everywhere and has a part along every vector.
    uint64_t seed = 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(j + 1);
    for (int64_t i = 0; i < p; ++i) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      own[i] = simd::splat<double>(0.5 + static_cast<double>(seed >> 11) * 0x1p-53) * ((seed >> 62) & 1 ? 1.0 : -1.0);
    }
    // A little off: exactly at a multiple eigenvalue the solution is the vector that was found first, whatever the start.
    TridiagonalLU::factor(p, d, e, lambda[j] + (j > 0 ? 1e-15 : 0.0), rows);
    for (int solve = 0; solve < kSolves; ++solve) {
      TridiagonalLU::solve(p, rows, own);
      // The solution may be as long as 1 / 1e-16: scaled first, so that squares stay in range.
      Doubles longest{};
      for (int64_t i = 0; i < p; ++i) longest = simd::max(longest, abs<double>(own[i]));
      scale_to(p, 1.0 / longest, own);
      // Twice: of a cluster little may be left the first time.
      for (int pass = 0; pass < 2 && (j > 0 || pass == 0); ++pass) {
        for (int64_t other = 0; other < j; ++other) {
          const Doubles along = dot(p, x + other * p, own);
          for (int64_t i = 0; i < p; ++i) own[i] -= along * x[other * p + i];
        }
        scale_to(p, 1.0 / simd::sqrt(dot(p, own, own)), own);
      }
    }
    Doubles quotient{};
    for (int64_t i = 0; i < p; ++i) quotient += own[i] * (d[i] * own[i] + (i + 1 < p ? 2.0 * e[i] * own[i + 1] : Doubles{}));
    lambda[j] = quotient;
  }
}

// The projected solve of the derivative: z = Re[(lambda + i eps - T)^-1] r for tridiagonal T, in lanes, in double precision.
//
// On an eigenvector of T to the eigenvalue mu this is x / (x^2 + eps^2) with x = lambda - mu: 1 / x where eigenvalues are apart, 0 where
// they meet, continuous in between. So the complex shift is the Lorentzian regularisation, exactly, without an eigenvector of T. The
// system is solved by elimination with row interchanges, as in TridiagonalLU.

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
KDKERNELS_INLINE Doubles size(Complex a) {
  return abs<double>(a.re) + abs<double>(a.im);
}

struct ResolventRow {
  Complex inverse, first, second, right;
};

// r [p], replaced by z. rows: p of them. A shift of exactly 0 in a matrix of zeros, with eps 0, gives 0.
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
    const Complex below = real(-e[i]), next{lambda - d[i + 1], eps}, far = real(i + 2 < p ? -e[i + 1] : Doubles{}),
                  right_next = real(r[i + 1]);
    const Mask<double> swapped = size(below) > size(diagonal);
    ResolventRow& row = rows[i];
    row.inverse = reciprocal(select(swapped, below, diagonal));
    row.first = select(swapped, next, upper);
    row.second = select(swapped, far, zero);
    row.right = select(swapped, right_next, right);
    const Complex multiplier = select(swapped, diagonal, below) * row.inverse;
    diagonal = select(swapped, upper, next) - multiplier * row.first;
    upper = select(swapped, zero, far) - multiplier * row.second;
    right = select(swapped, right, right_next) - multiplier * row.right;
  }
  Complex one = right * reciprocal(diagonal), two{};
  r[p - 1] = one.re;
  for (int64_t i = p - 2; i >= 0; --i) {
    const ResolventRow& row = rows[i];
    const Complex value = (row.right - row.first * one - row.second * two) * row.inverse;
    two = one;
    one = value;
    r[i] = value.re;
  }
}

}  // namespace kdkernels::truncated_svd
