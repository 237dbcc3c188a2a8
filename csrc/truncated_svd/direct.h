// The direct tier: the Gram matrices of a group, scaled, and their eigenvectors.
//
// A group is as many matrices as a vector has lanes; the last one may be filled up with zeros. What a matrix gives does not depend on its
// lane, its neighbours or the number of threads.
#pragma once

#include "eigen.h"
#include "gram.h"

namespace kdkernels::truncated_svd {

// How a matrix was scaled for its Gram matrix; finite: no NaN and no infinity is in it.
struct Scaling {
  double scale = 1;  // of M: a power of two
  bool finite = true;
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

  // Gram matrix of matrix b, [p, vector_stride()], brought to a trace in [1/4, 1) where the matrix is neither zero nor broken.
  Scaling gram_of(int64_t b, Reader<T>& reader, T* matrix) const {
    constexpr double low = sizeof(T) == 4 ? 1e-24 : 1e-200, high = sizeof(T) == 4 ? 1e34 : 1e290;
    Scaling result;
    gram<T>(reader, m_, b, 1, matrix, gram_stride_);
    double total = trace(matrix);
    if (!(total > low && total < high)) {  // squares out of range, or numbers that are none
      const double largest = reader.largest(b);
      result.finite = largest == largest;
      if (!result.finite || largest == 0) {
        std::fill(matrix, matrix + gram_size(), T(0));
        return result;
      }
      // The largest number comes near 1, or as near as a power of two that T has brings it.
      result.scale = std::ldexp(1.0, std::min(-std::ilogb(largest), std::numeric_limits<T>::max_exponent - 2));
      gram<T>(reader, m_, b, static_cast<T>(result.scale), matrix, gram_stride_);
      total = trace(matrix);
    }
    int exponent;
    std::frexp(total, &exponent);
    const int half = (exponent + (exponent > 0 ? 1 : 0)) / 2;  // rounded up
    const T factor = static_cast<T>(std::ldexp(1.0, -2 * half));
    for (int64_t i = 0; i < m_.p; ++i)
      for (int64_t j = 0; j <= i; ++j) matrix[i * gram_stride_ + j] *= factor;
    result.scale = std::min(std::ldexp(result.scale, -half), std::ldexp(1.0, std::numeric_limits<T>::max_exponent - 2));
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
