// |x|^p and its derivative divided by p, |x|^(p-1) sign(x), a vector at a time: one type per exponent that has a short form, and one for
// the rest. All give 0 and slope 0 at x = 0, also for p < 1, where the true slope has no bound.
#pragma once

#include "../common/simd.h"

namespace kdkernels::attention_pool {

using simd::Mask;
using simd::Vec;

template <typename T>
KDKERNELS_INLINE Vec<T> magnitude(Vec<T> x) {
  return (Vec<T>)((Mask<T>)x & std::numeric_limits<typename simd::IntOf<T>::type>::max());
}

// sign(x) size for size >= 0; 0 where x is 0.
template <typename T>
KDKERNELS_INLINE Vec<T> with_sign(Vec<T> x, Vec<T> size) {
  const Vec<T> result = (Vec<T>)((Mask<T>)size | ((Mask<T>)x & std::numeric_limits<typename simd::IntOf<T>::type>::min()));
  return x == T(0) ? Vec<T>{} : result;
}

template <typename T>
struct First {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return magnitude<T>(x); }
  KDKERNELS_INLINE Vec<T> slope(Vec<T> x) const { return x == x ? with_sign<T>(x, simd::splat<T>(T(1))) : x; }
};

template <typename T>
struct OneAndAHalf {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return magnitude<T>(x) * simd::sqrt(magnitude<T>(x)); }
  KDKERNELS_INLINE Vec<T> slope(Vec<T> x) const { return with_sign<T>(x, simd::sqrt(magnitude<T>(x))); }
};

template <typename T>
struct Square {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return x * x; }
  KDKERNELS_INLINE Vec<T> slope(Vec<T> x) const { return x; }
};

template <typename T>
struct Cube {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return magnitude<T>(x) * (x * x); }
  KDKERNELS_INLINE Vec<T> slope(Vec<T> x) const { return magnitude<T>(x) * x; }
};

template <typename T>
struct Fourth {
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return (x * x) * (x * x); }
  KDKERNELS_INLINE Vec<T> slope(Vec<T> x) const { return (x * x) * x; }
};

template <typename T>
struct General {
  T p;
  KDKERNELS_INLINE Vec<T> value(Vec<T> x) const { return simd::pow<T>(magnitude<T>(x), p); }
  KDKERNELS_INLINE Vec<T> slope(Vec<T> x) const { return with_sign<T>(x, simd::pow<T>(magnitude<T>(x), p - T(1))); }
};

// Calls body(power) with the type that fits p.
template <typename T, typename Body>
void with_power(double p, Body&& body) {
  if (p == 2) return body(Square<T>{});
  if (p == 1) return body(First<T>{});
  if (p == 4) return body(Fourth<T>{});
  if (p == 1.5) return body(OneAndAHalf<T>{});
  if (p == 3) return body(Cube<T>{});
  return body(General<T>{static_cast<T>(p)});
}

}  // namespace kdkernels::attention_pool
