// Conversion of rows of float16 or bfloat16 numbers to and from float, one vector at a time.
#pragma once

#include <ATen/Dispatch.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "simd.h"

namespace kdkernels {

using ShortVec = uint16_t __attribute__((vector_size(simd::kBytes / 2)));

KDKERNELS_INLINE simd::Vec<float> widen(const c10::BFloat16* p) {
  ShortVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return (simd::Vec<float>)(__builtin_convertvector(bits, simd::Mask<float>) << 16);
}

KDKERNELS_INLINE void narrow(simd::Vec<float> v, c10::BFloat16* p) {
  using I = simd::Mask<float>;
  const I bits = (I)v;
  const I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // round to nearest, ties to even
  const I result = v == v ? rounded : I{} + 0x7fc0;
  const ShortVec shorts = __builtin_convertvector(result, ShortVec);
  std::memcpy(p, &shorts, sizeof shorts);
}

#if defined(__AVX512F__)
KDKERNELS_INLINE simd::Vec<float> widen(const c10::Half* p) {
  return (simd::Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KDKERNELS_INLINE void narrow(simd::Vec<float> v, c10::Half* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
KDKERNELS_INLINE simd::Vec<float> widen(const c10::Half* p) {
  return (simd::Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KDKERNELS_INLINE void narrow(simd::Vec<float> v, c10::Half* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
KDKERNELS_INLINE simd::Vec<float> widen(const c10::Half* p) {
  float16x4_t half;
  std::memcpy(&half, p, sizeof half);
  return (simd::Vec<float>)vcvt_f32_f16(half);
}
KDKERNELS_INLINE void narrow(simd::Vec<float> v, c10::Half* p) {
  const float16x4_t half = vcvt_f16_f32((float32x4_t)v);
  std::memcpy(p, &half, sizeof half);
}
#else
KDKERNELS_INLINE simd::Vec<float> widen(const c10::Half* p) {
  simd::Vec<float> v;
  for (int i = 0; i < simd::kLanes<float>; ++i) v[i] = p[i];
  return v;
}
KDKERNELS_INLINE void narrow(simd::Vec<float> v, c10::Half* p) {
  for (int i = 0; i < simd::kLanes<float>; ++i) p[i] = v[i];
}
#endif

template <typename From, typename To>
KDKERNELS_INLINE void convert(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    int64_t i = 0;
    if constexpr (std::is_same_v<To, float> && sizeof(From) == 2) {
      for (; i + simd::kLanes<float> <= count; i += simd::kLanes<float>) simd::store<float>(to + i, widen(from + i));
    } else if constexpr (std::is_same_v<From, float> && sizeof(To) == 2) {
      for (; i + simd::kLanes<float> <= count; i += simd::kLanes<float>) narrow(simd::load<float>(from + i), to + i);
    }
    for (; i < count; ++i) to[i] = static_cast<To>(from[i]);
  }
}

// Calls body with a null pointer to the type in which tensors that are computed in T are stored. With
// `narrower`, T may be double for tensors of any type.
template <typename T, bool narrower = false, typename Body>
void with_storage(at::ScalarType stored, Body&& body) {
  if constexpr (std::is_same_v<T, float> || narrower) {
    if (stored == at::kBFloat16) return body(static_cast<c10::BFloat16*>(nullptr));
    if (stored == at::kHalf) return body(static_cast<c10::Half*>(nullptr));
  }
  if constexpr (std::is_same_v<T, double> && narrower)
    if (stored == at::kFloat) return body(static_cast<float*>(nullptr));
  body(static_cast<T*>(nullptr));
}

}  // namespace kdkernels
