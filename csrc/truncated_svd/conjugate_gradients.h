// The projected solve of the derivative without a tridiagonal form: (lambda_j I - G) z_j = r_j on the complement of the kept vectors, where
// the matrix is positive definite, by conjugate gradients with products of M. k right-hand sides, each with its own shift, share every
// product. It is for gaps that are far from the regularisation, and says so where it meets others: then it does not converge.
//
// M. R. Hestenes, E. Stiefel. Methods of Conjugate Gradients for Solving Linear Systems. J. Res. Natl. Bur. Stand. 49, 1952.
#pragma once

#include <cmath>

#include "gram_product.h"

namespace kdkernels::truncated_svd {

template <typename T>
class ConjugateGradients {
 public:
  static constexpr int kMost = 40;
  static constexpr double kTolerance = 5e-7;  // of the residual beside r

  ConjugateGradients(const Matrices& m, int64_t k, int64_t stride)
      : k_(k), stride_(stride), product_(m, k, stride), z_(k * stride), direction_(k * stride), image_(k * stride) {}

  // a [k, stride], lambda [k]; r [k, stride], replaced by z. False: not solved.
  bool solve(int64_t b, const T* a, const double* lambda, T* r) {
    const T factor = static_cast<T>(std::ldexp(1.0, -std::ilogb(lambda[0])));
    product_.choose(b, factor);
    std::fill(z_.get(), z_.get() + k_ * stride_, T(0));
    std::copy_n(r, k_ * stride_, direction_.get());
    std::vector<double> start(k_), norm(k_);
    for (int64_t j = 0; j < k_; ++j) start[j] = norm[j] = product<T>(r + j * stride_, r + j * stride_, stride_);
    auto open = [&](int64_t j) { return norm[j] > kTolerance * kTolerance * start[j]; };
    for (int step = 0; step < kMost; ++step) {
      bool any = false;
      for (int64_t j = 0; j < k_; ++j) {
        if (!(norm[j] < std::numeric_limits<double>::infinity())) return false;
        any |= open(j);
      }
      if (!any) {
        for (int64_t c = 0; c < k_ * stride_; ++c) r[c] = factor * z_.get()[c];
        return true;
      }
      product_.apply(k_, direction_.get(), image_.get());
      for (int64_t j = 0; j < k_; ++j) {
        if (!open(j)) continue;
        T *own = r + j * stride_, *d = direction_.get() + j * stride_, *image = image_.get() + j * stride_;
        const T shift = static_cast<T>(lambda[j] * factor);
        for (int64_t c = 0; c < stride_; ++c) image[c] = shift * d[c] - image[c];
        for (int64_t i = 0; i < k_; ++i)
          add_multiple<T>(static_cast<T>(-product<T>(a + i * stride_, image, stride_)), a + i * stride_, stride_, image);
        const double curvature = product<T>(d, image, stride_);
        if (!(curvature > 0)) return false;
        const double length = norm[j] / curvature;
        add_multiple<T>(static_cast<T>(length), d, stride_, z_.get() + j * stride_);
        add_multiple<T>(static_cast<T>(-length), image, stride_, own);
        const double next = product<T>(own, own, stride_);
        const T kept = static_cast<T>(next / norm[j]);
        norm[j] = next;
        for (int64_t c = 0; c < stride_; ++c) d[c] = own[c] + kept * d[c];
      }
    }
    return false;
  }

 private:
  int64_t k_, stride_;
  GramProduct<T> product_;
  Buffer<T> z_, direction_, image_;
};

}  // namespace kdkernels::truncated_svd
