// CPU kernels of the rbf_correlation and rbf_correlation_loss ops, compiled once per instruction
// set.
#include "rbf_correlation.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "../common/memory.h"
#include "../common/parallel.h"
#include "dense.h"
#include "pairs.h"
#include "rank.h"
#include "terms.h"

namespace kdkernels::rbf_correlation {
namespace {

constexpr int64_t kPairsOfOneThread = 1 << 14;  // with at most as many pairs, a second thread costs more than it saves

enum { kStudentX, kStudentY, kTeacherX, kTeacherY };
using Inputs = std::array<at::Tensor, 4>;

// Calls body(pointer, stride) for a column [n] of sample b of x [B, n, K].
template <typename Body>
void with_column(const at::Tensor& x, int64_t b, int64_t column, Body&& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rbf_correlation",
                                  [&] { body(static_cast<scalar_t*>(address(x)) + b * x.stride(0) + column * x.stride(2), x.stride(1)); });
}

Range read(const at::Tensor& x, int64_t b, int64_t column, double* to) {
  const int64_t n = x.size(1);
  with_column(x, b, column, [&](const auto* from, int64_t stride) {
    if (stride == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    else
      for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  });
  constexpr double inf = std::numeric_limits<double>::infinity();
  Doubles low = simd::splat<double>(inf), high = simd::splat<double>(-inf), non_finite{};
  int64_t i = 0;
  for (; i + kVectorSize <= n; i += kVectorSize) {
    const Doubles v = load<double>(to + i);
    low = select<double>(v < low, v, low);
    high = simd::max(v, high);
    non_finite += v - v;  // NaN if a number is not finite
  }
  Range range{-simd::largest<double>(-low), simd::largest<double>(high)};
  double non_finite_sum = simd::sum<double>(non_finite);
  for (; i < n; ++i) {
    range = join(range, {to[i], to[i]});
    non_finite_sum += to[i] - to[i];
  }
  return {range.low + non_finite_sum, range.high + non_finite_sum};
}

// The loss of each column, and the gradients that are wanted, times `factor`. The gradients have
// the dtype of the loss: numbers that are small in float32 may underflow in half precision until
// they are multiplied by the upstream gradient.
class Loss {
 public:
  Loss(const Inputs& inputs, double beta, double factor, std::array<bool, 4> wanted)
      : inputs_(inputs),
        m_(inputs[kStudentX].size(1)),
        n_(inputs[kStudentY].size(1)),
        columns_(inputs[kStudentX].size(2)),
        scale_(std::sqrt(2 / beta)),
        gradient_factor_(2 * scale_ * factor),
        dtype_(compute_dtype(inputs[0], inputs[1], inputs[2], inputs[3])),
        losses_(inputs[kStudentX].size(0) * columns_) {
    for (int i = 0; i < 4; ++i)
      if (wanted[i]) gradients_[i] = at::empty_like(inputs[i], inputs[i].options().dtype(dtype_));
  }

  void run() {
    const int64_t columns = static_cast<int64_t>(losses_.size());
    std::vector<char> needs_pairs(columns);
    const int64_t series_grain = std::max<int64_t>(1, (int64_t(1) << 14) / (m_ + n_ + 1));
    const bool has_few_pairs = columns * m_ * n_ <= kPairsOfOneThread;
    auto make_state = [&] { return std::pair(ColumnBuffers(m_, n_), SeriesState(m_, n_)); };
    parallel_for(0, columns, has_few_pairs ? std::max<int64_t>(1, columns) : series_grain, make_state,
                 [&](auto& state, int64_t begin, int64_t end) {
                   auto& [column, series] = state;
                   for (int64_t c = begin; c < end; ++c) {
                     const CenteredBounds bounds = load(c, column);
                     if (try_series(c, bounds, column, series)) continue;
                     if (has_few_pairs)
                       sum_pairs(c, column, bounds.center);
                     else
                       needs_pairs[c] = true;
                   }
                 });
    std::vector<int64_t> remaining;
    for (int64_t c = 0; c < columns; ++c)
      if (needs_pairs[c]) remaining.push_back(c);
    // Distribute whole columns over the threads or, if there are only a few columns, the rows of
    // each column.
    if (static_cast<int64_t>(remaining.size()) >= 4 * at::get_num_threads() || m_ * n_ < (1 << 14)) {
      const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 13) / (m_ * n_ + 1));
      parallel_for(
          0, static_cast<int64_t>(remaining.size()), grain, [&] { return ColumnBuffers(m_, n_); },
          [&](ColumnBuffers& column, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) sum_pairs(remaining[i], column, load(remaining[i], column).center);
          });
    } else if (!remaining.empty()) {
      ColumnBuffers column(m_, n_);
      for (int64_t c : remaining) sum_pairs(c, column, load(c, column).center);
    }
  }

  double sample_loss(int64_t b) const {
    double total = 0;
    for (int64_t k = 0; k < columns_; ++k) total += losses_[b * columns_ + k];
    return total;
  }
  at::Tensor gradient(int i) const { return gradients_[i].defined() ? gradients_[i] : at::empty({0}, inputs_[i].options().dtype(dtype_)); }

 private:
  // Memory for the four vectors of a column (student and teacher, x and y), their differences and sums, and one gradient.
  struct ColumnBuffers {
    Buffer<double> values[4], gradient;
    DifferenceAndSum x, y;  // of the sum over pairs
    ColumnBuffers(int64_t m, int64_t n)
        : values{Buffer<double>(m), Buffer<double>(n), Buffer<double>(m), Buffer<double>(n)},
          gradient(padded(std::max(m, n))),
          x(m),
          y(n) {}
  };
  struct SeriesState {
    Side x, y;
    Products x_products, y_products;
    SeriesState(int64_t m, int64_t n) : x(m), y(n) {}
  };

  CenteredBounds load(int64_t c, const ColumnBuffers& column) const {
    Range range[4];
    for (int i = 0; i < 4; ++i) range[i] = read(inputs_[i], c / columns_, c % columns_, column.values[i].get());
    return CenteredBounds(join(range[kStudentX], range[kTeacherX]), join(range[kStudentY], range[kTeacherY]));
  }

  bool is_wanted(int i) const { return gradients_[i].defined(); }

  // Computes loss and gradients of a loaded column from the series. Returns false if the series needs too many terms;
  // the caller then sums over all pairs.
  bool try_series(int64_t c, const CenteredBounds& bounds, ColumnBuffers& column, SeriesState& series) {
    if (std::isnan(bounds.a + bounds.b)) return write_nan(c, column);
    const bool is_double = dtype_ == at::kDouble;
    const int rank = rank_for(scale_ * scale_ * bounds.a * bounds.b, accuracy(is_double));
    if (!series_is_cheaper(rank, m_, n_)) return false;
    series.x.set(column.values[kStudentX].get(), column.values[kTeacherX].get(), bounds.center, bounds.a, scale_, rank, is_double);
    series.y.set(column.values[kStudentY].get(), column.values[kTeacherY].get(), bounds.center, bounds.b, scale_, rank, is_double);
    with_rank(rank, [&](auto fixed_rank) { sum_series<fixed_rank.value>(c, column, series); });
    return true;
  }

  template <int kRank>
  void sum_series(int64_t c, ColumnBuffers& column, SeriesState& series) {
    series.x.multiply<kRank>(series.x_products);
    series.y.multiply<kRank>(series.y_products);
    losses_[c] = square_sum(series.x_products, series.y_products);
    for (int i = 0; i < 4; ++i) {
      if (!is_wanted(i)) continue;
      const bool is_x = i % 2 == 0, student = i < 2;
      (is_x ? series.x : series.y)
          .differentiate<kRank>(is_x ? series.y_products : series.x_products, student, student ? gradient_factor_ : -gradient_factor_,
                                column.gradient.get());
      write(column.gradient.get(), 1.0, i, c);
    }
  }

  bool write_nan(int64_t c, ColumnBuffers& column) {
    losses_[c] = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(column.gradient.get(), std::max(m_, n_), losses_[c]);
    for (int i = 0; i < 4; ++i)
      if (is_wanted(i)) write(column.gradient.get(), 1.0, i, c);
    return true;
  }

  // Sums over all pairs of a column that has been loaded.
  void sum_pairs(int64_t c, ColumnBuffers& column, double center) {
    DifferenceAndSum &x = column.x, &y = column.y;
    x.set(column.values[kStudentX].get(), column.values[kTeacherX].get(), m_, center, scale_);
    y.set(column.values[kStudentY].get(), column.values[kTeacherY].get(), n_, center, scale_);
    const int64_t blocks = (m_ + kRows - 1) / kRows, width = padded(n_);
    const bool wants_x = is_wanted(kStudentX) || is_wanted(kTeacherX), wants_y = is_wanted(kStudentY) || is_wanted(kTeacherY);
    const Buffer<double> grad_x(wants_x ? 2 * m_ : 0), grad_y(wants_y ? 2 * blocks * width : 0);
    std::fill_n(grad_y.get(), wants_y ? 2 * blocks * width : 0, 0.0);
    std::vector<double> losses(blocks);
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kRows;
        Gradients x_gradients, y_gradients;
        for (int network = 0; network < 2; ++network) {
          x_gradients.arrays[network] = is_wanted(2 * network) ? grad_x.get() + network * m_ + first : nullptr;
          y_gradients.arrays[network] = is_wanted(2 * network + 1) ? grad_y.get() + (network * blocks + block) * width : nullptr;
        }
        const auto sum = x_gradients.wanted() || y_gradients.wanted() ? sum_row_block<true> : sum_row_block<false>;
        losses[block] = sum(x, y, first, std::min(kRows, m_ - first), n_, x_gradients, y_gradients);
      }
    });
    losses_[c] = 0;
    for (double loss : losses) losses_[c] += loss;
    for (int network = 0; network < 2; ++network) {
      if (is_wanted(2 * network)) write(grad_x.get() + network * m_, gradient_factor_, 2 * network, c);
      if (!is_wanted(2 * network + 1)) continue;
      double* sum = grad_y.get() + network * blocks * width;
      for (int64_t block = 1; block < blocks; ++block)
        for (int64_t i = 0; i < n_; ++i) sum[i] += sum[block * width + i];
      write(sum, gradient_factor_, 2 * network + 1, c);
    }
  }

  // Writes factor * from[i] to the gradient of column c of an input.
  void write(const double* from, double factor, int input, int64_t c) const {
    const at::Tensor& gradient = gradients_[input];
    with_column(gradient, c / columns_, c % columns_, [&](auto* to, int64_t stride) {
      using Stored = std::remove_pointer_t<decltype(to)>;
      const int64_t n = gradient.size(1);
      if (stride == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Stored>(factor * from[i]);
      else
        for (int64_t i = 0; i < n; ++i) to[i * stride] = static_cast<Stored>(factor * from[i]);
    });
  }

  Inputs inputs_;
  at::Tensor gradients_[4];
  int64_t m_, n_, columns_;
  double scale_, gradient_factor_;
  at::ScalarType dtype_;
  std::vector<double> losses_;  // [B, K]
};

at::Tensor reduce(const Loss& loss, const at::Tensor& sx, at::ScalarType dtype, Reduction reduction) {
  const int64_t batch = sx.size(0);
  const at::Tensor result = at::empty(loss_shape(sx, reduction), sx.options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES(dtype, "rbf_correlation_loss", [&] {
    auto* out = result.mutable_data_ptr<scalar_t>();
    double total = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const double sample_loss = loss.sample_loss(b);
      if (reduction == Reduction::none) out[b] = static_cast<scalar_t>(sample_loss);
      total += sample_loss;
    }
    if (reduction != Reduction::none)
      out[0] = static_cast<scalar_t>(reduction == Reduction::batchmean ? total / std::max<int64_t>(batch, 1) : total);
  });
  return result;
}

using LossAndGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LossAndGradients rbf_correlation_loss_cpu(const at::Tensor& sx, const at::Tensor& sy, const at::Tensor& tx, const at::Tensor& ty,
                                          double beta, int64_t reduction, std::array<bool, 4> wanted) {
  check_pairs(sx, sy, tx, ty);
  check_beta(beta);
  const Reduction parsed_reduction = parse_reduction(reduction);
  Loss loss({sx, sy, tx, ty}, beta, parsed_reduction == Reduction::batchmean ? 1 / std::max(1.0, static_cast<double>(sx.size(0))) : 1,
            wanted);
  loss.run();
  return {reduce(loss, sx, compute_dtype(sx, sy, tx, ty), parsed_reduction), loss.gradient(0), loss.gradient(1), loss.gradient(2),
          loss.gradient(3)};
}

// gradient [B, n, K] *= grad_loss, which is one number or one per sample. A sample whose upstream
// gradient is 0 was excluded from the loss: its gradient is set to 0 even if the saved gradient is
// not finite.
void rbf_correlation_loss_rescale_cpu(at::Tensor& gradient, const at::Tensor& grad_loss) {
  check_floating(gradient, "gradient");
  check_floating(grad_loss, "grad_loss");
  TORCH_CHECK_VALUE(grad_loss.dim() == 0 || (gradient.dim() == 3 && grad_loss.sizes() == at::IntArrayRef{gradient.size(0)}),
                    "grad_loss must be one number or have the shape [B], got ", grad_loss.sizes());
  if (gradient.numel() == 0) return;
  if (grad_loss.dim() == 0) {
    if (grad_loss.item().toDouble() != 1) gradient.mul_(grad_loss);
    return;
  }
  const at::Tensor factor = grad_loss.view({-1, 1, 1});
  gradient.mul_(factor).masked_fill_(factor.eq(0), 0);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rbf_correlation_loss_backward_cpu(const at::Tensor& grad_loss,
                                                                                             const at::Tensor& sx, const at::Tensor& sy,
                                                                                             const at::Tensor& tx, const at::Tensor& ty,
                                                                                             double beta, int64_t reduction,
                                                                                             std::array<bool, 4> wanted) {
  auto [loss, grad_sx, grad_sy, grad_tx, grad_ty] = rbf_correlation_loss_cpu(sx, sy, tx, ty, beta, reduction, wanted);
  check_floating(grad_loss, "grad_loss");
  check_shape(grad_loss, "grad_loss", loss.sizes());
  const at::Tensor* inputs[] = {&sx, &sy, &tx, &ty};
  at::Tensor* gradients[] = {&grad_sx, &grad_sy, &grad_tx, &grad_ty};
  for (int i = 0; i < 4; ++i) {
    if (wanted[i]) rbf_correlation_loss_rescale_cpu(*gradients[i], grad_loss);
    *gradients[i] = gradients[i]->to(inputs[i]->scalar_type());
  }
  return {grad_sx, grad_sy, grad_tx, grad_ty};
}

template <typename T>
at::Tensor correlate(const at::Tensor& x, const at::Tensor& y, double beta) {
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  const at::Tensor a = x.to(dtype).contiguous(), b = y.to(dtype).contiguous();
  const int64_t m = x.size(1), columns = x.size(2), row_size = y.size(1) * columns;
  const at::Tensor out = recycled_empty({x.size(0), m, y.size(1), columns}, dtype);
  if (out.numel() == 0) return out;
  const T *xs = a.const_data_ptr<T>(), *ys = b.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const bool stream =
      row_size % simd::kLanes<T> == 0 && reinterpret_cast<uintptr_t>(to) % simd::kBytes == 0 && bypasses_caches(out.nbytes());
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 14) / row_size);
  parallel_for(
      0, x.size(0) * m, grain, [&] { return Pattern<T>(columns); },
      [&](Pattern<T>& pattern, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          pattern.set(xs + row * columns);
          correlate_row(pattern, ys + row / m * row_size, row_size, beta, stream, to + row * row_size);
        }
        simd::fence();
      });
  return out;
}

// Rows [N * K] of the upstream gradient, read in place. A row with other strides (for example an
// expanded scalar) is copied first.
template <typename T>
class GradientRows {
 public:
  explicit GradientRows(const at::Tensor& grad)
      : grad_(grad), data_(grad.const_data_ptr<T>()), adjacent_(grad.stride(3) == 1 && grad.stride(2) == grad.size(3)) {}

  const T* row(int64_t b, int64_t m, std::vector<T>& scratch) const {
    const T* from = data_ + b * grad_.stride(0) + m * grad_.stride(1);
    if (adjacent_) return from;
    const int64_t columns = grad_.size(3);
    scratch.resize(grad_.size(2) * columns);
    for (int64_t n = 0; n < grad_.size(2); ++n)
      for (int64_t k = 0; k < columns; ++k) scratch[n * columns + k] = from[n * grad_.stride(2) + k * grad_.stride(3)];
    return scratch.data();
  }

 private:
  const at::Tensor& grad_;
  const T* data_;
  bool adjacent_;
};

template <typename T>
std::tuple<at::Tensor, at::Tensor> differentiate(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y, double beta) {
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  const at::Tensor a = x.to(dtype).contiguous(), b = y.to(dtype).contiguous(), upstream = grad.to(dtype);
  const int64_t batch = x.size(0), m = x.size(1), columns = x.size(2), row_size = y.size(1) * columns;
  const int64_t blocks = std::max<int64_t>(1, (m + kRows - 1) / kRows);
  const at::Tensor grad_x = at::empty(x.sizes(), a.options()), grad_y = at::zeros({blocks, batch, row_size}, a.options());
  if (grad.numel() == 0) return {at::zeros_like(x), at::zeros_like(y)};
  const T *xs = a.const_data_ptr<T>(), *ys = b.const_data_ptr<T>();
  T *gx = grad_x.mutable_data_ptr<T>(), *gy = grad_y.mutable_data_ptr<T>();
  const GradientRows<T> rows(upstream);
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 14) / (row_size * std::min(m, kRows)));
  auto make_state = [&] { return std::tuple(Pattern<T>(columns), Pattern<T>(columns), std::vector<T>()); };
  parallel_for(0, batch * blocks, grain, make_state, [&](auto& state, int64_t begin, int64_t end) {
    auto& [pattern, sums, scratch] = state;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, block = i % blocks;
      for (int64_t row = block * kRows; row < std::min(m, (block + 1) * kRows); ++row) {
        const int64_t offset = (sample * m + row) * columns;
        pattern.set(xs + offset);
        differentiate_row(pattern, ys + sample * row_size, rows.row(sample, row, scratch), row_size, beta, sums,
                          gy + (block * batch + sample) * row_size);
        sums.sum_to(gx + offset);
      }
    }
  });
  const at::Tensor summed_grad_y = (blocks == 1 ? grad_y[0] : grad_y.sum(0)).view(y.sizes());
  return {at::empty_like(x).copy_(grad_x), at::empty_like(y).copy_(summed_grad_y)};
}

at::Tensor rbf_correlation_cpu(const at::Tensor& x, const at::Tensor& y, double beta) {
  check_columns(x, "x", y, "y");
  check_beta(beta);
  return compute_dtype(x, y) == at::kDouble ? correlate<double>(x, y, beta) : correlate<float>(x, y, beta);
}

std::tuple<at::Tensor, at::Tensor> rbf_correlation_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y,
                                                                double beta) {
  check_columns(x, "x", y, "y");
  check_beta(beta);
  check_floating(grad, "grad");
  check_shape(grad, "grad", {x.size(0), x.size(1), y.size(1), x.size(2)});
  return compute_dtype(x, y) == at::kDouble ? differentiate<double>(grad, x, y, beta) : differentiate<float>(grad, x, y, beta);
}

}  // namespace
}  // namespace kdkernels::rbf_correlation

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("rbf_correlation", kdkernels::rbf_correlation::rbf_correlation_cpu);
  m.impl("rbf_correlation_backward", kdkernels::rbf_correlation::rbf_correlation_backward_cpu);
  m.impl("rbf_correlation_loss", kdkernels::rbf_correlation::rbf_correlation_loss_cpu);
  m.impl("rbf_correlation_loss_backward", kdkernels::rbf_correlation::rbf_correlation_loss_backward_cpu);
  m.impl("rbf_correlation_loss_rescale_", kdkernels::rbf_correlation::rbf_correlation_loss_rescale_cpu);
}
