// Eigenvectors of symmetric tridiagonal matrices in lanes, by inverse iteration in double precision.
//
// (T - lambda I) x = b is solved by Gaussian elimination with row interchanges, made lane by lane with selects; a vanishing pivot is
// replaced by a rounding of T's norm, which is 1. The solution of three such systems, each made orthogonal to the vectors of larger
// eigenvalues, is an eigenvector, or, where eigenvalues lie within roundings of each other, one of a basis of their eigenspace.
//
// G. Peters, J. H. Wilkinson. The Calculation of Specified Eigenvectors by Inverse Iteration. In: Handbook for Automatic Computation II,
// 1971.
#pragma once

#include "lanes.h"

namespace kdkernels::truncated_svd {

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

}  // namespace kdkernels::truncated_svd
