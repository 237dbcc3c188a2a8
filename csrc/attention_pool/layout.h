// A tensor of features [B, C, *spatial] as samples x channels x places, read where it lies: either the places of a channel are adjacent
// (NCHW, and slices of it), or the channels of a place are (channels_last, and slices of it). Anything else is copied first.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

namespace kdkernels::attention_pool {

struct Features {
  at::Tensor x;
  int64_t batch, channels, places;
  int64_t sample_stride;
  bool channels_adjacent;
  int64_t stride;  // from one channel to the next, or, where channels are adjacent, from one place to the next

  template <typename Storage>
  Storage* sample(int64_t b) const {
    return static_cast<Storage*>(x.data_ptr()) + b * sample_stride;
  }
};

// The step between neighbouring places if all of them lie at one step, else -1.
inline int64_t place_stride(const at::Tensor& x) {
  int64_t step = -1, next = -1;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) == 1) continue;
    if (next >= 0 && x.stride(d) != next) return -1;
    if (step < 0) step = x.stride(d);
    next = x.stride(d) * x.size(d);
  }
  return step < 0 ? 1 : step;
}

inline Features view(const at::Tensor& x) {
  int64_t places = 1;
  for (int64_t d = 2; d < x.dim(); ++d) places *= x.size(d);
  const int64_t step = place_stride(x), channel = x.stride(1);
  const bool single_place = places == 1, single_channel = x.size(1) == 1;
  if ((channel == 1 || single_channel) && step >= 0 && (single_place || step != 1) && !(single_channel && step == 1))
    return {x, x.size(0), x.size(1), places, x.stride(0), true, single_place ? x.size(1) : step};
  if (step == 1) return {x, x.size(0), x.size(1), places, x.stride(0), false, channel};
  const at::Tensor copy = x.contiguous();
  return {copy, x.size(0), x.size(1), places, copy.stride(0), false, copy.stride(1)};
}

}  // namespace kdkernels::attention_pool
