// Memory layout of strided logits. All dimensions except the dimension of the classes are rows,
// numbered in logical (row-major) order.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

namespace kdkernels::temperature_kl {

enum Operand { kStudent, kTeacher, kStudentGrad, kTeacherGrad, kOperands };

// Whether the classes of a row are adjacent in memory.
inline bool classes_adjacent(const at::Tensor& x, int64_t dim) {
  return x.size(dim) == 1 || x.stride(dim) == 1;
}

// The innermost row dimension of size greater than 1; -1 if there is only one row.
inline int64_t innermost_row_dim(const at::Tensor& x, int64_t dim) {
  for (int64_t d = x.dim() - 1; d >= 0; --d)
    if (d != dim && x.size(d) > 1) return d;
  return -1;
}

// Whether neighbouring rows are adjacent in memory, in runs long enough to fill vectors.
inline bool rows_adjacent(const at::Tensor& x, int64_t dim) {
  const int64_t inner = innermost_row_dim(x, dim);
  if (inner < 0 || x.stride(inner) != 1) return false;
  int64_t run = x.size(inner);
  for (int64_t d = inner - 1; d >= 0 && d != dim && x.stride(d) == run; --d) run *= x.size(d);
  return run >= 8;
}

inline at::Tensor with_classes_adjacent(const at::Tensor& x, int64_t dim) {
  return classes_adjacent(x, dim) ? x : x.movedim(dim, -1).contiguous().movedim(-1, dim);
}

inline at::Tensor with_rows_adjacent(const at::Tensor& x, int64_t dim) {
  return x.stride(innermost_row_dim(x, dim)) == 1 ? x : x.movedim(dim, 0).contiguous().movedim(0, dim);
}

// The row dimensions of the operands. Consecutive dimensions are merged if the strides of all
// operands allow it.
class Rows {
 public:
  Rows(const std::array<at::Tensor, kOperands>& x, int64_t dim) {
    for (int64_t d = 0; d < x[kStudent].dim(); ++d) {
      const int64_t size = x[kStudent].size(d);
      if (d == dim || size == 1) continue;
      Axis axis{size, {}};
      for (int k = 0; k < kOperands; ++k) axis.strides[k] = x[k].defined() ? x[k].stride(d) : 0;
      bool merges = !axes_.empty();
      for (int k = 0; merges && k < kOperands; ++k) merges = axes_.back().strides[k] == axis.strides[k] * size;
      if (merges) {
        axes_.back().size *= size;
        axes_.back().strides = axis.strides;
      } else {
        axes_.push_back(axis);
      }
    }
  }

  // The length of the innermost merged run of rows.
  int64_t run() const { return axes_.empty() ? 1 : axes_.back().size; }

  // The distance between neighbouring rows of a run, in elements of operand k.
  int64_t step(int k) const { return axes_.empty() ? 1 : axes_.back().strides[k]; }

  // The offset of a row in each operand, in elements.
  std::array<int64_t, kOperands> offsets(int64_t row) const {
    std::array<int64_t, kOperands> result{};
    for (auto axis = axes_.rbegin(); axis != axes_.rend(); ++axis) {
      const bool outermost = axis + 1 == axes_.rend();
      const int64_t i = outermost ? row : row % axis->size;
      if (!outermost) row /= axis->size;
      for (int k = 0; k < kOperands; ++k) result[k] += i * axis->strides[k];
    }
    return result;
  }

 private:
  struct Axis {
    int64_t size;
    std::array<int64_t, kOperands> strides;
  };
  std::vector<Axis> axes_;
};

}  // namespace kdkernels::temperature_kl
