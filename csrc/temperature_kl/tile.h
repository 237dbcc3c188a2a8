// What all stages of the temperature-KL kernels work on: a tile, one vector of classes or one vector of rows at a time.
//
// Two layouts share the arithmetic. Where the classes of a row are adjacent in memory a tile is one row, a vector holds neighbouring
// classes, and a sum over classes ends with a sum across the lanes (AcrossLanes). Where the rows are adjacent ([B, K, H, W] with dim=1) a
// tile is one vector of rows, a vector holds the same class of neighbouring rows, and the lanes never meet (PerLane).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../common/convert.h"
#include "../common/simd.h"

namespace kdkernels::temperature_kl {

using simd::any;
using simd::Mask;
using simd::select;
using simd::splat;
using simd::Vec;

// Sums over many classes run in blocks, so that the rounding error grows with the length of a block plus the number of blocks.
constexpr int64_t kBlock = 64;

struct AcrossLanes {
  template <typename T>
  static Vec<T> sum(Vec<T> v) {
    return splat<T>(simd::sum<T>(v));
  }
  template <typename T>
  static Vec<T> max(Vec<T> v) {
    return splat<T>(simd::largest<T>(v));
  }
};

struct PerLane {
  template <typename T>
  static Vec<T> sum(Vec<T> v) {
    return v;
  }
  template <typename T>
  static Vec<T> max(Vec<T> v) {
    return v;
  }
};

// Numbers as they lie in memory; the arithmetic is in T (float, or double).
enum class Element { native, bfloat16, half, other };

template <typename T>
Element element_of(at::ScalarType dtype) {
  if (dtype == c10::CppTypeToScalarType<T>::value) return Element::native;
  if constexpr (std::is_same_v<T, float>) return dtype == at::kBFloat16 ? Element::bfloat16 : Element::half;
  return Element::other;
}

// The logits of a row as a sequence of vectors, converted as they are read. The last vector may be partial: its missing classes read as the
// lowest finite number, which has probability zero and, being equal in both nets, adds nothing to any sum.
template <typename T>
class Source {
 public:
  static constexpr int lanes = simd::kLanes<T>;

  Source(const void* body, Element element, int64_t count) : body_(body), element_(element), full_(count / lanes), rest_(count % lanes) {
    for (int i = 0; i < lanes; ++i) tail_[i] = std::numeric_limits<T>::lowest();
    if (element == Element::native) std::memcpy(tail_, static_cast<const T*>(body) + full_ * lanes, rest_ * sizeof(T));
    if constexpr (std::is_same_v<T, float>) {
      if (element == Element::bfloat16) convert(static_cast<const c10::BFloat16*>(body) + full_ * lanes, tail_, rest_);
      if (element == Element::half) convert(static_cast<const c10::Half*>(body) + full_ * lanes, tail_, rest_);
    }
  }
  int64_t vectors() const { return full_ + (rest_ > 0); }
  int64_t count() const { return full_ * lanes + rest_; }
  KDKERNELS_INLINE Vec<T> operator[](int64_t j) const {
    if constexpr (std::is_same_v<T, float>) {
      if (element_ == Element::bfloat16 && j < full_) return widen(static_cast<const c10::BFloat16*>(body_) + j * lanes);
      if (element_ == Element::half && j < full_) return widen(static_cast<const c10::Half*>(body_) + j * lanes);
    }
    return simd::load<T>(j < full_ ? static_cast<const T*>(body_) + j * lanes : tail_);
  }
  // Whether the lanes of vector j are classes of the row.
  Mask<T> present(int64_t j) const {
    Mask<T> mask;
    for (int i = 0; i < lanes; ++i) mask[i] = (j < full_ || i < rest_) ? -1 : 0;
    return mask;
  }
  template <typename Reduce>
  Vec<T> max() const {
    Vec<T> tops[4];  // four chains, because a maximum waits for the one before it
    for (Vec<T>& top : tops) top = splat<T>(-std::numeric_limits<T>::infinity());
    int64_t j = 0;
    for (; j + 4 <= full_; j += 4)
      for (int i = 0; i < 4; ++i) tops[i] = simd::max((*this)[j + i], tops[i]);
    for (; j < full_; ++j) tops[0] = simd::max((*this)[j], tops[0]);
    Vec<T> top = simd::max(simd::max(tops[0], tops[1]), simd::max(tops[2], tops[3]));
    for (int i = 0; i < rest_; ++i) top[i] = std::max(tail_[i], top[i]);
    return Reduce::template max<T>(top);
  }

 private:
  const void* body_;
  Element element_;
  int64_t full_;
  int rest_;
  T tail_[lanes];
};

// Memory that is about to be read, as cache lines.
struct Ahead {
  const char* begin = nullptr;
  int64_t lines = 0;
  KDKERNELS_INLINE void fetch(int64_t line) const {
    if (line < lines) __builtin_prefetch(begin + line * 64, 0, 2);
  }
};

// Where the gradient of a row goes, converted as it is written. `streamed` writes native numbers past the caches, where they are aligned.
template <typename T>
class Sink {
 public:
  static constexpr int lanes = simd::kLanes<T>;

  Sink(void* body, Element element, int64_t count, bool streamed)
      : body_(body),
        element_(element),
        full_(count / lanes),
        rest_(count % lanes),
        streamed_(streamed && reinterpret_cast<uintptr_t>(body) % simd::kBytes == 0) {}
  KDKERNELS_INLINE void put(int64_t j, Vec<T> v) const {
    if constexpr (std::is_same_v<T, float>) {
      if (element_ == Element::bfloat16) return put_half(static_cast<c10::BFloat16*>(body_), j, v);
      if (element_ == Element::half) return put_half(static_cast<c10::Half*>(body_), j, v);
    }
    T* to = static_cast<T*>(body_) + j * lanes;
    if (j == full_)
      std::memcpy(to, &v, rest_ * sizeof(T));
    else if (streamed_)
      simd::stream<T>(to, v);
    else
      simd::store<T>(to, v);
  }

 private:
  template <typename Half>
  KDKERNELS_INLINE void put_half(Half* to, int64_t j, Vec<T> v) const {
    if (j < full_) return narrow(v, to + j * lanes);
    Half last[lanes];
    narrow(v, last);
    std::memcpy(to + j * lanes, last, rest_ * sizeof(Half));
  }

  void* body_;
  Element element_;
  int64_t full_;
  int rest_;
  bool streamed_;
};

}  // namespace kdkernels::temperature_kl
