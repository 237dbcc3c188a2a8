// The direct tier: the Gram matrices of a group, scaled, and their eigenvectors.
//
// A group is as many matrices as a vector has lanes; the last one may be filled up with zeros. What a matrix gives does not depend on its
// lane, its neighbours or the number of threads.
#pragma once

#include "eigen.h"
#include "gram.h"
#include "thresholds.h"

namespace kdkernels::truncated_svd {

// broken: a NaN or an infinity is in a matrix; out: its squares leave the range of the type, so it is taken in a unit of its own.
enum class Range : uint8_t { fine, broken, out };

// How a matrix was scaled for its Gram matrix.
struct Scaling {
  double scale = 1;  // of M: a power of two
  Range range = Range::fine;
};

template <typename T>
class Direct {
 public:
  static constexpr int kGroup = kLanes<T>;

  Direct(const Matrices& m, int64_t k) : eigen(m.p, k), m_(m), gram_stride_(eigen.stride()) {}

  const Eigen<T> eigen;

  int64_t groups() const { return (m_.batch + kGroup - 1) / kGroup; }
  int64_t vector_stride() const { return gram_stride_; }  // of "a" vectors, which are 0 from p on
  int64_t gram_size() const { return m_.p * gram_stride_; }

  // Gram matrix of matrix b, [p, vector_stride()], brought to a trace in [1/4, 1); zero where the matrix is, or is broken or out of range.
  Scaling gram_of(int64_t b, Reader<T>& reader, T* matrix) const {
    Scaling result;
    gram<T>(reader, m_, b, 1, matrix, gram_stride_);
    const double total = trace(matrix);
    if (!(total > kLowestTrace<T> && total < kHighestTrace<T>)) {  // squares out of range, or numbers that are none
      const double largest = reader.largest(b);
      if (largest != 0) result.range = largest == largest ? Range::out : Range::broken;
      std::fill(matrix, matrix + gram_size(), T(0));
      return result;
    }
    int exponent;
    std::frexp(total, &exponent);
    const int half = (exponent + (exponent > 0 ? 1 : 0)) / 2;  // rounded up
    const T factor = static_cast<T>(std::ldexp(1.0, -2 * half));
    for (int64_t i = 0; i < m_.p; ++i)
      for (int64_t j = 0; j <= i; ++j) matrix[i * gram_stride_ + j] *= factor;
    result.scale = std::ldexp(1.0, -half);
    return result;
  }

 private:
  double trace(const T* matrix) const {
    double sum = 0;
    for (int64_t i = 0; i < m_.p; ++i) sum += matrix[i * gram_stride_ + i];
    return sum;
  }

  const Matrices& m_;
  int64_t gram_stride_;
};

}  // namespace kdkernels::truncated_svd
