// |x|^p and its derivative divided by p, |x|^(p-1) sign(x), one vector at a time. There is one type
// for each exponent that has a short formula, and one for all other exponents. Both functions
// return 0 at x = 0, also for p < 1, where the true derivative is unbounded.
#pragma once

#include "../common/simd.h"

namespace kdkernels::attention_pool {

using simd::Mask;
using simd::Vec;

template <typename T>
KDKERNELS_INLINE Vec<T> magnitude(Vec<T> x) {
  return (Vec<T>)((Mask<T>)x & std::numeric_limits<typename simd::IntOf<T>::type>::max());
}

// sign(x) * absolute for absolute >= 0; 0 where x is 0.
template <typename T>
KDKERNELS_INLINE Vec<T> with_sign(Vec<T> x, Vec<T> absolute) {
  const Vec<T> result = (Vec<T>)((Mask<T>)absolute | ((Mask<T>)x & std::numeric_limits<typename simd::IntOf<T>::type>::min()));
  return x == T(0) ? Vec<T>{} : result;
}

template <typename T>
struct FirstPower {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return magnitude<T>(x); }
  KDKERNELS_INLINE Vec<T> scaled_derivative(Vec<T> x) const { return x == x ? with_sign<T>(x, simd::splat<T>(T(1))) : x; }
};

template <typename T>
struct PowerOneAndAHalf {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return magnitude<T>(x) * simd::sqrt(magnitude<T>(x)); }
  KDKERNELS_INLINE Vec<T> scaled_derivative(Vec<T> x) const { return with_sign<T>(x, simd::sqrt(magnitude<T>(x))); }
};

template <typename T>
struct Square {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return x * x; }
  KDKERNELS_INLINE Vec<T> scaled_derivative(Vec<T> x) const { return x; }
};

template <typename T>
struct Cube {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return magnitude<T>(x) * (x * x); }
  KDKERNELS_INLINE Vec<T> scaled_derivative(Vec<T> x) const { return magnitude<T>(x) * x; }
};

template <typename T>
struct FourthPower {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return (x * x) * (x * x); }
  KDKERNELS_INLINE Vec<T> scaled_derivative(Vec<T> x) const { return (x * x) * x; }
};

template <typename T>
struct GeneralPower {
  T p;
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return simd::pow<T>(magnitude<T>(x), p); }
  KDKERNELS_INLINE Vec<T> scaled_derivative(Vec<T> x) const { return with_sign<T>(x, simd::pow<T>(magnitude<T>(x), p - T(1))); }
};

// Calls body(power), where power is of the type for the exponent p.
template <typename T, typename Body>
void with_power(double p, Body&& body) {
  if (p == 2) return body(Square<T>{});
  if (p == 1) return body(FirstPower<T>{});
  if (p == 4) return body(FourthPower<T>{});
  if (p == 1.5) return body(PowerOneAndAHalf<T>{});
  if (p == 3) return body(Cube<T>{});
  return body(GeneralPower<T>{static_cast<T>(p)});
}

}  // namespace kdkernels::attention_pool
