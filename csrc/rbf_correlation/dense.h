// rbf_correlation, which writes the correlations. Rows of N * K numbers hold one number of x
// against all numbers of y, with the K columns side by side.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>

#include "../common/simd.h"

namespace kdkernels::rbf_correlation {

// The values x[k] that belong to the numbers of a row [N * K]. They are stored as vectors up to the
// point at which the sequence of vectors repeats (`period` vectors).
template <typename T>
class Pattern {
 public:
  explicit Pattern(int64_t columns)
      : columns_(columns), period_(columns / std::gcd<int64_t>(columns, simd::kLanes<T>)), values_(new T[period_ * simd::kLanes<T>]) {}

  int64_t period() const { return period_; }
  T* vector(int64_t v) const { return values_.get() + v * simd::kLanes<T>; }

  void set(const T* x) {
    if (columns_ == 1)
      simd::store<T>(vector(0), simd::splat<T>(x[0]));
    else
      for (T* to = values_.get(); to < vector(period_); to += columns_) std::copy_n(x, columns_, to);
  }
  void clear() { std::fill(values_.get(), vector(period_), T(0)); }
  // Sets x[k] to the sum of all numbers that belong to column k.
  void sum_to(T* x) const {
    if (columns_ == 1) {
      x[0] = simd::sum<T>(simd::load<T>(vector(0)));
      return;
    }
    std::copy_n(values_.get(), columns_, x);
    for (const T* from = values_.get() + columns_; from < vector(period_); from += columns_)
      for (int64_t k = 0; k < columns_; ++k) x[k] += from[k];
  }

 private:
  int64_t columns_, period_;
  std::unique_ptr<T[]> values_;
};

// Loads a vector of `count` numbers, padded with zeros.
template <typename T>
KDKERNELS_INLINE simd::Vec<T> load_part(const T* p, int64_t count) {
  simd::Vec<T> v{};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}

// Calls body(i, v) for each whole vector of a row, where v is the index of the pattern's vector,
// and remainder(i, v, count) for the last partial vector.
template <typename T, typename Body, typename Rest>
KDKERNELS_INLINE void for_each_vector(int64_t row_size, int64_t period, Body&& body, Rest&& remainder) {
  int64_t i = 0, v = 0;
  if (period == 1)
    for (; i + simd::kLanes<T> <= row_size; i += simd::kLanes<T>) body(i, 0);
  else
    for (; i + simd::kLanes<T> <= row_size; i += simd::kLanes<T>) {
      body(i, v);
      v = v + 1 == period ? 0 : v + 1;
    }
  if (i < row_size) remainder(i, v, row_size - i);
}

template <typename T>
void correlate_row(const Pattern<T>& x, const T* y, int64_t row_size, double beta, bool stream, T* out) {
  const T scale = static_cast<T>(-1 / beta);
  for_each_vector<T>(
      row_size, x.period(),
      [&](int64_t i, int64_t v) {
        const simd::Vec<T> d = simd::load<T>(x.vector(v)) - simd::load<T>(y + i), value = simd::exp_falling<T>(d * d * scale);
        if (stream)
          simd::stream(out + i, value);
        else
          simd::store<T>(out + i, value);
      },
      [&](int64_t i, int64_t v, int64_t count) {
        const simd::Vec<T> d = simd::load<T>(x.vector(v)) - load_part(y + i, count), value = simd::exp_falling<T>(d * d * scale);
        std::memcpy(out + i, &value, count * sizeof(T));
      });
}

// Adds the gradients of a row to grad_y, and sets grad_x, in the layout of the pattern, to the
// gradients of x.
template <typename T>
void differentiate_row(const Pattern<T>& x, const T* y, const T* grad, int64_t row_size, double beta, Pattern<T>& grad_x, T* grad_y) {
  using V = simd::Vec<T>;
  const T scale = static_cast<T>(-1 / beta), gradient_factor = static_cast<T>(2 / beta);
  auto gradient = [&](V d, V g) { return g * simd::exp_falling<T>(d * d * scale) * d * gradient_factor; };
  V sum{};  // the gradient of x, if the pattern is a single vector
  const bool single_vector = x.period() == 1;
  if (!single_vector) grad_x.clear();
  auto add_to_x = [&](int64_t v, V g) {
    if (single_vector)
      sum -= g;
    else
      simd::store<T>(grad_x.vector(v), simd::load<T>(grad_x.vector(v)) - g);
  };
  for_each_vector<T>(
      row_size, x.period(),
      [&](int64_t i, int64_t v) {
        const V g = gradient(simd::load<T>(x.vector(v)) - simd::load<T>(y + i), simd::load<T>(grad + i));
        add_to_x(v, g);
        simd::store<T>(grad_y + i, simd::load<T>(grad_y + i) + g);
      },
      [&](int64_t i, int64_t v, int64_t count) {
        const V g = gradient(simd::load<T>(x.vector(v)) - load_part(y + i, count), load_part(grad + i, count));
        add_to_x(v, g);
        const V total = load_part(grad_y + i, count) + g;
        std::memcpy(grad_y + i, &total, count * sizeof(T));
      });
  if (single_vector) simd::store<T>(grad_x.vector(0), sum);
}

}  // namespace kdkernels::rbf_correlation
