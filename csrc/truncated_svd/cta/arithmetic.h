// Loads, stores and arithmetic of numbers, for the device and for the host.
#pragma once

#include <cstdint>
#include <limits>

#include "../../common/cta.h"
#include "problem.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>
#endif

namespace kdkernels::truncated_svd::gpu {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

#ifdef __CUDACC__
KDKERNELS_GPU float widen(Half x) {
  return __half2float(__ushort_as_half(x.bits));
}
KDKERNELS_GPU float widen(Bfloat x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
KDKERNELS_GPU void round_to(float x, Half& y) {
  y.bits = __half_as_ushort(__float2half_rn(x));
}
KDKERNELS_GPU void round_to(float x, Bfloat& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
KDKERNELS_GPU double power_of_two(int exponent) {  // a normal number
  return __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
}
KDKERNELS_GPU int exponent_of(double x) {  // floor(log2 x) of a normal number
  return static_cast<int>((__double_as_longlong(x) >> 52) & 0x7ff) - 1023;
}
#else
inline float widen(Half x) {
  return c10::Half(x.bits, c10::Half::from_bits());
}
inline float widen(Bfloat x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline void round_to(float x, Half& y) {
  y.bits = c10::Half(x).x;
}
inline void round_to(float x, Bfloat& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  y.bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
}
inline double power_of_two(int exponent) {
  return std::ldexp(1.0, exponent);
}
inline int exponent_of(double x) {
  return std::ilogb(x);
}
inline float sqrtf(float x) {
  return std::sqrt(x);
}
#endif

KDKERNELS_GPU float square_root(float x) {
  return sqrtf(x);
}
KDKERNELS_GPU double square_root(double x) {
  return sqrt(x);
}
template <typename T>
KDKERNELS_GPU T absolute(T x) {
  return x < T(0) ? -x : x;
}
template <typename T>
KDKERNELS_GPU T larger(T x, T y) {
  return x > y ? x : y;
}
KDKERNELS_GPU int smaller(int x, int y) {
  return x < y ? x : y;
}
template <typename T>
KDKERNELS_GPU bool is_finite(T x) {
  return x - x == T(0);
}

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float eps = 1.1920929e-7f, largest = 3.4028235e38f, smallest = 1.1754944e-38f,
                         nan = std::numeric_limits<float>::quiet_NaN();
  static constexpr int digits = 24, max_exponent = 128;
};
template <>
struct Limits<double> {
  static constexpr double eps = 2.220446049250313e-16, largest = 1.7976931348623157e308, smallest = 2.2250738585072014e-308,
                          nan = std::numeric_limits<double>::quiet_NaN();
  static constexpr int digits = 53, max_exponent = 1024;
};

// The power of two that brings x > 0 into [1/2, 1), or as close to it as is possible with a power
// of two that T can represent.
template <typename T>
KDKERNELS_GPU double normalizing_power(double x) {
  constexpr int max_exponent = Limits<T>::max_exponent - 2;
  const int exponent = -exponent_of(x) - 1;
  return power_of_two(exponent > max_exponent ? max_exponent : exponent < -max_exponent ? -max_exponent : exponent);
}

// Number `index` of memory that is stored in `storage`, as a number of type T, in which the
// computation runs.
template <typename T>
KDKERNELS_GPU T load(const void* from, Storage storage, int64_t index) {
  if constexpr (sizeof(T) == 8) return static_cast<const double*>(from)[index];
  if (storage == Storage::float32) return static_cast<const float*>(from)[index];
  if (storage == Storage::bfloat16) return widen(static_cast<const Bfloat*>(from)[index]);
  return widen(static_cast<const Half*>(from)[index]);
}
// Calls f with `to` as a pointer to the numbers that are stored there.
template <typename T, typename F>
KDKERNELS_GPU void with_storage(void* to, Storage storage, F f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(to));
  } else {
    if (storage == Storage::float32) f(static_cast<float*>(to));
    if (storage == Storage::bfloat16) f(static_cast<Bfloat*>(to));
    if (storage == Storage::float16) f(static_cast<Half*>(to));
  }
}
KDKERNELS_GPU void round_to(float x, float& y) {
  y = x;
}
KDKERNELS_GPU void round_to(double x, double& y) {
  y = x;
}
// Whether numbers are stored as T.
template <typename T>
KDKERNELS_GPU bool is_stored_as(Storage storage) {
  return storage == (sizeof(T) == 8 ? Storage::float64 : Storage::float32);
}

// Four numbers that are loaded at once.
template <typename T>
struct alignas(16) Four {
  T x[4];
};
template <typename T>
KDKERNELS_GPU Four<T> load_four(const T* from) {
  return *reinterpret_cast<const Four<T>*>(from);
}

}  // namespace kdkernels::truncated_svd::gpu
