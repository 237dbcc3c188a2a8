// The direct tier: computes the scaled Gram matrices of a group, whose eigenvectors are computed
// next.
//
// A group has as many matrices as a vector has lanes; the last group may be padded with zero
// matrices. The result for a matrix does not depend on its lane, on the other matrices or on the
// number of threads.
#pragma once

#include "eigen.h"
#include "gram.h"
#include "thresholds.h"

namespace kdkernels::truncated_svd {

// not_finite: the matrix contains a NaN or an infinity; out_of_range: the squares of its entries
// leave the range of the dtype, so it must be rescaled.
enum class Range : uint8_t { ok, not_finite, out_of_range };

// How a matrix was scaled for its Gram matrix.
struct Scaling {
  double scale = 1;  // the factor of M: a power of two
  Range range = Range::ok;
};

template <typename T>
class Direct {
 public:
  static constexpr int kGroup = kLanes<T>;

  Direct(const Matrices& m, int64_t k) : eigen(m.p, k), m_(m), gram_stride_(eigen.stride()) {}

  const Eigen<T> eigen;

  int64_t groups() const { return (m_.batch + kGroup - 1) / kGroup; }
  // The distance between the vectors a_j, which are 0 from p on.
  int64_t vector_stride() const { return gram_stride_; }
  int64_t gram_size() const { return m_.p * gram_stride_; }

  // Computes the Gram matrix of matrix b, [p, vector_stride()], scaled to a trace in [1/4, 1). It
  // is zero if matrix b is zero, not finite or out of range.
  Scaling compute_gram(int64_t b, Reader<T>& reader, T* matrix) const {
    Scaling result;
    gram<T>(reader, m_, b, 1, matrix, gram_stride_);
    const double total = trace(matrix);
    // The matrix is zero, not finite, or its squares are out of range.
    if (!(total > kLowestTrace<T> && total < kHighestTrace<T>)) {
      const double largest = reader.largest(b);
      if (largest != 0) result.range = largest == largest ? Range::out_of_range : Range::not_finite;
      std::fill(matrix, matrix + gram_size(), T(0));
      return result;
    }
    scale(total, matrix, result);
    return result;
  }

  // Scales a Gram matrix to a trace in [1/4, 1), unless it is zero. Returns the trace before.
  double scale_gram(T* matrix, Scaling& scaling) const {
    const double total = trace(matrix);
    if (total > 0) scale(total, matrix, scaling);
    return total;
  }

 private:
  void scale(double total, T* matrix, Scaling& scaling) const {
    int exponent;
    std::frexp(total, &exponent);
    const int half = (exponent + (exponent > 0 ? 1 : 0)) / 2;  // rounded up
    const T factor = static_cast<T>(std::ldexp(1.0, -2 * half));
    for (int64_t i = 0; i < m_.p; ++i)
      for (int64_t j = 0; j <= i; ++j) matrix[i * gram_stride_ + j] *= factor;
    scaling.scale = std::ldexp(1.0, -half);
  }

  double trace(const T* matrix) const {
    double sum = 0;
    for (int64_t i = 0; i < m_.p; ++i) sum += matrix[i * gram_stride_ + i];
    return sum;
  }

  const Matrices& m_;
  int64_t gram_stride_;
};

}  // namespace kdkernels::truncated_svd
