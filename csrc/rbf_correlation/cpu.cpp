// CPU kernels of the rbf_correlation and rbf_correlation_loss ops. Compiled once per instruction set.
#include "rbf_correlation.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "../common/memory.h"
#include "dense.h"
#include "pairs.h"
#include "rank.h"
#include "terms.h"

namespace kdkernels::rbf_correlation {
namespace {

enum { kStudentX, kStudentY, kTeacherX, kTeacherY };
using Inputs = std::array<at::Tensor, 4>;

// A column [n] of sample b of x [B, n, K], to doubles and back.
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
  Doubles low = simd::splat<double>(inf), high = simd::splat<double>(-inf), off{};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Doubles v = load<double>(to + i);
    low = select<double>(v < low, v, low);
    high = simd::max(v, high);
    off += v - v;  // NaN once there is a number that is not finite
  }
  Range range{-simd::largest<double>(-low), simd::largest<double>(high)};
  double rest = simd::sum<double>(off);
  for (; i < n; ++i) {
    range = join(range, {to[i], to[i]});
    rest += to[i] - to[i];
  }
  return {range.low + rest, range.high + rest};
}

// The loss of each column, and the gradients that are wanted, times a factor; these in the type of the loss, for what is small in float may
// be nothing in half precision before it meets the upstream gradient.
class Loss {
 public:
  Loss(const Inputs& inputs, double beta, double factor, std::array<bool, 4> wanted)
      : inputs_(inputs),
        m_(inputs[kStudentX].size(1)),
        n_(inputs[kStudentY].size(1)),
        columns_(inputs[kStudentX].size(2)),
        scale_(std::sqrt(2 / beta)),
        slope_(2 * scale_ * factor),
        dtype_(compute_dtype(inputs[0], inputs[1], inputs[2], inputs[3])),
        losses_(inputs[kStudentX].size(0) * columns_) {
    for (int i = 0; i < 4; ++i)
      if (wanted[i]) gradients_[i] = at::empty_like(inputs[i], inputs[i].options().dtype(dtype_));
  }

  void run() {
    const int64_t columns = static_cast<int64_t>(losses_.size());
    std::vector<char> by_pairs(columns);
    at::parallel_for(0, columns, std::max<int64_t>(1, (int64_t(1) << 14) / (m_ + n_ + 1)), [&](int64_t begin, int64_t end) {
      Column column(m_, n_);
      Terms terms(m_, n_);
      for (int64_t c = begin; c < end; ++c) by_pairs[c] = !by_terms(c, column, terms);
    });
    std::vector<int64_t> left;
    for (int64_t c = 0; c < columns; ++c)
      if (by_pairs[c]) left.push_back(c);
    // Whole columns to a thread, or where they are few, rows of each.
    if (static_cast<int64_t>(left.size()) >= 4 * at::get_num_threads() || m_ * n_ < (1 << 14)) {
      const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 13) / (m_ * n_ + 1));
      at::parallel_for(0, static_cast<int64_t>(left.size()), grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sum_pairs(left[i]);
      });
    } else {
      for (int64_t c : left) sum_pairs(c);
    }
  }

  double of_sample(int64_t b) const {
    double total = 0;
    for (int64_t k = 0; k < columns_; ++k) total += losses_[b * columns_ + k];
    return total;
  }
  at::Tensor gradient(int i) const { return gradients_[i].defined() ? gradients_[i] : at::empty({0}, inputs_[i].options().dtype(dtype_)); }

 private:
  // The four vectors of a column, and where they lie.
  struct Column {
    std::unique_ptr<double[]> values[4], gradient;
    Column(int64_t m, int64_t n) : gradient(new double[padded(std::max(m, n))]) {
      for (int i = 0; i < 4; ++i) values[i].reset(new double[i % 2 == 0 ? m : n]);
    }
  };
  struct Terms {
    Side x, y;
    Products of_x, of_y;
    Terms(int64_t m, int64_t n) : x(m), y(n) {}
  };

  Centered load(int64_t c, const Column& column) const {
    Range range[4];
    for (int i = 0; i < 4; ++i) range[i] = read(inputs_[i], c / columns_, c % columns_, column.values[i].get());
    return Centered(join(range[kStudentX], range[kTeacherX]), join(range[kStudentY], range[kTeacherY]));
  }

  bool wants(int i) const { return gradients_[i].defined(); }

  // Whether that is done: not where terms are dear.
  bool by_terms(int64_t c, Column& column, Terms& terms) {
    const Centered at = load(c, column);
    if (std::isnan(at.a + at.b)) return finish_with_nan(c, column);
    const bool is_double = dtype_ == at::kDouble;
    const int rank = rank_for(scale_ * scale_ * at.a * at.b, accuracy(is_double));
    if (!terms_are_cheaper(rank, m_, n_)) return false;
    terms.x.set(column.values[kStudentX].get(), column.values[kTeacherX].get(), at.center, at.a, scale_, rank, is_double);
    terms.y.set(column.values[kStudentY].get(), column.values[kTeacherY].get(), at.center, at.b, scale_, rank, is_double);
    terms.x.multiply(terms.of_x);
    terms.y.multiply(terms.of_y);
    losses_[c] = square_sum(terms.of_x, terms.of_y);
    for (int i = 0; i < 4; ++i) {
      if (!wants(i)) continue;
      const bool of_x = i % 2 == 0, student = i < 2;
      (of_x ? terms.x : terms.y).differentiate(of_x ? terms.of_y : terms.of_x, student, student ? slope_ : -slope_, column.gradient.get());
      write(column.gradient.get(), 1.0, i, c);
    }
    return true;
  }

  bool finish_with_nan(int64_t c, Column& column) {
    losses_[c] = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(column.gradient.get(), std::max(m_, n_), losses_[c]);
    for (int i = 0; i < 4; ++i)
      if (wants(i)) write(column.gradient.get(), 1.0, i, c);
    return true;
  }

  void sum_pairs(int64_t c) {
    const Column column(m_, n_);
    const Centered at = load(c, column);
    const Pair x(column.values[kStudentX].get(), column.values[kTeacherX].get(), m_, at.center, scale_);
    const Pair y(column.values[kStudentY].get(), column.values[kTeacherY].get(), n_, at.center, scale_);
    const int64_t blocks = (m_ + kRows - 1) / kRows, width = padded(n_);
    const std::unique_ptr<double[]> to_x(new double[2 * m_]), to_y(new double[2 * blocks * width]());
    std::vector<double> losses(blocks);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kRows;
        Gradients of_x, of_y;
        for (int net = 0; net < 2; ++net) {
          of_x.of[net] = wants(2 * net) ? &to_x[net * m_ + first] : nullptr;
          of_y.of[net] = wants(2 * net + 1) ? &to_y[(net * blocks + block) * width] : nullptr;
        }
        losses[block] = row_block(x, y, first, std::min(kRows, m_ - first), n_, of_x, of_y);
      }
    });
    losses_[c] = 0;
    for (double loss : losses) losses_[c] += loss;
    for (int net = 0; net < 2; ++net) {
      if (wants(2 * net)) write(&to_x[net * m_], slope_, 2 * net, c);
      if (!wants(2 * net + 1)) continue;
      double* sum = &to_y[net * blocks * width];
      for (int64_t block = 1; block < blocks; ++block)
        for (int64_t i = 0; i < n_; ++i) sum[i] += sum[block * width + i];
      write(sum, slope_, 2 * net + 1, c);
    }
  }

  // The gradient of column c of an input.
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
  double scale_, slope_;
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
      const double own = loss.of_sample(b);
      if (reduction == Reduction::none) out[b] = static_cast<scalar_t>(own);
      total += own;
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
  const Reduction reduced = parse_reduction(reduction);
  Loss loss({sx, sy, tx, ty}, beta, reduced == Reduction::batchmean ? 1 / std::max(1.0, static_cast<double>(sx.size(0))) : 1, wanted);
  loss.run();
  return {reduce(loss, sx, compute_dtype(sx, sy, tx, ty), reduced), loss.gradient(0), loss.gradient(1), loss.gradient(2), loss.gradient(3)};
}

// gradient [B, n, K] *= grad_loss, one number or one for each sample. A sample whose own is 0 gets 0, also where its gradient is not
// finite: it was left out.
void rbf_correlation_loss_rescale_cpu(at::Tensor& gradient, const at::Tensor& grad_loss) {
  check_floating(gradient, "gradient");
  check_floating(grad_loss, "grad_loss");
  TORCH_CHECK_VALUE(grad_loss.dim() == 0 || gradient.dim() == 3 && grad_loss.sizes() == at::IntArrayRef{gradient.size(0)},
                    "grad_loss must be one number or [B], got ", grad_loss.sizes());
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
  auto [loss, to_sx, to_sy, to_tx, to_ty] = rbf_correlation_loss_cpu(sx, sy, tx, ty, beta, reduction, wanted);
  check_floating(grad_loss, "grad_loss");
  check_shape(grad_loss, "grad_loss", loss.sizes());
  const at::Tensor* inputs[] = {&sx, &sy, &tx, &ty};
  at::Tensor* gradients[] = {&to_sx, &to_sy, &to_tx, &to_ty};
  for (int i = 0; i < 4; ++i) {
    if (wanted[i]) rbf_correlation_loss_rescale_cpu(*gradients[i], grad_loss);
    *gradients[i] = gradients[i]->to(inputs[i]->scalar_type());
  }
  return {to_sx, to_sy, to_tx, to_ty};
}

template <typename T>
at::Tensor correlate(const at::Tensor& x, const at::Tensor& y, double beta) {
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  const at::Tensor a = x.to(dtype).contiguous(), b = y.to(dtype).contiguous();
  const int64_t m = x.size(1), columns = x.size(2), numbers = y.size(1) * columns;
  const at::Tensor out = recycled_empty({x.size(0), m, y.size(1), columns}, dtype);
  if (out.numel() == 0) return out;
  const T *xs = a.const_data_ptr<T>(), *ys = b.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const bool stream =
      numbers % simd::kLanes<T> == 0 && reinterpret_cast<uintptr_t>(to) % simd::kBytes == 0 && out.nbytes() > (size_t(32) << 20);
  at::parallel_for(0, x.size(0) * m, std::max<int64_t>(1, (int64_t(1) << 14) / numbers), [&](int64_t begin, int64_t end) {
    Pattern<T> pattern(columns);
    for (int64_t row = begin; row < end; ++row) {
      pattern.set(xs + row * columns);
      correlate_row(pattern, ys + row / m * numbers, numbers, beta, stream, to + row * numbers);
    }
    simd::fence();
  });
  return out;
}

// Rows [N * K] of the upstream gradient where they lie; a row of other strides (one number, expanded) is copied first, on its own.
template <typename T>
class Rows {
 public:
  explicit Rows(const at::Tensor& grad)
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
  const int64_t batch = x.size(0), m = x.size(1), columns = x.size(2), numbers = y.size(1) * columns;
  const int64_t blocks = std::max<int64_t>(1, (m + kRows - 1) / kRows);
  const at::Tensor to_x = at::empty(x.sizes(), a.options()), to_y = at::zeros({blocks, batch, numbers}, a.options());
  if (grad.numel() == 0) return {at::zeros_like(x), at::zeros_like(y)};
  const T *xs = a.const_data_ptr<T>(), *ys = b.const_data_ptr<T>();
  T *gx = to_x.mutable_data_ptr<T>(), *gy = to_y.mutable_data_ptr<T>();
  const Rows<T> rows(upstream);
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 14) / (numbers * std::min(m, kRows)));
  at::parallel_for(0, batch * blocks, grain, [&](int64_t begin, int64_t end) {
    Pattern<T> pattern(columns), sums(columns);
    std::vector<T> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, block = i % blocks;
      for (int64_t row = block * kRows; row < std::min(m, (block + 1) * kRows); ++row) {
        const int64_t at = (sample * m + row) * columns;
        pattern.set(xs + at);
        differentiate_row(pattern, ys + sample * numbers, rows.row(sample, row, scratch), numbers, beta, sums,
                          gy + (block * batch + sample) * numbers);
        sums.sum_to(gx + at);
      }
    }
  });
  const at::Tensor whole = (blocks == 1 ? to_y[0] : to_y.sum(0)).view(y.sizes());
  return {at::empty_like(x).copy_(to_x), at::empty_like(y).copy_(whole)};
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
