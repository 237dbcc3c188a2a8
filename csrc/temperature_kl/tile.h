// Tiles, the units of work of the temperature_kl kernels. All stages of the kernels process a tile
// one vector at a time.
//
// The kernels use the same arithmetic for two kinds of tiles. If a row has many classes, adjacent in
// memory, a tile is one row: a vector holds neighbouring classes, and a sum over the classes ends with
// a sum across the lanes (AcrossLanes). If the rows are adjacent ([B, K, H, W] with dim=1) or have few
// classes, a tile is one vector of rows: a vector holds the same class of several rows, and no
// operation combines lanes (PerLane).
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

// Sums over many classes are computed in blocks of this many vectors, so that the rounding error
// grows with the length of a block plus the number of blocks.
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

// The type of numbers in memory. The arithmetic uses T (float or double); `native` is T itself.
enum class ElementType { native, bfloat16, half, other };

template <typename T>
ElementType element_type_of(at::ScalarType dtype) {
  if (dtype == c10::CppTypeToScalarType<T>::value) return ElementType::native;
  if constexpr (std::is_same_v<T, float>) return dtype == at::kBFloat16 ? ElementType::bfloat16 : ElementType::half;
  return ElementType::other;
}

// The logits of a tile as a sequence of vectors. Numbers are converted from Stored to T when they
// are read. If the last vector is partial, its missing classes are read as the lowest finite
// number. They have probability zero and, being equal in both networks, add nothing to any sum.
template <typename T, typename Stored = T>
class Source {
 public:
  static constexpr int lanes = simd::kLanes<T>;

  Source(const void* data, int64_t count)
      : data_(static_cast<const Stored*>(data)),
        full_(count / lanes),
        remainder_(count % lanes),
        tail_(load_some<T>(data_ + full_ * lanes, remainder_, std::numeric_limits<T>::lowest())) {}
  int64_t vectors() const { return full_ + (remainder_ > 0); }
  int64_t count() const { return full_ * lanes + remainder_; }
  KDKERNELS_INLINE Vec<T> operator[](int64_t j) const { return j < full_ ? load(data_ + j * lanes) : tail_; }

  // Prefetches vector j. Past the end of the row, this is usually part of the next one.
  KDKERNELS_INLINE void prefetch(int64_t j) const {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(data_) + j * lanes * sizeof(Stored)), 0, 2);
  }

  // A mask of the lanes of vector j that hold classes of the row.
  Mask<T> valid_lanes(int64_t j) const { return simd::first_lanes<T>(j < full_ ? lanes : remainder_); }
  template <typename Reduce>
  Vec<T> max() const {
    const Stored* data = data_;
    Vec<T> maxima[4];  // four independent chains, because each maximum depends on the previous one
    for (Vec<T>& maximum : maxima) maximum = splat<T>(-std::numeric_limits<T>::infinity());
    int64_t j = 0;
    for (const int64_t end = full_; j + 4 <= end; j += 4)
      for (int i = 0; i < 4; ++i) maxima[i] = simd::max(load(data + (j + i) * lanes), maxima[i]);
    for (; j < full_; ++j) maxima[0] = simd::max((*this)[j], maxima[0]);
    Vec<T> maximum = simd::max(simd::max(maxima[0], maxima[1]), simd::max(maxima[2], maxima[3]));
    maximum = simd::max(select<T>(simd::first_lanes<T>(remainder_), tail_, maximum), maximum);
    return Reduce::template max<T>(maximum);
  }

  // Calls body(j, this[j], other[j]) for the vectors [begin, end) of two tiles of the same size. In
  // the loop, no condition depends on j.
  template <typename Body>
  KDKERNELS_INLINE void for_each(const Source& other, int64_t begin, int64_t end, Body&& body) const {
    const Stored *x = data_, *y = other.data_;
    for (int64_t j = begin, last = std::min(end, full_); j < last; ++j) body(j, load(x + j * lanes), load(y + j * lanes));
    if (end > full_) body(full_, tail_, other.tail_);
  }

 private:
  static KDKERNELS_INLINE Vec<T> load(const Stored* p) {
    if constexpr (std::is_same_v<T, Stored>)
      return simd::load<T>(p);
    else
      return widen(p);
  }

  const Stored* data_;
  int64_t full_;
  int remainder_;
  Vec<T> tail_;
};

// A range of memory that will be read soon, in cache lines.
struct PrefetchRange {
  const char* begin = nullptr;
  int64_t lines = 0;
  KDKERNELS_INLINE void fetch(int64_t line) const {
    if (line < lines) __builtin_prefetch(begin + line * 64, 0, 2);
  }
};

// Writes the gradient of a tile, converted from T as it is written. With `streaming`, it is written
// past the caches if it is aligned and the instruction set can write that many bytes so.
template <typename T>
class Sink {
 public:
  static constexpr int lanes = simd::kLanes<T>;

  Sink(void* data, ElementType type, int64_t count, bool streaming)
      : data_(data),
        type_(type),
        full_(count / lanes),
        remainder_(count % lanes),
        streaming_(streaming && reinterpret_cast<uintptr_t>(data) % (type == ElementType::native ? simd::kBytes : simd::kBytes / 2) == 0) {}
  // Writes value(j) for the vectors j of [begin, end). In the loop, no condition depends on j.
  template <typename Value>
  KDKERNELS_INLINE void write(int64_t begin, int64_t end, Value&& value) const {
    const int64_t last = std::min(end, full_);
    with_address([&](auto* to) {
      if (streaming_)
        for (int64_t j = begin; j < last; ++j) stream(value(j), to + j * lanes);
      else
        for (int64_t j = begin; j < last; ++j) store(value(j), to + j * lanes);
    });
    if (end > full_) write(full_, value(full_));
  }
  KDKERNELS_INLINE void write(int64_t j, Vec<T> v) const {
    with_address([&](auto* to) {
      if (j < full_) return streaming_ ? stream(v, to + j * lanes) : store(v, to + j * lanes);
      store_some<T>(to + j * lanes, remainder_, v);
    });
  }

 private:
  // Calls body with the address, as a pointer to the stored type.
  template <typename Body>
  KDKERNELS_INLINE void with_address(Body&& body) const {
    if constexpr (std::is_same_v<T, float>) {
      if (type_ == ElementType::bfloat16) return body(static_cast<c10::BFloat16*>(data_));
      if (type_ == ElementType::half) return body(static_cast<c10::Half*>(data_));
    }
    body(static_cast<T*>(data_));
  }
  static KDKERNELS_INLINE void store(Vec<T> v, T* to) { simd::store<T>(to, v); }
  static KDKERNELS_INLINE void stream(Vec<T> v, T* to) { simd::stream<T>(to, v); }
  template <typename Half>
  static KDKERNELS_INLINE void store(Vec<T> v, Half* to) {
    narrow(v, to);
  }
  template <typename Half>
  static KDKERNELS_INLINE void stream(Vec<T> v, Half* to) {
    stream_narrowed(v, to);
  }

  void* data_;
  ElementType type_;
  int64_t full_;
  int remainder_;
  bool streaming_;
};

}  // namespace kdkernels::temperature_kl
