// Conversion of rows of float16 or bfloat16 numbers to and from float, one vector at a time.
#pragma once

#include <ATen/Dispatch.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "simd.h"

namespace kdkernels {

using ShortVec = uint16_t __attribute__((vector_size(simd::kBytes / 2)));

// Intrinsics, because GCC 12 converts a vector of short integers in two halves.
KDKERNELS_INLINE simd::Vec<float> widen(const c10::BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (simd::Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (simd::Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  ShortVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return (simd::Vec<float>)(__builtin_convertvector(bits, simd::Mask<float>) << 16);
#endif
}

// The bits of v as bfloat16 or float16 numbers, rounded to nearest, ties to even.
KDKERNELS_INLINE ShortVec narrowed(simd::Vec<float> v, const c10::BFloat16*) {
  using I = simd::Mask<float>;
  const I bits = (I)v;
  const I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const I result = v == v ? rounded : I{} + 0x7fc0;
#if defined(__AVX512F__)
  return (ShortVec)_mm512_cvtepi32_epi16((__m512i)result);
#else
  return __builtin_convertvector(result, ShortVec);
#endif
}

#if defined(__AVX512F__)
KDKERNELS_INLINE simd::Vec<float> widen(const c10::Half* p) {
  return (simd::Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KDKERNELS_INLINE ShortVec narrowed(simd::Vec<float> v, const c10::Half*) {
  return (ShortVec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
KDKERNELS_INLINE simd::Vec<float> widen(const c10::Half* p) {
  return (simd::Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KDKERNELS_INLINE ShortVec narrowed(simd::Vec<float> v, const c10::Half*) {
  return (ShortVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__aarch64__)
KDKERNELS_INLINE simd::Vec<float> widen(const c10::Half* p) {
  float16x4_t half;
  std::memcpy(&half, p, sizeof half);
  return (simd::Vec<float>)vcvt_f32_f16(half);
}
KDKERNELS_INLINE ShortVec narrowed(simd::Vec<float> v, const c10::Half*) {
  return (ShortVec)vcvt_f16_f32((float32x4_t)v);
}
#else
KDKERNELS_INLINE simd::Vec<float> widen(const c10::Half* p) {
  simd::Vec<float> v;
  for (int i = 0; i < simd::kLanes<float>; ++i) v[i] = p[i];
  return v;
}
KDKERNELS_INLINE ShortVec narrowed(simd::Vec<float> v, const c10::Half*) {
  c10::Half halves[simd::kLanes<float>];
  for (int i = 0; i < simd::kLanes<float>; ++i) halves[i] = v[i];
  ShortVec bits;
  std::memcpy(&bits, halves, sizeof bits);
  return bits;
}
#endif

template <typename Half>
KDKERNELS_INLINE void narrow(simd::Vec<float> v, Half* p) {
  const ShortVec bits = narrowed(v, p);
  std::memcpy(p, &bits, sizeof bits);
}

// A streaming store of the narrowed numbers, with AVX2 and AVX-512; otherwise an ordinary one. p must
// be aligned to half of a vector.
template <typename Half>
KDKERNELS_INLINE void stream_narrowed(simd::Vec<float> v, Half* p) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrowed(v, p));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrowed(v, p));
#else
  narrow(v, p);
#endif
}

// Loads the first `count` lanes, converted to T, and sets the others to `rest`. Reads no other memory.
template <typename T, typename Storage>
KDKERNELS_INLINE simd::Vec<T> load_some(const Storage* p, int64_t count, T rest = 0) {
  if constexpr (std::is_same_v<T, Storage>) {
    return simd::load_some(p, count, rest);
  } else if constexpr (std::is_same_v<T, float> && sizeof(Storage) == 2) {
    alignas(simd::kBytes) Storage numbers[simd::kLanes<float>] = {};
#if defined(__AVX512F__)
    _mm256_store_si256(reinterpret_cast<__m256i*>(numbers), _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
#else
    for (int64_t i = 0; i < count; ++i) numbers[i] = p[i];
#endif
    return simd::first_lanes<float>(count) ? widen(numbers) : simd::splat<float>(rest);
  } else {
    simd::Vec<T> v = simd::splat<T>(rest);
    for (int64_t i = 0; i < count; ++i) v[i] = static_cast<T>(p[i]);
    return v;
  }
}

// Stores the first `count` lanes, converted from T, and leaves the rest of the memory alone.
template <typename T, typename Storage>
KDKERNELS_INLINE void store_some(Storage* p, int64_t count, simd::Vec<T> v) {
  if constexpr (std::is_same_v<T, Storage>)
    simd::store_some(p, count, v);
  else
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<Storage>(v[i]);
}

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
