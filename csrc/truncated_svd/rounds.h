// The vectors a_j of float64 matrices whose kept singular values span orders of magnitude. A Gram
// matrix gives sigma_j with a rounding error of sigma_1^2 / sigma_j, and for float64 there is no
// wider dtype in which to square. Therefore each round takes only the singular values down to
// kLeastRatio times its largest one. The next round continues with the Gram matrix of the
// residual M - A A^T M, where A are the vectors of the rounds before; the residual is as accurate
// as M. The errors are a few roundings of sigma_1, as those of LAPACK. The results for a matrix do
// not depend on the other matrices or on the number of threads, unlike those of LAPACK.
#pragma once

#include "direct.h"
#include "triplets.h"

namespace kdkernels::truncated_svd {

class Rounds {
 public:
  Rounds(const Matrices& m, int64_t k)
      : m_(m),
        k_(k),
        row_(padded<double>(m.q)),
        direct_(m, k),
        work_(m.p, k),
        residual_(m.p * row_),
        gram_(m.p * direct_.vector_stride()),
        vectors_(k * direct_.vector_stride()),
        transposed_(k * padded<double>(m.p)),
        projected_(k * row_),
        lambda_(k) {}

  // Computes the k vectors of matrix b: a [k, p].
  void run(int64_t b, Reader<double>& reader, double* a) {
    constexpr double eps = std::numeric_limits<double>::epsilon();
    const int64_t p = m_.p, stride = direct_.vector_stride();
    read(b, reader);
    int64_t found = 0, unit = 0;
    for (double first_trace = 0; found < k_;) {
      Scaling scaling;
      const double trace = gram_of_residual(scaling);
      // The rest consists of rounding errors.
      if (!(trace > first_trace * (16 * eps * eps) * static_cast<double>(p))) break;
      const int64_t count = direct_.eigen.leading_eigenpairs(gram_.get(), k_ - found, kLeastRatio<double> * kLeastRatio<double>,
                                                             vectors_.get(), lambda_.data(), work_);
      if (first_trace == 0) first_trace = lambda_[0] / (scaling.scale * scaling.scale);
      for (int64_t j = 0; j < count; ++j) {
        std::copy_n(vectors_.get() + j * stride, p, a + (found + j) * p);
        if (found > 0 && orthogonalize(a, found + j, p) == 0) complete_basis(a, found + j, p, unit);
      }
      if (found + count < k_) subtract(a + found * p, count);
      found += count;
    }
    for (; found < k_; ++found) complete_basis(a, found, p, unit);
  }

 private:
  void read(int64_t b, Reader<double>& reader) {
    for (int64_t first = 0; first < m_.q; first += reader.columns()) {
      const Block<double> block = reader.read(b, first);
      for (int64_t r = 0; r < block.rows; ++r)
        if (m_.p_contiguous)
          for (int64_t i = 0; i < m_.p; ++i) residual_.get()[i * row_ + first + r] = block.data[r * block.stride + i];
        else
          std::copy_n(block.data + r * block.stride, block.length, residual_.get() + r * row_ + first);
    }
    for (int64_t i = 0; i < m_.p; ++i) std::fill(residual_.get() + i * row_ + m_.q, residual_.get() + (i + 1) * row_, 0.0);
  }

  Block<double> block(int64_t first, int64_t columns) const {
    return {residual_.get() + first, row_, m_.p, std::min(columns, row_ - first)};
  }

  // The Gram matrix of the residual, scaled to a trace in [1/4, 1). Returns the trace before.
  double gram_of_residual(Scaling& scaling) {
    const int64_t stride = direct_.vector_stride(), columns = std::min<int64_t>(row_, 256);
    std::fill(gram_.get(), gram_.get() + m_.p * stride, 0.0);
    const NextBlock<double> none;
    for (int64_t first = 0; first < row_; first += columns) {
      const Block<double> part = block(first, columns);
      Tiles<double> tiles{part, none, gram_.get(), stride};
      dot_rows<double, kDotRows>(tiles, 0);
    }
    return direct_.scale_gram(gram_.get(), scaling);
  }

  // residual -= A A^T residual for the rows a [count, p] of A^T.
  void subtract(const double* a, int64_t count) {
    const int64_t p = m_.p, columns = std::min<int64_t>(row_, 256), a_stride = padded<double>(p);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < p; ++i) transposed_.get()[j * a_stride + i] = a[j * p + i];
    for (int64_t first = 0; first < row_; first += columns) {
      const Block<double> part = block(first, columns);
      combine_rows<double>(part, count, transposed_.get(), a_stride, false, projected_.get(), row_);
      for (int64_t j = 0; j < count; ++j) scale_vector(projected_.get() + j * row_, part.length, -1.0);
      for (int64_t i = 0; i < p; ++i) {
        double* to = residual_.get() + i * row_ + first;
        const Block<double> lines{projected_.get(), row_, count, part.length};
        combine_rows<double>(lines, 1, transposed_column(i, count, a_stride), count, true, to, row_);
      }
    }
  }

  const double* transposed_column(int64_t i, int64_t count, int64_t a_stride) {
    column_.resize(count);
    for (int64_t j = 0; j < count; ++j) column_[j] = transposed_.get()[j * a_stride + i];
    return column_.data();
  }

  const Matrices& m_;
  int64_t k_, row_;
  Direct<double> direct_;
  Eigen<double>::Workspace work_;
  Buffer<double> residual_, gram_, vectors_, transposed_, projected_;
  std::vector<double> lambda_, column_;
};

}  // namespace kdkernels::truncated_svd
