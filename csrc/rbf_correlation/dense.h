// rbf_correlation itself, written out: rows [N * K] of x's number m and all of y's, the columns side by side.
#pragma once

#include <algorithm>
#include <memory>

#include "../simd.h"

namespace kdkernels::rbf_correlation {

// x[k] at every number of a row [N * K]: K vectors, after which it repeats.
template <typename T>
class Pattern {
 public:
  explicit Pattern(int64_t columns) : columns_(columns), values_(new T[columns * simd::kLanes<T>]) {}

  void set(const T* x) {
    for (int copy = 0; copy < simd::kLanes<T>; ++copy)
      for (int64_t k = 0; k < columns_; ++k) values_[copy * columns_ + k] = x[k];
  }
  void clear() { std::fill_n(values_.get(), columns_ * simd::kLanes<T>, T(0)); }
  T* vector(int64_t v) const { return values_.get() + v * simd::kLanes<T>; }
  // x[k] = the sum of all numbers that belong to column k.
  void sum_to(T* x) const {
    if (columns_ == 1) {
      x[0] = simd::sum<T>(simd::load<T>(vector(0)));
      return;
    }
    std::copy_n(values_.get(), columns_, x);
    for (int copy = 1; copy < simd::kLanes<T>; ++copy)
      for (int64_t k = 0; k < columns_; ++k) x[k] += values_[copy * columns_ + k];
  }

 private:
  int64_t columns_;
  std::unique_ptr<T[]> values_;
};

// body(i, v, count) for the vectors of a row: numbers [i, i + count), with the pattern's vector v.
template <typename T, typename Body>
KDKERNELS_INLINE void over_row(int64_t numbers, int64_t columns, Body&& body) {
  int64_t v = 0;
  for (int64_t i = 0; i < numbers; i += simd::kLanes<T>) {
    body(i, v, std::min<int64_t>(simd::kLanes<T>, numbers - i));
    v = v + 1 == columns ? 0 : v + 1;
  }
}

// A vector of the last `count` numbers of a row, 0 behind them.
template <typename T>
KDKERNELS_INLINE simd::Vec<T> load_part(const T* p, int64_t count) {
  if (count == simd::kLanes<T>) return simd::load<T>(p);
  simd::Vec<T> v{};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}
template <typename T>
KDKERNELS_INLINE void store_part(T* p, simd::Vec<T> v, int64_t count) {
  if (count == simd::kLanes<T>)
    simd::store<T>(p, v);
  else
    std::memcpy(p, &v, count * sizeof(T));
}

template <typename T>
void correlate_row(const Pattern<T>& x, const T* y, int64_t numbers, int64_t columns, double beta, bool stream, T* out) {
  const T scale = static_cast<T>(-1 / beta);
  over_row<T>(numbers, columns, [&](int64_t i, int64_t v, int64_t count) {
    const simd::Vec<T> d = simd::load<T>(x.vector(v)) - load_part(y + i, count);
    const simd::Vec<T> value = simd::exp<T>(d * d * scale);
    if (stream)
      simd::stream(out + i, value);
    else
      store_part(out + i, value, count);
  });
}

// to_x and to_y += the gradients of a row, to_x in the pattern's places.
template <typename T>
void differentiate_row(const Pattern<T>& x, const T* y, const T* grad, int64_t numbers, int64_t columns, double beta,
                       const Pattern<T>& to_x, T* to_y) {
  const T scale = static_cast<T>(-1 / beta), slope = static_cast<T>(2 / beta);
  over_row<T>(numbers, columns, [&](int64_t i, int64_t v, int64_t count) {
    const simd::Vec<T> d = simd::load<T>(x.vector(v)) - load_part(y + i, count);
    const simd::Vec<T> g = load_part(grad + i, count) * simd::exp<T>(d * d * scale) * d * slope;
    simd::store<T>(to_x.vector(v), simd::load<T>(to_x.vector(v)) - g);
    store_part(to_y + i, load_part(to_y + i, count) + g, count);
  });
}

}  // namespace kdkernels::rbf_correlation
