// Vectors of float or double with the width of the instruction set for which this file is compiled,
// and the elementary functions that the kernels share.
//
// The types are the vector extensions of GCC and Clang: the operators + - * / < == & | and ?: work
// lane by lane on every target. Only operations that these operators cannot express well (max, any,
// broadcasts of several numbers, streaming stores) use intrinsics. A source that includes this
// header is compiled once per instruction set; code that must run on every CPU must not include it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// The kernels' inner loops consist of these functions; a function call in such a loop costs more
// than the function's body.
#define KDKERNELS_INLINE inline __attribute__((always_inline))

namespace kdkernels::simd {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;  // SSE2, NEON
#endif

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

template <typename T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <typename T>
using Mask = Vec<typename IntOf<T>::type>;  // in each lane, all bits are set or none

template <typename T>
KDKERNELS_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <typename T>
KDKERNELS_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
KDKERNELS_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The W numbers at p, again and again in all lanes. W divides the number of lanes.
template <typename T, int W>
KDKERNELS_INLINE Vec<T> repeat(const T* p) {
  constexpr int bytes = W * static_cast<int>(sizeof(T));
  if constexpr (W == 1) {
    return splat<T>(*p);
  } else if constexpr (bytes == kBytes) {
    return load<T>(p);
  } else if constexpr (bytes == 8) {
    int64_t numbers;
    std::memcpy(&numbers, p, sizeof numbers);
    return (Vec<T>)(numbers - Vec<int64_t>{});
  } else {
#if defined(__AVX512F__)
    if constexpr (bytes == 16)
      return (Vec<T>)_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
    else
      return (Vec<T>)_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(p)));
#elif defined(__AVX2__)
    return (Vec<T>)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
  }
}

// Stores lanes [begin, end) of v at p[begin], ..., and leaves the rest of the memory alone.
KDKERNELS_INLINE void store_lanes(double* p, int64_t begin, int64_t end, Vec<double> v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << end) - (1u << begin)), (__m512d)v);
#else
  for (int64_t i = begin; i < end; ++i) p[i] = v[i];
#endif
}

// A mask of the lanes l < count.
template <typename T>
KDKERNELS_INLINE Mask<T> first_lanes(int64_t count) {
  Mask<T> number;
  for (int l = 0; l < kLanes<T>; ++l) number[l] = l;
  return number < static_cast<typename IntOf<T>::type>(count);
}

// Loads the first `count` lanes and sets the others to `rest`. Reads no other memory.
KDKERNELS_INLINE Vec<float> load_some(const float* p, int64_t count, float rest) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), static_cast<__mmask16>((1u << count) - 1), p);
#elif defined(__AVX2__)
  const Mask<float> inside = first_lanes<float>(count);
  return inside ? (Vec<float>)_mm256_maskload_ps(p, (__m256i)inside) : splat<float>(rest);
#else
  Vec<float> v = splat<float>(rest);
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
KDKERNELS_INLINE Vec<double> load_some(const double* p, int64_t count, double rest) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_mask_loadu_pd(_mm512_set1_pd(rest), static_cast<__mmask8>((1u << count) - 1), p);
#elif defined(__AVX2__)
  const Mask<double> inside = first_lanes<double>(count);
  return inside ? (Vec<double>)_mm256_maskload_pd(p, (__m256i)inside) : splat<double>(rest);
#else
  Vec<double> v = splat<double>(rest);
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

// Stores the first `count` lanes and leaves the rest of the memory alone.
KDKERNELS_INLINE void store_some(float* p, int64_t count, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}
KDKERNELS_INLINE void store_some(double* p, int64_t count, Vec<double> v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

template <typename T>
KDKERNELS_INLINE Vec<T> select(Mask<T> m, Vec<T> yes, Vec<T> no) {
  return m ? yes : no;
}

// a > b ? a : b in each lane. The result is therefore b if either is NaN.
KDKERNELS_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
KDKERNELS_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b in each lane. The result is therefore b if either is NaN.
KDKERNELS_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
KDKERNELS_INLINE Vec<double> min(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

KDKERNELS_INLINE Vec<float> sqrt(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_sqrt_ps((__m128)v);
#elif defined(__aarch64__)
  return (Vec<float>)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
KDKERNELS_INLINE Vec<double> sqrt(Vec<double> v) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_sqrt_pd((__m128d)v);
#elif defined(__aarch64__)
  return (Vec<double>)vsqrtq_f64((float64x2_t)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// a b + c, rounded once where the CPU has an instruction for it. The compiler fuses most products with
// additions by itself; this is for loops that must give the same bits.
KDKERNELS_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
KDKERNELS_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// v, as a number that the compiler knows nothing about: it cannot fuse the product that gave it with an
// addition.
template <typename T>
KDKERNELS_INLINE Vec<T> rounded(Vec<T> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

template <typename M>
KDKERNELS_INLINE bool any(M m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)m) != 0;
#else
  int64_t words[kBytes / 8];
  std::memcpy(words, &m, sizeof m);
  int64_t combined = 0;
  for (int64_t word : words) combined |= word;
  return combined != 0;
#endif
}

// A streaming store, which bypasses the caches; for results too large to stay in a cache until they
// are read. p must be aligned to kBytes. fence() orders these writes.
template <typename T>
KDKERNELS_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}
KDKERNELS_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The sum of all lanes. Adds the upper half of the lanes to the lower half until one lane is left,
// in this order on every target.
template <typename T>
KDKERNELS_INLINE T sum(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd((__m512d)v);
#endif
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The largest lane. If only some lanes are NaN, they may be ignored or not.
template <typename T>
KDKERNELS_INLINE T largest(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_max_pd((__m512d)v);
#endif
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

template <typename T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float log2e = 1.44269504f, ln2 = 0.693147181f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float round_magic = 12582912.0f;                 // 1.5 * 2^23: adding it rounds to an integer, stored in the low bits
  static constexpr float exp_lowest = -87.0f, exp_highest = 88.0f;  // e^x is a normal number between these
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  // Coefficients of (e^r - 1 - r) / r^2 for |r| <= ln2 / 2, highest power first. They minimise the
  // largest error of e^r, which is 4e-9, and are exact at 0.
  static constexpr float exp_poly[] = {0.00139505404f, 0.00836891774f, 0.041666206f, 0.166665182f, 0.5f};
};

template <>
struct Constants<double> {
  static constexpr double log2e = 1.4426950408889634, ln2 = 0.693147180559945309, ln2_hi = 0.693147180369123816490,
                          ln2_lo = 1.90821492927058770002e-10;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_lowest = -708.0, exp_highest = 709.0;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  // Coefficients of the Taylor series up to r^14 / 14!.
  static constexpr double exp_poly[] = {
      1 / 87178291200.0, 1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
      1 / 5040.0,        1 / 720.0,        1 / 120.0,       1 / 24.0,       1 / 6.0,       0.5};
};

// e^y = scale * (1 + r + h), where scale is a power of two, |r| <= ln2 / 2 and h = e^r - 1 - r. For
// |y| <= ln2 / 2, scale is 1 and r is y itself, so e^y - 1 = r + h and e^y - 1 - y = h are computed
// without cancellation.
template <typename T>
struct ExpParts {
  Vec<T> scale, r, h;
};

// (e^r - 1 - r) / r^2 for |r| <= ln2 / 2.
template <typename T>
KDKERNELS_INLINE Vec<T> exp_polynomial(Vec<T> r, Vec<T> square) {
  constexpr auto& c = Constants<T>::exp_poly;
  if constexpr (std::size(c) == 5) {  // Estrin's scheme: as many operations as Horner's, of which fewer wait for another
    const Vec<T> low = r * c[3] + c[4], middle = r * c[1] + c[2];
    return (square * c[0] + middle) * square + low;
  } else {
    Vec<T> poly = splat<T>(c[0]);
    for (size_t k = 1; k < std::size(c); ++k) poly = poly * r + c[k];
    return poly;
  }
}

template <typename T>
KDKERNELS_INLINE ExpParts<T> exp_parts(Vec<T> y) {
  using C = Constants<T>;
  using I = Mask<T>;
  const Vec<T> shifted = y * C::log2e + C::round_magic;
  const Vec<T> n = shifted - C::round_magic;
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
  const Vec<T> r = y - n * C::ln2;  // fused: the only error is n times the rounding error of ln2, below n * 2e-9
#else
  const Vec<T> r = (y - n * C::ln2_hi) - n * C::ln2_lo;
#endif
  // The integer n is in the low bits of `shifted`. The shift by the width of the mantissa discards
  // the bits of the magic number above n.
  const I exponent = ((I)shifted + C::exponent_bias) << C::mantissa_bits;
  const Vec<T> square = r * r;
  return {(Vec<T>)exponent, r, exp_polynomial<T>(r, square) * square};
}

// e^y for any y: 0 below the range of normal numbers (hence e^-inf = 0), e^exp_highest above it,
// and NaN for NaN.
template <typename T>
KDKERNELS_INLINE Vec<T> exp(Vec<T> y) {
  using C = Constants<T>;
  const Vec<T> low = splat<T>(C::exp_lowest), high = splat<T>(C::exp_highest);
  const Vec<T> clamped = y > high ? high : y;
  const ExpParts<T> p = exp_parts<T>(max(low, clamped));
  const Vec<T> value = p.scale * (T(1) + (p.r + p.h));
  return y < low ? Vec<T>{} : value;
}

// e^y for y <= 0 or NaN; 0 below the range of normal numbers.
template <typename T>
KDKERNELS_INLINE Vec<T> exp_falling(Vec<T> y) {
  using C = Constants<T>;
  const Vec<T> low = splat<T>(C::exp_lowest);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {  // the multiplication by 2^n is one instruction
    const Vec<T> n = (Vec<T>)_mm512_roundscale_ps((__m512)(y * C::log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec<T> r = y - n * C::ln2, square = r * r;
    const Vec<T> power = exp_polynomial<T>(r, square) * square + (r + T(1));
    return y < low ? Vec<T>{} : (Vec<T>)_mm512_scalef_ps((__m512)power, (__m512)n);
  }
#endif
  const ExpParts<T> p = exp_parts<T>(max(low, y));
  return y < low ? Vec<T>{} : p.scale * (p.r + p.h) + p.scale;
}

// log(u) for positive finite u; -inf for 0, inf for inf, and NaN for negative numbers and NaN. Uses
// u = 2^n * m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh(z) with z = (m - 1) / (m + 1).
template <typename T>
KDKERNELS_INLINE Vec<T> log(Vec<T> u) {
  using C = Constants<T>;
  using I = Mask<T>;
  using Int = typename IntOf<T>::type;
  constexpr int bits = C::mantissa_bits;
  const T root_half = T(0.70710678118654752);
  // Subtracting the bits of sqrt(1/2) moves the boundary between two exponents to sqrt(1/2).
  Int root_bits;
  std::memcpy(&root_bits, &root_half, sizeof root_bits);
  const I offset = (I)u - root_bits;
  const I n = offset >> bits;
  const Vec<T> m = (Vec<T>)((offset & ((Int(1) << bits) - 1)) + root_bits);
  const Vec<T> z = (m - T(1)) / (m + T(1));
  const Vec<T> z2 = z * z;  // |z| <= 0.1716
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  Vec<T> poly = splat<T>(T(1.0 / (2 * terms + 1)));
  for (int k = terms - 1; k >= 1; --k) poly = poly * z2 + T(1.0 / (2 * k + 1));
  const Vec<T> exponent = __builtin_convertvector(n, Vec<T>);
  const Vec<T> small = T(2) * z * z2 * poly + exponent * C::ln2_lo;
  Vec<T> result = (small + T(2) * z) + exponent * C::ln2_hi;
  const T inf = std::numeric_limits<T>::infinity();
  result = u == inf ? u : result;
  result = u == T(0) ? splat<T>(-inf) : result;
  return u >= T(0) ? result : splat<T>(std::numeric_limits<T>::quiet_NaN());
}

// u^p for u >= 0 and any p; 0^p is 0, and NaN stays NaN. Uses log2 u = n + log2 m as in log(). The
// integer part of n p is split off without rounding, so the error does not grow with the magnitude
// of n p.
template <typename T>
KDKERNELS_INLINE Vec<T> pow(Vec<T> u, T p) {
  using C = Constants<T>;
  using I = Mask<T>;
  using Int = typename IntOf<T>::type;
  constexpr int bits = C::mantissa_bits;
  // Subnormal numbers are scaled up first.
  const T tiny_scale = T(int64_t(1) << (bits + 1));
  const Mask<T> tiny = u < std::numeric_limits<T>::min();
  const Vec<T> scaled = tiny ? u * tiny_scale : u;
  const T root_half = T(0.70710678118654752);
  Int root_bits;
  std::memcpy(&root_bits, &root_half, sizeof root_bits);
  const I offset = (I)scaled - root_bits;
  const Vec<T> n = __builtin_convertvector((offset >> bits) - (tiny & Int(bits + 1)), Vec<T>);
  const Vec<T> m = (Vec<T>)((offset & ((Int(1) << bits) - 1)) + root_bits);
  const Vec<T> z = (m - T(1)) / (m + T(1));
  const Vec<T> z2 = z * z;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  Vec<T> poly = splat<T>(T(1.0 / (2 * terms + 1)));
  for (int k = terms - 1; k >= 1; --k) poly = poly * z2 + T(1.0 / (2 * k + 1));
  const Vec<T> log_m = T(2) * z + T(2) * z * z2 * poly;  // natural, |log_m| <= ln2 / 2
  // Split p into two parts so that the product of n and the first part is exact.
  Int p_bits;
  std::memcpy(&p_bits, &p, sizeof p);
  p_bits &= ~((Int(1) << (bits / 2)) - 1);
  T p_high;
  std::memcpy(&p_high, &p_bits, sizeof p);
  const Vec<T> exact_product = n * p_high;
  const Vec<T> integer_part = (exact_product + C::round_magic) - C::round_magic;
  const Vec<T> remainder = ((exact_product - integer_part) + n * (p - p_high)) * C::ln2 + log_m * p;
  const Vec<T> limit = splat<T>(T(2 * C::exponent_bias - 2));  // beyond both ends of the range, while half of it is still a valid exponent
  const Vec<T> clamped = integer_part > limit ? limit : integer_part < -limit ? -limit : integer_part;
  // Multiply by 2^clamped in two steps, so that no intermediate result near the ends of the range
  // leaves it.
  const Vec<T> half = (clamped * T(0.5) + C::round_magic) - C::round_magic;
  auto power_of_two = [](Vec<T> k) { return (Vec<T>)((__builtin_convertvector(k, I) + C::exponent_bias) << bits); };
  Vec<T> result = exp<T>(remainder) * power_of_two(half) * power_of_two(clamped - half);
  result = u == T(0) ? Vec<T>{} : result;
  const T inf = std::numeric_limits<T>::infinity();
  result = u == inf ? splat<T>(p > 0 ? inf : T(0)) : result;
  return u == u ? result : u;
}

// log(1 + x), accurate for small x: the rounding error of 1 + x is corrected to first order.
template <typename T>
KDKERNELS_INLINE Vec<T> log1p(Vec<T> x) {
  const Vec<T> u = T(1) + x;
  const Vec<T> rounding_error = ((u - T(1)) - x) / u;
  const Vec<T> result = log<T>(u);
  return result - (u < std::numeric_limits<T>::infinity() && u > T(0) ? rounding_error : Vec<T>{});
}

// The dot product <x, y> of two arrays of n numbers, for any n.
template <typename T>
double dot_product(const T* x, const T* y, int64_t n) {
  Vec<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>)
    for (int c = 0; c < 4; ++c) sum[c] += load<T>(x + i + c * kLanes<T>) * load<T>(y + i + c * kLanes<T>);
  double total = simd::sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += static_cast<double>(x[i]) * y[i];
  return total;
}

}  // namespace kdkernels::simd
