// Products with G = M M^T of one matrix that do without G: M^T x and back, block by block, so that M is read once.
#pragma once

#include "products.h"

namespace kdkernels::truncated_svd {

template <typename T>
class GramProduct {
 public:
  // k: the most vectors of a product; stride: of vectors of the small side.
  GramProduct(const Matrices& m, int64_t k, int64_t stride)
      : m_(m), stride_(stride), reader_(m, columns(m)), line_(padded<T>(reader_.columns())), half_(k * line_) {}

  // Makes factor G of matrix b that of the products that follow; a factor near 1 / |G| keeps squares of what they give in range.
  void choose(int64_t b, T factor) {
    b_ = b;
    factor_ = factor;
    if (reader_.columns() >= m_.q) whole_ = reader_.read(b, 0);
  }

  // y = factor G x for k vectors [k, stride]; both are 0 from p on.
  void apply(int64_t k, const T* x, T* y) {
    std::fill(y, y + k * stride_, T(0));
    each_block([&](const Block<T>& block, int64_t) {
      project_block<T>(m_, block, k, x, stride_, half_.get(), line_);
      multiply_block<T>(m_, block, k, half_.get(), line_, y, stride_);
    });
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t c = 0; c < m_.p; ++c) y[j * stride_ + c] *= factor_;
      std::fill(y + j * stride_ + m_.p, y + (j + 1) * stride_, T(0));
    }
  }

  // y = M 1, the sums of the rows.
  void row_sums(T* y) {
    std::fill(y, y + stride_, T(0));
    std::fill(half_.get(), half_.get() + line_, T(1));
    each_block([&](const Block<T>& block, int64_t) { multiply_block<T>(m_, block, 1, half_.get(), line_, y, stride_); });
    std::fill(y + m_.p, y + stride_, T(0));
  }

 private:
  // A matrix that a cache holds is read, and copied if it must be, once for all products.
  static int64_t columns(const Matrices& m) {
    constexpr int64_t cache = int64_t(3) << 18;
    if (m.q * padded<T>(m.p) * static_cast<int64_t>(sizeof(T)) <= cache) return padded<T>(m.q);
    return std::max<int64_t>(kLanes<T>, (cache / 3 / static_cast<int64_t>(sizeof(T)) / padded<T>(m.p)) / kLanes<T> * kLanes<T>);
  }
  template <typename Body>
  void each_block(Body&& body) {
    if (reader_.columns() >= m_.q) return body(whole_, 0);
    for (int64_t first = 0; first < m_.q; first += reader_.columns()) body(reader_.read(b_, first), first);
  }

  const Matrices& m_;
  int64_t stride_;
  Reader<T> reader_;
  int64_t line_, b_ = 0;
  T factor_ = 1;
  Buffer<T> half_;
  Block<T> whole_{};
};

}  // namespace kdkernels::truncated_svd
