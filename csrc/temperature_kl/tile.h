// What all stages of the temperature-KL kernels work on: a tile, one vector of classes or one vector of rows at a time.
//
// Two layouts share the arithmetic. Where the classes of a row are adjacent in memory a tile is one row, a vector holds neighbouring classes,
// and a sum over classes ends with a sum across the lanes (AcrossLanes). Where the rows are adjacent ([B, K, H, W] with dim=1) a tile is
// one vector of rows, a vector holds the same class of neighbouring rows, and the lanes never meet (PerLane).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../simd.h"

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

// The logits of a tile as a sequence of vectors. The last one of a row may be partial: its missing classes read as the lowest finite
// number, which has probability zero and, being equal in both nets, adds nothing to any sum.
template <typename T>
class Source {
 public:
  Source(const T* body, int64_t count) : body_(body), full_(count / simd::kLanes<T>), rest_(count % simd::kLanes<T>) {
    for (int i = 0; i < simd::kLanes<T>; ++i) tail_[i] = i < rest_ ? body[full_ * simd::kLanes<T> + i] : std::numeric_limits<T>::lowest();
  }
  int64_t vectors() const { return full_ + (rest_ > 0); }
  Vec<T> operator[](int64_t j) const { return simd::load<T>(j < full_ ? body_ + j * simd::kLanes<T> : tail_); }
  // Whether lane i of vector j is a class of the row.
  Mask<T> present(int64_t j) const {
    Mask<T> mask;
    for (int i = 0; i < simd::kLanes<T>; ++i) mask[i] = (j < full_ || i < rest_) ? -1 : 0;
    return mask;
  }
  template <typename Reduce>
  Vec<T> max() const {
    Vec<T> top = splat<T>(-std::numeric_limits<T>::infinity());
    for (int64_t j = 0; j < full_; ++j) top = simd::max((*this)[j], top);
    for (int i = 0; i < rest_; ++i) top[i] = std::max(tail_[i], top[i]);
    return Reduce::template max<T>(top);
  }

 private:
  const T* body_;
  int64_t full_;
  int rest_;
  T tail_[simd::kLanes<T>];
};

// Where a gradient goes. `streamed` writes past the caches; the caller has checked the alignment.
template <typename T>
class Sink {
 public:
  Sink(T* body, int64_t count, bool streamed)
      : body_(body), full_(count / simd::kLanes<T>), rest_(count % simd::kLanes<T>), streamed_(streamed) {}
  void put(int64_t j, Vec<T> v) const {
    if (j < full_) {
      T* to = body_ + j * simd::kLanes<T>;
      streamed_ ? simd::stream<T>(to, v) : simd::store<T>(to, v);
    } else {
      std::memcpy(body_ + full_ * simd::kLanes<T>, &v, rest_ * sizeof(T));
    }
  }

 private:
  T* body_;
  int64_t full_;
  int rest_;
  bool streamed_;
};

}  // namespace kdkernels::temperature_kl
