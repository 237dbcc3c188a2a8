// Products of a block of M with a few vectors, and sums of outer products, which make up a
// gradient: each of them reads or writes the block once. Also products with G = M M^T, computed as
// two products with M.
#pragma once

#include "matrices.h"

namespace kdkernels::truncated_svd {

// Sums are computed in blocks of this many terms, whose sums are then added. If many terms are equal,
// as in a constant matrix, the rounding errors of one long sum all have the same sign, so that its
// error would grow with the number of terms. Shorter blocks than these take 5 to 10 % longer in the
// backward pass.
constexpr int64_t kTerms = 64;
// The same for M^T a, whose lengths are the singular values.
constexpr int64_t kProjectedTerms = 32;

// Divides `count` vectors into groups of Most, Most / 2, ..., 1, and calls body(first, size) for each;
// the size is a constant.
template <int Most, typename Body>
void each_group(int64_t count, Body&& body, int64_t first = 0) {
  for (; first + Most <= count; first += Most) body(first, std::integral_constant<int, Most>{});
  if constexpr (Most > 1) each_group<Most / 2>(count, body, first);
}

// out[j][s] (+)= sum over the rows r of coefficient[j][r] * block[r][s], for J vectors. Whole
// vectors of `out` are written.
template <typename T, int J, int C>
KDKERNELS_INLINE void combine_columns(const Block<T>& block, int64_t s, const T* coefficient, int64_t coefficient_stride, bool add, T* out,
                                      int64_t out_stride) {
  Vec<T> acc[J * C] = {};
  const T* row = block.data + s;
  for (int64_t r = 0; r < block.rows; ++r, row += block.stride) {
    Vec<T> numbers[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {  // and prefetches the columns after the next ones
      numbers[c] = simd::load<T>(row + c * kLanes<T>);
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row) + (2 * C + c) * simd::kBytes));
    }
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Vec<T> factor = simd::splat<T>(coefficient[j * coefficient_stride + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[j * C + c] += factor * numbers[c];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* to = out + j * out_stride + s + c * kLanes<T>;
      simd::store<T>(to, add ? simd::load<T>(to) + acc[j * C + c] : acc[j * C + c]);
    }
}

template <typename T, int J>
void combine_rows_fixed(const Block<T>& block, const T* coefficient, int64_t coefficient_stride, bool add, T* out, int64_t out_stride) {
  constexpr int C = sizeof(Vec<T>) == 64 ? (J <= 4 ? 4 : 2) : 2;
  int64_t s = 0;
  for (; s + (C - 1) * kLanes<T> < block.length; s += C * kLanes<T>)
    combine_columns<T, J, C>(block, s, coefficient, coefficient_stride, add, out, out_stride);
  for (; s < block.length; s += kLanes<T>) combine_columns<T, J, 1>(block, s, coefficient, coefficient_stride, add, out, out_stride);
}

template <typename T>
void combine_rows_of_part(const Block<T>& block, int64_t k, const T* coefficient, int64_t coefficient_stride, bool add, T* out,
                          int64_t out_stride) {
  constexpr int max_vectors = sizeof(Vec<T>) == 64 ? 8 : 4;
  each_group<max_vectors>(k, [&](int64_t j, auto count) {
    combine_rows_fixed<T, count()>(block, coefficient + j * coefficient_stride, coefficient_stride, add, out + j * out_stride, out_stride);
  });
}

template <typename T>
void combine_rows(const Block<T>& block, int64_t k, const T* coefficient, int64_t coefficient_stride, bool add, T* out, int64_t out_stride,
                  int64_t terms = kTerms) {
  for (int64_t first = 0; first < block.rows; first += terms) {
    const Block<T> part{block.data + first * block.stride, block.stride, std::min(terms, block.rows - first), block.length};
    combine_rows_of_part(part, k, coefficient + first, coefficient_stride, add || first > 0, out, out_stride);
  }
}

// out[j][r] (+)= <block[r], vector[j]> for R rows and J vectors. Numbers past the end of a row are
// ignored.
template <typename T, int R, int J>
KDKERNELS_INLINE void dots_tile(const T* rows, int64_t stride, int64_t length, const T* vectors, int64_t vector_stride, bool add, T* out,
                                int64_t out_stride) {
  Vec<T> acc[R * J] = {};
  auto step = [&](int64_t s, auto&& mask) {
    Vec<T> other[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) other[j] = simd::load<T>(vectors + j * vector_stride + s);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> row = mask(simd::load<T>(rows + r * stride + s));
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[r * J + j] += row * other[j];
    }
  };
  int64_t s = 0;
  for (; s + kLanes<T> <= length; s += kLanes<T>) step(s, [](Vec<T> v) { return v; });
  if (s < length) {
    const Mask<T> inside = first_lanes<T>(length - s);
    step(s, [&](Vec<T> v) { return inside ? v : Vec<T>{}; });
  }
  T total[padded<T>(R * J)];
  sums<T, R * J>(acc, total);
  for (int j = 0; j < J; ++j)
    for (int r = 0; r < R; ++r) out[j * out_stride + r] = (add ? out[j * out_stride + r] : T(0)) + total[r * J + j];
}

// out[j][r] = <block[r], vector[j]> for kLanes rows and J vectors. A SIMD vector has one group of
// lanes for each of the J vectors. `packed` contains their numbers: first the first numbers of each,
// as many as a group has lanes, then the next ones. So the sums of many short rows need few additions
// across lanes. Numbers past the end of a row are ignored.
template <typename T, int J>
KDKERNELS_INLINE void dots_of_short_rows(const T* rows, int64_t stride, int64_t length, const Vec<T>* packed, T* out, int64_t out_stride) {
  constexpr int lanes = kLanes<T>, width = lanes / J, bases = (lanes + 3) / 4;
  Vec<T> total[J] = {};
  for (int64_t begin = 0; begin < length; begin += kProjectedTerms * width) {
    const int64_t end = std::min(begin + kProjectedTerms * width, length);
    Vec<T> acc[lanes] = {};
    const T* base[bases];  // a pointer for four rows: base + {0, 1, 2, 3} * stride needs no further instructions
#pragma GCC unroll 4
    for (int i = 0; i < bases; ++i) base[i] = rows + 4 * i * stride + begin;
    auto step = [&](auto&& mask) {
      const Vec<T> numbers = *packed++;
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) acc[r] += mask(simd::repeat<T, width>(base[r / 4] + r % 4 * stride)) * numbers;
#pragma GCC unroll 4
      for (int i = 0; i < bases; ++i) base[i] += width;
    };
    int64_t c = begin;
    for (; c + width <= end; c += width) step([](Vec<T> v) { return v; });
    if (c < end) {
      Mask<T> inside;
      for (int l = 0; l < lanes; ++l) inside[l] = l % width < end - c ? -1 : 0;
      step([&](Vec<T> v) { return inside ? v : Vec<T>{}; });
    }
    sum_groups<T, J>(acc);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) total[j] += acc[j];
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) simd::store<T>(out + j * out_stride, total[j]);
}

// The same for all rows of a block that has at least kLanes of them.
template <typename T, int J>
void dot_short_rows(const Block<T>& block, const T* vectors, int64_t vector_stride, T* out, int64_t out_stride) {
  const Buffer<Vec<T>> packed(padded<T>(block.length) / kLanes<T> * J);
  for (int64_t s = 0; s < block.length; s += kLanes<T>) {
    Vec<T> part[J];
    for (int j = 0; j < J; ++j) part[j] = simd::load<T>(vectors + j * vector_stride + s);
    transpose_groups<T, J>(part);
    std::copy_n(part, J, packed.get() + s / kLanes<T> * J);
  }
  for (int64_t r = 0; r < block.rows; r += kLanes<T>) {
    const int64_t first = std::min(r, block.rows - kLanes<T>);  // the last tile may repeat some rows of the tile before it
    dots_of_short_rows<T, J>(block.data + first * block.stride, block.stride, block.length, packed.get(), out + first, out_stride);
  }
}

// out[j][r] (+)= <block[r], vector[j]> for all rows and k vectors. `vectors` must be finite up to the
// end of the last SIMD vector.
template <typename T>
void dot_rows_with_vectors(const Block<T>& block, int64_t k, const T* vectors, int64_t vector_stride, bool add, T* out,
                           int64_t out_stride) {
  constexpr int max_vectors = std::min(8, kLanes<T>);
  // For fewer vectors and longer rows, loading a few numbers into all groups takes longer than the sums.
  if (!add && block.rows >= kLanes<T> && (k >= max_vectors || block.length <= 8 * kLanes<T>))
    return each_group<max_vectors>(k, [&](int64_t j, auto count) {
      dot_short_rows<T, count()>(block, vectors + j * vector_stride, vector_stride, out + j * out_stride, out_stride);
    });
  each_group<4>(k, [&](int64_t j, auto count) {
    int64_t r = 0;
    auto rows = [&](auto tile) {
      for (; r + tile() <= block.rows; r += tile())
        for (int64_t s = 0; s < block.length; s += kTerms * kLanes<T>)
          dots_tile<T, tile(), count()>(block.data + r * block.stride + s, block.stride, std::min(kTerms * kLanes<T>, block.length - s),
                                        vectors + j * vector_stride + s, vector_stride, add || s > 0, out + j * out_stride + r, out_stride);
    };
    rows(std::integral_constant<int, 4>{});
    rows(std::integral_constant<int, 1>{});
  });
}

// The distance between vectors with a number for each column of a block. Vectors whose distance is a
// power of two share few sets of the L1 cache: products with eight of them took twice as long.
template <typename T>
int64_t line_stride(int64_t columns) {
  return padded<T>(columns) + kLanes<T>;
}

// out[j] = M^T a_j at the block's columns. a [k, stride] is 0 from p to the end of the last whole
// vector.
template <typename T>
void project_block(const Matrices& m, const Block<T>& block, int64_t k, const T* a, int64_t a_stride, T* out, int64_t out_stride) {
  if (m.p_contiguous)
    dot_rows_with_vectors<T>(block, k, a, a_stride, false, out, out_stride);
  else
    combine_rows<T>(block, k, a, a_stride, false, out, out_stride, kProjectedTerms);
}

// out[j] += M b_j, summed over the block's columns. b points to the number that belongs to the
// first of these columns, and is 0 from the last of them to the end of a whole vector.
template <typename T>
void multiply_block(const Matrices& m, const Block<T>& block, int64_t k, const T* b, int64_t b_stride, T* out, int64_t out_stride) {
  if (m.p_contiguous)
    combine_rows<T>(block, k, b, b_stride, true, out, out_stride);
  else
    dot_rows_with_vectors<T>(block, k, b, b_stride, true, out, out_stride);
}

// out = sum_j coefficient[j] * vector[j], plus the old value of `out` if `add`, for J terms and
// whole vectors. Stream: the stores bypass the caches.
template <typename T, int J, bool Stream>
KDKERNELS_INLINE void sum_of_vectors_fixed(const T* coefficient, int64_t coefficient_stride, const T* vectors, int64_t vector_stride,
                                           int64_t length, bool add, T* out) {
  Vec<T> factor[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) factor[j] = simd::splat<T>(coefficient[j * coefficient_stride]);
  for (int64_t s = 0; s < length; s += kLanes<T>) {
    Vec<T> even = add ? simd::load<T>(out + s) : Vec<T>{}, odd{};
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) (j % 2 ? odd : even) += factor[j] * simd::load<T>(vectors + j * vector_stride + s);
    if constexpr (Stream)
      simd::stream<T>(out + s, even + odd);
    else
      simd::store<T>(out + s, even + odd);
  }
}

// out = sum_j coefficient[j] * vector[j] for any number of terms. `stream` has an effect only if
// `count` is 1, 2, 4 or 8.
template <typename T>
void sum_of_vectors(int64_t count, const T* coefficient, int64_t coefficient_stride, const T* vectors, int64_t vector_stride,
                    int64_t length, bool stream, T* out) {
  each_group<8>(count, [&](int64_t j, auto terms) {
    const T *factors = coefficient + j * coefficient_stride, *from = vectors + j * vector_stride;
    if (stream && count == terms())
      sum_of_vectors_fixed<T, terms(), true>(factors, coefficient_stride, from, vector_stride, length, false, out);
    else
      sum_of_vectors_fixed<T, terms(), false>(factors, coefficient_stride, from, vector_stride, length, j > 0, out);
  });
}

// The same for several short rows of `out`: a vector of each term stays in a register for all rows.
// The last vector of a row may be written past its end, into the next row, whose first numbers are
// therefore written later. If `add`, it adds to them: the vectors must be 0 from `length` on, and the
// coefficients finite.
template <typename T, int J, bool Stream>
KDKERNELS_INLINE void sums_of_vectors_fixed(const T* coefficient, int64_t coefficient_stride, const T* vectors, int64_t vector_stride,
                                            int64_t length, bool add, T* out, int64_t out_stride, int64_t rows) {
  for (int64_t s = padded<T>(length) - kLanes<T>; s >= 0; s -= kLanes<T>) {
    Vec<T> term[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) term[j] = simd::load<T>(vectors + j * vector_stride + s);
    T* to = out + s;
    const T* base[] = {coefficient, coefficient + (J > 4 ? 4 * coefficient_stride : 0)};  // see dots_of_short_rows()
    for (int64_t r = 0; r < rows; ++r, to += out_stride, ++base[0], ++base[1]) {
      Vec<T> even = add ? simd::load<T>(to) : Vec<T>{}, odd{};
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) (j % 2 ? odd : even) += simd::splat<T>(base[j / 4][j % 4 * coefficient_stride]) * term[j];
      if constexpr (Stream)
        simd::stream<T>(to, even + odd);
      else
        simd::store<T>(to, even + odd);
    }
  }
}

// out[r] = sum_j coefficient[j][r] * vector[j] for any number of rows and terms.
template <typename T>
void sums_of_vectors(int64_t count, const T* coefficient, int64_t coefficient_stride, const T* vectors, int64_t vector_stride,
                     int64_t length, bool stream, T* out, int64_t out_stride, int64_t rows) {
  // With AVX-512, tiles take two thirds of the time at rows of 49 and three quarters at 196; with AVX2,
  // whose broadcasts are separate instructions, a tenth longer.
  constexpr bool use_tiles = sizeof(Vec<T>) == 64;
  constexpr int64_t short_row = 1024 / sizeof(T), part = 16;  // so many short rows stay in the L1 cache
  if constexpr (use_tiles)
    if (length <= short_row) {
      for (int64_t first = 0; first < rows; first += part)
        each_group<8>(count, [&](int64_t j, auto terms) {
          const T *factors = coefficient + j * coefficient_stride + first, *from = vectors + j * vector_stride;
          T* to = out + first * out_stride;
          const int64_t n = std::min(part, rows - first);
          if (stream && count == terms())
            sums_of_vectors_fixed<T, terms(), true>(factors, coefficient_stride, from, vector_stride, length, false, to, out_stride, n);
          else
            sums_of_vectors_fixed<T, terms(), false>(factors, coefficient_stride, from, vector_stride, length, j > 0, to, out_stride, n);
        });
      return;
    }
  for (int64_t r = 0; r < rows; ++r)
    sum_of_vectors<T>(count, coefficient + r, coefficient_stride, vectors, vector_stride, length, stream, out + r * out_stride);
}

// <x, y> of vectors that are padded with zeros to whole SIMD vectors.
template <typename T>
double product(const T* x, const T* y, int64_t count) {
  Vec<T> total{};
  for (int64_t i = 0; i < count;) {
    const int64_t end = std::min(count, i + 4 * kLanes<T> * kTerms);
    Vec<T> sum[4] = {};
    for (; i + 4 * kLanes<T> <= end; i += 4 * kLanes<T>)
      for (int c = 0; c < 4; ++c) sum[c] += simd::load<T>(x + i + c * kLanes<T>) * simd::load<T>(y + i + c * kLanes<T>);
    for (; i < end; i += kLanes<T>) sum[0] += simd::load<T>(x + i) * simd::load<T>(y + i);
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return simd::sum<T>(total);
}

// y += factor x, for padded vectors.
template <typename T>
void add_multiple(T factor, const T* x, int64_t count, T* y) {
  const Vec<T> f = simd::splat<T>(factor);
  for (int64_t i = 0; i < count; i += kLanes<T>) simd::store<T>(y + i, simd::load<T>(y + i) + f * simd::load<T>(x + i));
}

// Products with G = M M^T of one matrix, without G: computes M (M^T x) block by block, so that M is
// read once.
template <typename T>
class GramProduct {
 public:
  // k: the largest number of vectors in a product; stride: the distance between vectors of the
  // smaller side.
  GramProduct(const Matrices& m, int64_t k, int64_t stride)
      : m_(m),
        stride_(stride),
        reader_(m, block_columns(m)),
        line_stride_(line_stride<T>(reader_.columns())),
        projected_(k * line_stride_) {}

  // Selects matrix b: the following products are with factor * G. A factor near 1 / |G| keeps the
  // squares of their results in range.
  void set_matrix(int64_t b, T factor) {
    b_ = b;
    factor_ = factor;
    if (reader_.columns() >= m_.q) whole_block_ = reader_.read(b, 0);
  }

  // y = factor G x for k vectors [k, stride]. x and y are 0 from p on.
  void apply(int64_t k, const T* x, T* y) {
    std::fill(y, y + k * stride_, T(0));
    each_block([&](const Block<T>& block, int64_t) {
      project_block<T>(m_, block, k, x, stride_, projected_.get(), line_stride_);
      multiply_block<T>(m_, block, k, projected_.get(), line_stride_, y, stride_);
    });
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t c = 0; c < m_.p; ++c) y[j * stride_ + c] *= factor_;
      std::fill(y + j * stride_ + m_.p, y + (j + 1) * stride_, T(0));
    }
  }

  // y = M 1, the sums of the rows.
  void row_sums(T* y) {
    std::fill(y, y + stride_, T(0));
    std::fill(projected_.get(), projected_.get() + line_stride_, T(1));
    each_block([&](const Block<T>& block, int64_t) { multiply_block<T>(m_, block, 1, projected_.get(), line_stride_, y, stride_); });
    std::fill(y + m_.p, y + stride_, T(0));
  }

 private:
  // The number of columns of a block. A matrix that fits in the cache is one block: it is read, and
  // copied if necessary, once for all products.
  static int64_t block_columns(const Matrices& m) {
    constexpr int64_t cache = int64_t(3) << 18;
    if (m.q * padded<T>(m.p) * static_cast<int64_t>(sizeof(T)) <= cache) return padded<T>(m.q);
    return std::max<int64_t>(kLanes<T>, (cache / 3 / static_cast<int64_t>(sizeof(T)) / padded<T>(m.p)) / kLanes<T> * kLanes<T>);
  }
  template <typename Body>
  void each_block(Body&& body) {
    if (reader_.columns() >= m_.q) return body(whole_block_, 0);
    for (int64_t first = 0; first < m_.q; first += reader_.columns()) body(reader_.read(b_, first), first);
  }

  const Matrices& m_;
  int64_t stride_;
  Reader<T> reader_;
  int64_t line_stride_, b_ = 0;
  T factor_ = 1;
  Buffer<T> projected_;
  Block<T> whole_block_{};
};

}  // namespace kdkernels::truncated_svd
