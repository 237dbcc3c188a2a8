// The Krylov tier, for matrices whose Gram matrix is large and few triplets: block Lanczos on M itself, with full reorthogonalisation.
//
// A block of k vectors finds eigenvalues of multiplicity k, which single vectors provably miss. The basis Q grows by a block at a step,
// H = Q^T G Q is kept, and its top eigenpairs (theta_j, s_j) have residuals |R s_j,last|, R being what the last product left outside the
// basis: the test of convergence costs no product with M. A few matrices go in step, so that the eigenproblems of their H share vectors of
// lanes. What does not converge, or never would at the pace it shows, is given up, for the direct tier.
//
// G. H. Golub, R. Underwood. The Block Lanczos Method for Computing Eigenvalues. In: Mathematical Software III, 1977.
#pragma once

#include "eigen.h"
#include "products.h"

namespace kdkernels::truncated_svd {

template <typename T>
class Krylov {
 public:
  static constexpr int kGroup = 4;
  static constexpr double kTolerance = 2.5e-7;  // of a residual beside the largest eigenvalue: what rounding leaves of G

  Krylov(const Matrices& m, int64_t k)
      : m_(m),
        k_(k),
        stride_(padded<T>(m.p)),
        most_(std::min<int64_t>(k == 1 ? 40 : 96, m.p) / k * k),
        product_(m, k, stride_),
        samples_(kGroup) {
    for (Sample& sample : samples_) {
      sample.basis = Buffer<T>((most_ + k) * stride_);
      sample.projected = Buffer<T>(most_ * padded<T>(most_ + k));
      sample.rest = Buffer<double>(k * k);
    }
  }

  int64_t stride() const { return stride_; }

  // Matrices first .. first + count - 1: vectors [count][k][stride] and eigenvalues [count][k] of G. converged [count].
  void run(int64_t first, int64_t count, T* vectors, double* lambda, bool* converged) {
    int64_t steps = 6;
    for (int64_t i = 0; i < count; ++i) {
      samples_[i].open = true;
      samples_[i].columns = 0;
      samples_[i].residual = 1;
      samples_[i].factor = 1;
      converged[i] = false;
    }
    const int64_t last = most_ / k_;
    for (int64_t done = 0; done < last; steps += k_ == 1 ? 1 : steps < 10 ? 4 : 2) {
      steps = std::min(steps, last);
      bool any = false;
      for (int64_t i = 0; i < count; ++i) {
        if (!samples_[i].open) continue;
        any = true;
        product_.choose(first + i, samples_[i].factor);
        if (samples_[i].columns == 0) start(samples_[i], first + i);
        for (int64_t step = done; step < steps; ++step) advance(samples_[i], step * k_);
      }
      if (!any) return;
      check(count, steps, done, vectors, lambda, converged);
      done = steps;
    }
  }

 private:
  struct Sample {
    Buffer<T> basis;      // [columns + k, stride]: orthonormal rows
    Buffer<T> projected;  // H, its rows as far as the diagonal and beyond
    Buffer<double> rest;  // R [k, k]: of the last product, along the block that it added
    int64_t columns = 0;
    double residual = 1;
    T factor = 1;  // of G: a power of two that brings its products near 1
    bool open = false;
  };

  // A deterministic vector with a part along everything.
  void random(uint64_t seed, T* v) const {
    for (int64_t i = 0; i < m_.p; ++i) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      v[i] = static_cast<T>(static_cast<double>(seed >> 11) * 0x1p-52 - 1);
    }
    std::fill(v + m_.p, v + stride_, T(0));
  }

  // Random vectors, the first of them near the sums of the rows: of features that are not negative that is nearly a_1.
  void start(Sample& s, int64_t b) {
    T* basis = s.basis.get();
    for (int64_t j = 0; j < k_; ++j) random(0x9e3779b97f4a7c15ull * static_cast<uint64_t>(j + 1), basis + j * stride_);
    Buffer<T> sums(stride_);
    product_.row_sums(sums.get());
    const double norm = std::sqrt(product<T>(sums.get(), sums.get(), stride_));
    T largest = 0;
    for (int64_t c = 0; c < m_.p; ++c) largest = std::max(largest, std::abs(sums.get()[c]));
    if (largest > T(1e-15) && largest < T(1e15)) s.factor = static_cast<T>(std::ldexp(1.0, -2 * std::ilogb(largest)));
    product_.choose(b, s.factor);
    if (norm > 0 && norm < std::numeric_limits<T>::max())
      add_multiple<T>(static_cast<T>(4 * std::sqrt(static_cast<double>(m_.p) / 3) / norm), sums.get(), stride_, basis);
    for (int64_t j = 0; j < k_; ++j) orthonormalize(s, j, length(basis + j * stride_), nullptr);
  }

  void remove(const T* basis, int64_t from, int64_t to, T* own, double* coefficient) const {
    for (int64_t i = from; i < to; ++i) {
      const double along = product<T>(basis + i * stride_, own, stride_);
      add_multiple<T>(static_cast<T>(-along), basis + i * stride_, stride_, own);
      if (coefficient) coefficient[i - from] += along;
    }
  }

  double length(const T* v) const { return std::sqrt(product<T>(v, v, stride_)); }

  // Row `row` of the basis, orthogonal to the blocks before its own, against the rows of its block, and to length 1; coefficient (null: not
  // wanted) [k] gets its part along those rows and its length. `before`: how long it was at first. Where little is left of that, roundings
  // count, so it is made orthogonal to everything again; where nothing is left, a random row takes its place.
  void orthonormalize(Sample& s, int64_t row, double before, double* coefficient) {
    T *basis = s.basis.get(), *own = basis + row * stride_;
    const int64_t block = row / k_ * k_;
    for (int pass = 0; pass < 2; ++pass) remove(basis, block, row, own, coefficient);
    double norm = length(own);
    const bool nothing = !(norm > 1e-6 * before);
    if (coefficient) coefficient[row - block] = nothing ? 0 : norm;
    if (nothing) random(static_cast<uint64_t>(row + 1000), own);
    if (nothing || norm < 0.03 * before) {
      for (int pass = 0; pass < 2; ++pass) {
        const T factor = static_cast<T>(1 / length(own));
        for (int64_t c = 0; c < stride_; ++c) own[c] *= factor;
        remove(basis, 0, row, own, nullptr);
      }
      norm = length(own);
    }
    const T factor = static_cast<T>(1 / norm);
    for (int64_t c = 0; c < stride_; ++c) own[c] *= factor;
  }

  // One product, of the block at column `last`: rows of H, and the next block.
  void advance(Sample& s, int64_t last) {
    T *basis = s.basis.get(), *next = basis + (last + k_) * stride_;
    const int64_t columns = last + k_, h_stride = padded<T>(most_ + k_);
    T* h = s.projected.get() + last * h_stride;
    product_.apply(k_, basis + last * stride_, next);
    const Block<T> rows{basis, stride_, columns, m_.p};
    Buffer<T> along(k_ * h_stride);
    std::vector<double> before(k_);
    for (int64_t j = 0; j < k_; ++j) before[j] = length(next + j * stride_);
    for (int pass = 0; pass < 2; ++pass) {
      dot_rows_with<T>(rows, k_, next, stride_, false, along.get(), h_stride);
      for (int64_t j = 0; j < k_; ++j)
        for (int64_t i = 0; i < columns; ++i) {
          T& value = along.get()[j * h_stride + i];
          h[j * h_stride + i] = (pass == 0 ? T(0) : h[j * h_stride + i]) + value;
          value = -value;
        }
      combine_rows<T>(rows, k_, along.get(), h_stride, true, next, stride_);
    }
    std::fill(s.rest.get(), s.rest.get() + k_ * k_, 0.0);
    for (int64_t j = 0; j < k_; ++j) orthonormalize(s, columns + j, before[j], s.rest.get() + j * k_);
    s.columns = columns;
  }

  // Eigenpairs of the H of all open matrices, and which of them will do.
  void check(int64_t count, int64_t steps, int64_t before, T* vectors, double* lambda, bool* converged) {
    const int64_t columns = steps * k_, h_stride = padded<T>(most_ + k_);
    const Eigen<T> eigen(columns, k_);
    constexpr int lanes = Eigen<T>::kGroup;
    Buffer<T> matrices(lanes * columns * eigen.stride()), s(lanes * k_ * eigen.stride());
    Buffer<Vec<T>> state(GroupState<T>::size(columns, k_));
    std::vector<double> scales(lanes, 1.0), theta(lanes * k_), traces(count);
    typename Eigen<T>::Workspace work(columns, k_);
    std::fill(matrices.get(), matrices.get() + lanes * columns * eigen.stride(), T(0));
    for (int64_t i = 0; i < count; ++i) {
      const T* h = samples_[i].projected.get();
      for (int64_t c = 0; c < columns && samples_[i].open; ++c) traces[i] += h[c * h_stride + c];
      if (!(traces[i] > 1e-6 && traces[i] < 1e30)) samples_[i].open = false;  // out of range, or broken
      for (int64_t c = 0; c < columns && samples_[i].open; ++c)
        for (int64_t d = 0; d <= c; ++d)
          matrices.get()[(i * columns + c) * eigen.stride() + d] = static_cast<T>(h[c * h_stride + d] / traces[i]);
    }
    eigen.top(matrices.get(), scales.data(), GroupState<T>(state.get(), columns, k_), s.get(), theta.data(), work);
    for (int64_t i = 0; i < count; ++i) {
      Sample& sample = samples_[i];
      if (!sample.open) continue;
      const T* own = s.get() + i * k_ * eigen.stride();
      const double largest = theta[i * k_] * traces[i];
      double residual = 0;
      for (int64_t j = 0; j < k_; ++j) {
        double squares = 0;
        for (int64_t row = 0; row < k_; ++row) {  // R is upper triangular, stored by column
          double sum = 0;
          for (int64_t column = row; column < k_; ++column)
            sum += sample.rest.get()[column * k_ + row] * own[j * eigen.stride() + columns - k_ + column];
          squares += sum * sum;
        }
        residual = std::max(residual, std::sqrt(squares) / largest);
      }
      if (residual <= kTolerance) {
        converged[i] = true;
        const Block<T> rows{sample.basis.get(), stride_, columns, m_.p};
        combine_rows<T>(rows, k_, own, eigen.stride(), false, vectors + i * k_ * stride_, stride_);
        for (int64_t j = 0; j < k_; ++j) lambda[i * k_ + j] = theta[i * k_ + j] * traces[i] / sample.factor;
      }
      // At the pace of the last steps, how many more are needed? The direct tier takes the time of about p / (2 k + 5) of them.
      const double pace = std::log(sample.residual / residual) / static_cast<double>(steps - before);
      const double needed = pace > 0 ? std::log(residual / kTolerance) / pace : 1e9;
      const double worth = static_cast<double>(m_.p) / static_cast<double>(2 * k_ + 5), room = static_cast<double>(most_ / k_ - steps);
      sample.open = !converged[i] && residual == residual && needed <= std::min(worth, 1.5 * room);
      sample.residual = residual;
    }
  }

  const Matrices& m_;
  int64_t k_, stride_, most_;
  GramProduct<T> product_;
  std::vector<Sample> samples_;
};

// The projected solve of the derivative without a tridiagonal form: (lambda_j I - G) z_j = r_j on the complement of the kept vectors, where
// the matrix is positive definite, by conjugate gradients with products of M. k right-hand sides, each with its own shift, share every
// product. It is for gaps that are far from the regularisation, and says so where it meets others: then it does not converge.
//
// M. R. Hestenes, E. Stiefel. Methods of Conjugate Gradients for Solving Linear Systems. J. Res. Natl. Bur. Stand. 49, 1952.
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
