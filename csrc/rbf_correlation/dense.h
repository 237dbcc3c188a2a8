// rbf_correlation itself, written out: rows [N * K] of x's number m and all of y's, the columns side by side.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>

#include "../common/simd.h"

namespace kdkernels::rbf_correlation {

// x[k] at every number of a row [N * K]: so many vectors that after them it repeats.
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
  // x[k] = the sum of all numbers that belong to column k.
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

// A vector of `count` numbers, 0 behind them.
template <typename T>
KDKERNELS_INLINE simd::Vec<T> load_part(const T* p, int64_t count) {
  simd::Vec<T> v{};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}

// body(i, v) for the whole vectors of a row, with the pattern's vector v, and rest(i, v, count) for what is behind them.
template <typename T, typename Body, typename Rest>
KDKERNELS_INLINE void over_row(int64_t numbers, int64_t period, Body&& body, Rest&& rest) {
  int64_t i = 0, v = 0;
  if (period == 1)
    for (; i + simd::kLanes<T> <= numbers; i += simd::kLanes<T>) body(i, 0);
  else
    for (; i + simd::kLanes<T> <= numbers; i += simd::kLanes<T>) {
      body(i, v);
      v = v + 1 == period ? 0 : v + 1;
    }
  if (i < numbers) rest(i, v, numbers - i);
}

// e^y for y <= 0, or NaN.
template <typename T>
KDKERNELS_INLINE simd::Vec<T> exp_of(simd::Vec<T> y) {
  simd::Mask<T> vanished;
  return simd::exp_falling<T>(y, vanished);
}

template <typename T>
void correlate_row(const Pattern<T>& x, const T* y, int64_t numbers, double beta, bool stream, T* out) {
  const T scale = static_cast<T>(-1 / beta);
  over_row<T>(
      numbers, x.period(),
      [&](int64_t i, int64_t v) {
        const simd::Vec<T> d = simd::load<T>(x.vector(v)) - simd::load<T>(y + i), value = exp_of<T>(d * d * scale);
        if (stream)
          simd::stream(out + i, value);
        else
          simd::store<T>(out + i, value);
      },
      [&](int64_t i, int64_t v, int64_t count) {
        const simd::Vec<T> d = simd::load<T>(x.vector(v)) - load_part(y + i, count), value = exp_of<T>(d * d * scale);
        std::memcpy(out + i, &value, count * sizeof(T));
      });
}

// to_y += the gradients of a row, and to_x, in the pattern's places, is set to them.
template <typename T>
void differentiate_row(const Pattern<T>& x, const T* y, const T* grad, int64_t numbers, double beta, Pattern<T>& to_x, T* to_y) {
  using V = simd::Vec<T>;
  const T scale = static_cast<T>(-1 / beta), slope = static_cast<T>(2 / beta);
  auto gradient = [&](V d, V g) { return g * exp_of<T>(d * d * scale) * d * slope; };
  V sum{};  // of a pattern of one vector
  const bool one = x.period() == 1;
  if (!one) to_x.clear();
  auto add = [&](int64_t v, V g) {
    if (one)
      sum -= g;
    else
      simd::store<T>(to_x.vector(v), simd::load<T>(to_x.vector(v)) - g);
  };
  over_row<T>(
      numbers, x.period(),
      [&](int64_t i, int64_t v) {
        const V g = gradient(simd::load<T>(x.vector(v)) - simd::load<T>(y + i), simd::load<T>(grad + i));
        add(v, g);
        simd::store<T>(to_y + i, simd::load<T>(to_y + i) + g);
      },
      [&](int64_t i, int64_t v, int64_t count) {
        const V g = gradient(simd::load<T>(x.vector(v)) - load_part(y + i, count), load_part(grad + i, count));
        add(v, g);
        const V total = load_part(to_y + i, count) + g;
        std::memcpy(to_y + i, &total, count * sizeof(T));
      });
  if (one) simd::store<T>(to_x.vector(0), sum);
}

}  // namespace kdkernels::rbf_correlation
