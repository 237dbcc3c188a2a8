// The projected solve of the derivative: z = Re[(lambda + i eps - T)^-1] r for tridiagonal T, in lanes, in double precision.
//
// On an eigenvector of T to the eigenvalue mu this is x / (x^2 + eps^2) with x = lambda - mu: 1 / x where eigenvalues are apart, 0 where
// they meet, continuous in between. So the complex shift is the Lorentzian regularisation, exactly, without an eigenvector of T. The
// system is solved by elimination with row interchanges, as in inverse_iteration.h.
#pragma once

#include "inverse_iteration.h"

namespace kdkernels::truncated_svd {

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
