// Reads features [B, C, *spatial] in place as samples x channels x spatial positions, in one of two
// layouts: the positions of a channel are adjacent in memory (NCHW and slices of it), or the
// channels of a position are adjacent (channels_last and slices of it). Features in any other
// layout are copied first.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

namespace kdkernels::attention_pool {

struct Features {
  at::Tensor x;
  int64_t batch, channels, positions;
  int64_t map_positions;  // positions of the whole sample, if this is only a part of it
  int64_t sample_stride;
  bool channels_adjacent;
  int64_t stride;  // from one channel to the next; if channels are adjacent, from one position to the next

  template <typename Storage>
  Storage* sample(int64_t b) const {
    return static_cast<Storage*>(address(x)) + b * sample_stride;
  }
};

// The stride between neighbouring positions if it is the same for all of them, otherwise -1.
// Dimensions of size 1 are ignored, because their stride has no meaning.
inline int64_t position_stride(const at::Tensor& x) {
  int64_t step = -1, expected_stride = -1;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) == 1) continue;
    if (expected_stride >= 0 && x.stride(d) != expected_stride) return -1;
    if (step < 0) step = x.stride(d);
    expected_stride = x.stride(d) * x.size(d);
  }
  return step < 0 ? 1 : step;
}

// Describes x in the requested layout, if its strides have that layout. A single channel, or a
// single position, counts as adjacent at any stride.
inline std::optional<Features> view_as(const at::Tensor& x, bool channels_adjacent) {
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  const int64_t channels = x.size(1), step = position_stride(x);
  const bool is_adjacent = channels_adjacent ? channels == 1 || x.stride(1) == 1 : positions == 1 || step == 1;
  if (!is_adjacent || step < 0) return std::nullopt;
  const int64_t stride = channels_adjacent ? (positions == 1 ? channels : step) : (channels == 1 ? positions : x.stride(1));
  return Features{x, x.size(0), channels, positions, positions, x.stride(0), channels_adjacent, stride};
}

// Describes x in place if it has one of the two layouts, otherwise a copy of it. If x has both
// layouts, vectors hold channels or positions, whichever are more numerous.
inline Features view(const at::Tensor& x) {
  // An empty batch may have any strides, and contiguous() does not change them.
  if (x.numel() == 0) return *view_as(at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous)), false);
  const auto channels_view = view_as(x, true), positions_view = view_as(x, false);
  if (channels_view && (!positions_view || channels_view->channels > channels_view->positions)) return *channels_view;
  return positions_view ? *positions_view : *view_as(x.contiguous(), false);
}

// An order of the dimensions of x in which view() reads it without a copy: the spatial dimensions in
// the order of their strides. Empty if the order of x itself has this property, or none has.
inline std::vector<int64_t> order_without_copy(const at::Tensor& x) {
  if (x.dim() <= 3 || x.numel() == 0 || view_as(x, true) || view_as(x, false)) return {};
  std::vector<int64_t> order(x.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin() + 2, order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  const at::Tensor permuted = x.permute(order);
  return view_as(permuted, true) || view_as(permuted, false) ? order : std::vector<int64_t>{};
}

inline std::vector<int64_t> inverse_order(const std::vector<int64_t>& order) {
  std::vector<int64_t> result(order.size());
  for (size_t d = 0; d < order.size(); ++d) result[order[d]] = static_cast<int64_t>(d);
  return result;
}

}  // namespace kdkernels::attention_pool
