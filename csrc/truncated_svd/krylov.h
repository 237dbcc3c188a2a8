// The Krylov tier, for few triplets of matrices whose Gram matrix is large: block Lanczos on M
// itself, with full reorthogonalisation.
//
// A block of k vectors finds eigenvalues of multiplicity k, which single vectors provably miss.
// Each step adds a block to the basis Q and computes H = Q^T G Q. The top eigenpairs (theta_j, s_j)
// of H have the residuals |R s_j,last|, where R is the part of the last product outside of the
// basis, so the convergence test needs no product with M. A few matrices run in step, so that the
// eigenproblems of their H share the lanes of vectors. A matrix that does not converge, or would
// not converge at its present rate, is left to the direct tier.
//
// G. H. Golub, R. Underwood. The Block Lanczos Method for Computing Eigenvalues. In: Mathematical
// Software III, 1977.
#pragma once

#include "eigen.h"
#include "products.h"

namespace kdkernels::truncated_svd {

template <typename T>
class Krylov {
 public:
  static constexpr int kGroup = 4;
  // The largest residual relative to the largest eigenvalue: the rounding error of G.
  static constexpr double kTolerance = 2.5e-7;

  Krylov(const Matrices& m, int64_t k)
      : m_(m),
        k_(k),
        stride_(padded<T>(m.p)),
        max_columns_(std::min<int64_t>(k == 1 ? 40 : 96, m.p) / k * k),
        product_(m, k, stride_),
        samples_(kGroup) {
    for (Sample& sample : samples_) {
      sample.basis = Buffer<T>((max_columns_ + k) * stride_);
      sample.projected = Buffer<T>(max_columns_ * padded<T>(max_columns_ + k));
      sample.remainder = Buffer<double>(k * k);
    }
  }

  int64_t stride() const { return stride_; }

  // Processes matrices first .. first + count - 1: eigenvectors [count][k][stride] and eigenvalues
  // [count][k] of G; converged [count].
  void run(int64_t first, int64_t count, T* vectors, double* lambda, bool* converged) {
    int64_t steps = 6;
    for (int64_t i = 0; i < count; ++i) {
      samples_[i].active = true;
      samples_[i].columns = 0;
      samples_[i].residual = 1;
      samples_[i].factor = 1;
      converged[i] = false;
    }
    const int64_t max_steps = max_columns_ / k_;
    for (int64_t steps_done = 0; steps_done < max_steps; steps += k_ == 1 ? 1 : steps < 10 ? 4 : 2) {
      steps = std::min(steps, max_steps);
      bool any_active = false;
      for (int64_t i = 0; i < count; ++i) {
        if (!samples_[i].active) continue;
        any_active = true;
        product_.set_matrix(first + i, samples_[i].factor);
        if (samples_[i].columns == 0) make_start_block(samples_[i], first + i);
        for (int64_t step = steps_done; step < steps; ++step) lanczos_step(samples_[i], step * k_);
      }
      if (!any_active) return;
      check_convergence(count, steps, steps_done, vectors, lambda, converged);
      steps_done = steps;
    }
  }

 private:
  struct Sample {
    Buffer<T> basis;           // [columns + k, stride]: orthonormal rows
    Buffer<T> projected;       // H: its rows up to the diagonal, and beyond
    Buffer<double> remainder;  // R [k, k]: the last product, in terms of the block that it added
    int64_t columns = 0;
    double residual = 1;
    T factor = 1;  // a power of two that brings products with factor * G near 1
    bool active = false;
  };

  // Fills v with deterministic pseudo-random numbers, so that it has a component along every
  // vector.
  void fill_random(uint64_t seed, T* v) const {
    for (int64_t i = 0; i < m_.p; ++i) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      v[i] = static_cast<T>(static_cast<double>(seed >> 11) * 0x1p-52 - 1);
    }
    std::fill(v + m_.p, v + stride_, T(0));
  }

  // The first block: random vectors. The first of them is close to the sums of the rows of M, which
  // nearly are a multiple of a_1 if features are not negative.
  void make_start_block(Sample& s, int64_t b) {
    T* basis = s.basis.get();
    for (int64_t j = 0; j < k_; ++j) fill_random(0x9e3779b97f4a7c15ull * static_cast<uint64_t>(j + 1), basis + j * stride_);
    Buffer<T> sums(stride_);
    product_.row_sums(sums.get());
    const double norm = std::sqrt(product<T>(sums.get(), sums.get(), stride_));
    T largest = 0;
    for (int64_t c = 0; c < m_.p; ++c) largest = std::max(largest, std::abs(sums.get()[c]));
    if (largest > T(1e-15) && largest < T(1e15)) s.factor = static_cast<T>(std::ldexp(1.0, -2 * std::ilogb(largest)));
    product_.set_matrix(b, s.factor);
    if (norm > 0 && norm < std::numeric_limits<T>::max())
      add_multiple<T>(static_cast<T>(4 * std::sqrt(static_cast<double>(m_.p) / 3) / norm), sums.get(), stride_, basis);
    for (int64_t j = 0; j < k_; ++j) orthonormalize(s, j, length(basis + j * stride_), nullptr);
  }

  void subtract_projections(const T* basis, int64_t from, int64_t to, T* vector, double* coefficient) const {
    for (int64_t i = from; i < to; ++i) {
      const double projection = product<T>(basis + i * stride_, vector, stride_);
      add_multiple<T>(static_cast<T>(-projection), basis + i * stride_, stride_, vector);
      if (coefficient) coefficient[i - from] += projection;
    }
  }

  double length(const T* v) const { return std::sqrt(product<T>(v, v, stride_)); }

  // Makes row `row` of the basis orthogonal to the other rows of its block that are before it, and
  // scales it to length 1. It must be orthogonal to the blocks before. If `coefficient` [k] is not
  // null, it receives the components along the rows of the block, and the length. initial_norm: the
  // length of the row before any orthogonalisation. If little of this length is left, rounding
  // errors matter, and the row is made orthogonal to the whole basis again. If nothing is left, a
  // random vector replaces the row.
  void orthonormalize(Sample& s, int64_t row, double initial_norm, double* coefficient) {
    T *basis = s.basis.get(), *vector = basis + row * stride_;
    const int64_t block = row / k_ * k_;
    for (int pass = 0; pass < 2; ++pass) subtract_projections(basis, block, row, vector, coefficient);
    double norm = length(vector);
    const bool vanished = !(norm > 1e-6 * initial_norm);
    if (coefficient) coefficient[row - block] = vanished ? 0 : norm;
    if (vanished) fill_random(static_cast<uint64_t>(row + 1000), vector);
    if (vanished || norm < 0.03 * initial_norm) {
      for (int pass = 0; pass < 2; ++pass) {
        const T factor = static_cast<T>(1 / length(vector));
        for (int64_t c = 0; c < stride_; ++c) vector[c] *= factor;
        subtract_projections(basis, 0, row, vector, nullptr);
      }
      norm = length(vector);
    }
    const T factor = static_cast<T>(1 / norm);
    for (int64_t c = 0; c < stride_; ++c) vector[c] *= factor;
  }

  // One step: the product of G and the block that starts at row `first_row` gives rows of H and the
  // next block.
  void lanczos_step(Sample& s, int64_t first_row) {
    T *basis = s.basis.get(), *next = basis + (first_row + k_) * stride_;
    const int64_t columns = first_row + k_, h_stride = padded<T>(max_columns_ + k_);
    T* h = s.projected.get() + first_row * h_stride;
    product_.apply(k_, basis + first_row * stride_, next);
    const Block<T> rows{basis, stride_, columns, m_.p};
    Buffer<T> projections(k_ * h_stride);
    std::vector<double> initial_norms(k_);
    for (int64_t j = 0; j < k_; ++j) initial_norms[j] = length(next + j * stride_);
    for (int pass = 0; pass < 2; ++pass) {
      dot_rows_with_vectors<T>(rows, k_, next, stride_, false, projections.get(), h_stride);
      for (int64_t j = 0; j < k_; ++j)
        for (int64_t i = 0; i < columns; ++i) {
          T& value = projections.get()[j * h_stride + i];
          h[j * h_stride + i] = (pass == 0 ? T(0) : h[j * h_stride + i]) + value;
          value = -value;
        }
      combine_rows<T>(rows, k_, projections.get(), h_stride, true, next, stride_);
    }
    std::fill(s.remainder.get(), s.remainder.get() + k_ * k_, 0.0);
    for (int64_t j = 0; j < k_; ++j) orthonormalize(s, columns + j, initial_norms[j], s.remainder.get() + j * k_);
    s.columns = columns;
  }

  // Computes the eigenpairs of H for all active matrices, and marks the matrices that have
  // converged or are left to the direct tier as not active.
  void check_convergence(int64_t count, int64_t steps, int64_t steps_before, T* vectors, double* lambda, bool* converged) {
    const int64_t columns = steps * k_, h_stride = padded<T>(max_columns_ + k_);
    const Eigen<T> eigen(columns, k_);
    constexpr int lanes = Eigen<T>::kGroup;
    Buffer<T> matrices(lanes * columns * eigen.stride()), eigenvectors(lanes * k_ * eigen.stride());
    Buffer<Vec<T>> state(GroupState<T>::size(columns, k_));
    std::vector<double> scales(lanes, 1.0), theta(lanes * k_), traces(count);
    typename Eigen<T>::Workspace work(columns, k_);
    std::fill(matrices.get(), matrices.get() + lanes * columns * eigen.stride(), T(0));
    for (int64_t i = 0; i < count; ++i) {
      const T* h = samples_[i].projected.get();
      for (int64_t c = 0; c < columns && samples_[i].active; ++c) traces[i] += h[c * h_stride + c];
      // Out of range, or not finite.
      if (!(traces[i] > 1e-6 && traces[i] < 1e30)) samples_[i].active = false;
      for (int64_t c = 0; c < columns && samples_[i].active; ++c)
        for (int64_t d = 0; d <= c; ++d)
          matrices.get()[(i * columns + c) * eigen.stride() + d] = static_cast<T>(h[c * h_stride + d] / traces[i]);
    }
    eigen.largest_eigenpairs(matrices.get(), scales.data(), count, GroupState<T>(state.get(), columns, k_), false, 0, eigenvectors.get(),
                             theta.data(), work);
    for (int64_t i = 0; i < count; ++i) {
      Sample& sample = samples_[i];
      if (!sample.active) continue;
      const T* s = eigenvectors.get() + i * k_ * eigen.stride();
      const double lambda_1 = theta[i * k_] * traces[i];
      double residual = 0;
      for (int64_t j = 0; j < k_; ++j) {
        double squares = 0;
        for (int64_t row = 0; row < k_; ++row) {  // R is upper triangular, stored by column
          double sum = 0;
          for (int64_t column = row; column < k_; ++column)
            sum += sample.remainder.get()[column * k_ + row] * s[j * eigen.stride() + columns - k_ + column];
          squares += sum * sum;
        }
        residual = std::max(residual, std::sqrt(squares) / lambda_1);
      }
      if (residual <= kTolerance) {
        converged[i] = true;
        const Block<T> rows{sample.basis.get(), stride_, columns, m_.p};
        combine_rows<T>(rows, k_, s, eigen.stride(), false, vectors + i * k_ * stride_, stride_);
        for (int64_t j = 0; j < k_; ++j) lambda[i * k_ + j] = theta[i * k_ + j] * traces[i] / sample.factor;
      }
      // The number of further steps at the rate of the last steps. The direct tier takes as long as
      // about p / (2 k + 5) steps.
      const double rate = std::log(sample.residual / residual) / static_cast<double>(steps - steps_before);
      const double steps_needed = rate > 0 ? std::log(residual / kTolerance) / rate : 1e9;
      const double direct_cost = static_cast<double>(m_.p) / static_cast<double>(2 * k_ + 5),
                   steps_left = static_cast<double>(max_columns_ / k_ - steps);
      sample.active = !converged[i] && residual == residual && steps_needed <= std::min(direct_cost, 1.5 * steps_left);
      sample.residual = residual;
    }
  }

  const Matrices& m_;
  int64_t k_, stride_, max_columns_;
  GramProduct<T> product_;
  std::vector<Sample> samples_;
};

// The projected solve of the derivative without a tridiagonal form: (lambda_j I - G) z_j = r_j on
// the complement of the kept vectors, where this matrix is positive definite, by conjugate
// gradients with products of M. k right-hand sides, each with its own shift, share every product.
// The method requires gaps that are much larger than the regularisation. Otherwise it does not
// converge, and solve() returns false.
//
// M. R. Hestenes, E. Stiefel. Methods of Conjugate Gradients for Solving Linear Systems. J. Res.
// Natl. Bur. Stand. 49, 1952.
template <typename T>
class ConjugateGradients {
 public:
  static constexpr int kMaxSteps = 40;
  static constexpr double kTolerance = 5e-7;  // of the residual relative to r

  ConjugateGradients(const Matrices& m, int64_t k, int64_t stride)
      : k_(k), stride_(stride), product_(m, k, stride), z_(k * stride), direction_(k * stride), image_(k * stride) {}

  // a [k, stride], lambda [k]. Replaces r [k, stride] by z. Residuals below the rounding errors of r,
  // which are relative to unprojected_squares [k], count as 0. Returns false if the system is not
  // solved.
  bool solve(int64_t b, const T* a, const double* lambda, const double* unprojected_squares, T* r) {
    const T factor = static_cast<T>(std::ldexp(1.0, -std::ilogb(lambda[0])));
    product_.set_matrix(b, factor);
    std::fill(z_.get(), z_.get() + k_ * stride_, T(0));
    std::copy_n(r, k_ * stride_, direction_.get());
    constexpr double eps = std::numeric_limits<T>::epsilon();
    std::vector<double> limits(k_), squares(k_);
    for (int64_t j = 0; j < k_; ++j) {
      squares[j] = product<T>(r + j * stride_, r + j * stride_, stride_);
      limits[j] = std::max(kTolerance * kTolerance * squares[j], eps * eps * unprojected_squares[j]);
    }
    auto active = [&](int64_t j) { return squares[j] > limits[j]; };
    for (int step = 0; step < kMaxSteps; ++step) {
      bool any_active = false;
      for (int64_t j = 0; j < k_; ++j) {
        if (!(squares[j] < std::numeric_limits<double>::infinity())) return false;
        any_active |= active(j);
      }
      if (!any_active) {
        for (int64_t c = 0; c < k_ * stride_; ++c) r[c] = factor * z_.get()[c];
        return true;
      }
      product_.apply(k_, direction_.get(), image_.get());
      for (int64_t j = 0; j < k_; ++j) {
        if (!active(j)) continue;
        T *residual = r + j * stride_, *d = direction_.get() + j * stride_, *image = image_.get() + j * stride_;
        const T shift = static_cast<T>(lambda[j] * factor);
        for (int64_t c = 0; c < stride_; ++c) image[c] = shift * d[c] - image[c];
        for (int64_t i = 0; i < k_; ++i)
          add_multiple<T>(static_cast<T>(-product<T>(a + i * stride_, image, stride_)), a + i * stride_, stride_, image);
        const double curvature = product<T>(d, image, stride_);
        if (!(curvature > 0)) return false;
        const double step_length = squares[j] / curvature;
        add_multiple<T>(static_cast<T>(step_length), d, stride_, z_.get() + j * stride_);
        add_multiple<T>(static_cast<T>(-step_length), image, stride_, residual);
        const double next_squares = product<T>(residual, residual, stride_);
        const T beta = static_cast<T>(next_squares / squares[j]);
        squares[j] = next_squares;
        for (int64_t c = 0; c < stride_; ++c) d[c] = residual[c] + beta * d[c];
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
