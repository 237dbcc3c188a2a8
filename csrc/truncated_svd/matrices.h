// A batch of matrices x with any strides, read with the smaller side first: M is p x q with p <= q.
// M is the transpose of x if x is tall (if it has at least as many rows as columns), else x itself.
// In M = sum_j sigma_j a_j b_j^T the singular vectors a_j have the length of the smaller side, p,
// and the b_j that of the larger side, q.
//
// Kernels read M in blocks of columns. A block consists of rows of contiguous numbers in the dtype
// of the computation. If the numbers of a column of M are adjacent in memory (`p_contiguous`), each
// row of the block is one of these columns, p numbers long. Otherwise the rows of the block are the
// p rows of M, restricted to these columns.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../common/convert.h"
#include "lanes.h"

namespace kdkernels::truncated_svd {

template <typename T>
struct Block {
  const T* data;
  int64_t stride;  // from row to row
  int64_t rows;
  // Numbers in a row. Those from there to the end of the last vector can be read: they may have any
  // value if p_contiguous, and are 0 otherwise.
  int64_t length;
};

// The memory of the block that is read after this one. A kernel prefetches a part of it at each
// tile.
template <typename T>
struct NextBlock {
  const T* data = nullptr;
  int64_t stride = 0, rows = 0;
  // Row i, or `fallback`, which is in the cache already, if there is no row i.
  const T* row(int64_t i, const T* fallback) const { return i < rows ? data + i * stride : fallback; }
};

class Matrices {
 public:
  // subset: the indices of the matrices that belong to the batch; all if it is empty.
  explicit Matrices(const at::Tensor& x, std::vector<int64_t> subset = {}) : x_(x), subset_(std::move(subset)) {
    const int64_t m = x.size(-2), n = x.size(-1);
    tall = m >= n;
    p = std::min(m, n);
    q = std::max(m, n);
    stride_p = x.stride(tall ? -1 : -2);
    stride_q = x.stride(tall ? -2 : -1);
    p_contiguous = stride_p == 1 && stride_q != 1;
    for (int64_t d = 0; d + 2 < x.dim(); ++d) batch *= x.size(d);
    if (!subset_.empty()) batch = static_cast<int64_t>(subset_.size());
  }

  int64_t offset(int64_t b) const {
    int64_t result = 0;
    if (!subset_.empty()) b = subset_[b];
    for (int64_t d = x_.dim() - 3; d >= 0; --d) {
      result += b % x_.size(d) * x_.stride(d);
      b /= x_.size(d);
    }
    return result;
  }

  // The index of matrix b in x.
  int64_t index(int64_t b) const { return subset_.empty() ? b : subset_[b]; }

  // Matrix b as a tensor with two dimensions.
  at::Tensor matrix(int64_t b) const {
    return x_.as_strided({x_.size(-2), x_.size(-1)}, {x_.stride(-2), x_.stride(-1)}, x_.storage_offset() + offset(b));
  }

  const at::Tensor& tensor() const { return x_; }
  int64_t row_length(int64_t columns) const { return p_contiguous ? p : columns; }
  int64_t block_rows(int64_t columns) const { return p_contiguous ? columns : p; }

  int64_t p, q, stride_p, stride_q, batch = 1;
  bool tall, p_contiguous;

 private:
  at::Tensor x_;
  std::vector<int64_t> subset_;
};

// The number of columns of a block for products with vectors, which read a block once or twice.
template <typename T>
int64_t product_columns(const Matrices& m) {
  const int64_t columns = (int64_t(256) << 10) / static_cast<int64_t>(sizeof(T)) / padded<T>(m.p) / kLanes<T> * kLanes<T>;
  return std::clamp<int64_t>(columns, 8 * kLanes<T>, m.p_contiguous ? 4096 : 1024);
}

// Reads blocks of one matrix after another. Owns the memory to which a block is copied if it cannot
// be read in place.
template <typename T>
class Reader {
 public:
  Reader(const Matrices& m, int64_t columns)
      : m_(m),
        columns_(std::min(columns, padded<T>(m.q))),
        storage_numbers_(static_cast<int64_t>(m.tensor().storage().nbytes() / m.tensor().element_size()) - m.tensor().storage_offset()) {
    // Rows whose distance is a power of two share few cache sets, so the distance is one vector
    // larger.
    stride_ = padded<T>(m.row_length(columns_)) + (m.p_contiguous ? 0 : kLanes<T>);
    copy_ = Buffer<T>(m.block_rows(columns_) * stride_ + kLanes<T>);
  }

  int64_t columns() const { return columns_; }

  // Columns [first, first + columns()) of matrix b, or up to the last column, times `scale`.
  Block<T> read(int64_t b, int64_t first, T scale = 1) {
    const int64_t count = std::min(columns_, m_.q - first);
    const int64_t offset = m_.offset(b) + first * m_.stride_q;
    Block<T> block{copy_.get(), stride_, m_.block_rows(count), m_.row_length(count)};
    with_storage<T, true>(m_.tensor().scalar_type(), [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      const Storage* from = m_.tensor().const_data_ptr<Storage>() + offset;
      const int64_t row = m_.p_contiguous ? m_.stride_q : m_.stride_p, column = m_.p_contiguous ? m_.stride_p : m_.stride_q;
      if constexpr (std::is_same_v<Storage, T>) {
        // A block is read in place if its rows are aligned and consist of whole vectors. If
        // p_contiguous, it is enough that the numbers after the last row, which are not used, are
        // in the storage.
        const bool fits = m_.p_contiguous ? offset + (block.rows - 1) * row + padded<T>(block.length) <= storage_numbers_
                                          : block.length % kLanes<T> == 0 && row % kLanes<T> == 0 &&
                                                reinterpret_cast<uintptr_t>(from) % simd::kBytes == 0;
        if (column == 1 && fits && scale == T(1)) {
          block.data = from;
          block.stride = row;
          return;
        }
      }
      const int64_t end = padded<T>(block.length);
      for (int64_t r = 0; r < block.rows; ++r) {
        T* to = copy_.get() + r * stride_;
        const Storage* source = from + r * row;
        if (column == 1)
          convert(source, to, block.length);
        else
          for (int64_t c = 0; c < block.length; ++c) to[c] = static_cast<T>(source[c * column]);
        for (int64_t c = block.length; c < end; ++c) to[c] = 0;
        if (scale != T(1))
          for (int64_t c = 0; c < block.length; ++c) to[c] *= scale;
      }
    });
    return block;
  }

  // The block after the one of matrix b that starts at column `first`; empty if that block is
  // copied.
  NextBlock<T> next_block(int64_t b, int64_t first) const {
    first += columns_;
    if (first >= m_.q) first = 0, ++b;
    const int64_t row = m_.p_contiguous ? m_.stride_q : m_.stride_p, column = m_.p_contiguous ? m_.stride_p : m_.stride_q;
    if (b >= m_.batch || column != 1 || m_.tensor().scalar_type() != c10::CppTypeToScalarType<T>::value) return {};
    return {m_.tensor().const_data_ptr<T>() + m_.offset(b) + first * m_.stride_q, row, m_.block_rows(std::min(columns_, m_.q - first))};
  }

  // The largest magnitude in matrix b; NaN if matrix b contains a NaN or an infinity.
  T largest(int64_t b) {
    Vec<T> largest{}, zero_or_nan{};
    for (int64_t first = 0; first < m_.q; first += columns_) {
      const Block<T> block = read(b, first);
      for (int64_t r = 0; r < block.rows; ++r) {
        const T* row = block.data + r * block.stride;
        auto add = [&](Vec<T> numbers) {
          largest = simd::max(largest, abs<T>(numbers));
          zero_or_nan += numbers - numbers;
        };
        int64_t c = 0;
        for (; c + kLanes<T> <= block.length; c += kLanes<T>) add(simd::load<T>(row + c));
        if (c < block.length) {
          const Vec<T> last = simd::load<T>(row + c);
          add(first_lanes<T>(block.length - c) ? last : Vec<T>{});
        }
      }
    }
    return simd::any(zero_or_nan != T(0)) ? std::numeric_limits<T>::quiet_NaN() : simd::largest<T>(largest);
  }

 private:
  const Matrices& m_;
  int64_t columns_, storage_numbers_, stride_;
  Buffer<T> copy_;
};

}  // namespace kdkernels::truncated_svd
