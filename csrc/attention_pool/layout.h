// A tensor of features [B, C, *spatial] as samples x channels x places, read where it lies: either the places of a channel are adjacent
// (NCHW, and slices of it), or the channels of a place are (channels_last, and slices of it). Anything else is copied first.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

namespace kdkernels::attention_pool {

struct Features {
  at::Tensor x;
  int64_t batch, channels, places;
  int64_t map_places;  // of the whole sample, where this is a part of it
  int64_t sample_stride;
  bool channels_adjacent;
  int64_t stride;  // from one channel to the next, or, where channels are adjacent, from one place to the next

  template <typename Storage>
  Storage* sample(int64_t b) const {
    return static_cast<Storage*>(address(x)) + b * sample_stride;
  }
};

// The step between neighbouring places if all of them lie at one step, else -1. The stride of an extent of 1 says nothing.
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

// x in one of the two layouts, if its strides are of it. One channel, or one place, is adjacent to its neighbours at any stride.
inline std::optional<Features> view_as(const at::Tensor& x, bool channels_adjacent) {
  int64_t places = 1;
  for (int64_t d = 2; d < x.dim(); ++d) places *= x.size(d);
  const int64_t channels = x.size(1), step = place_stride(x);
  const bool adjacent = channels_adjacent ? channels == 1 || x.stride(1) == 1 : places == 1 || step == 1;
  if (!adjacent || step < 0) return std::nullopt;
  const int64_t stride = channels_adjacent ? (places == 1 ? channels : step) : (channels == 1 ? places : x.stride(1));
  return Features{x, x.size(0), channels, places, places, x.stride(0), channels_adjacent, stride};
}

// x where it lies if it can be read there, else a copy. Of features that are in both layouts vectors hold what there is more of.
inline Features view(const at::Tensor& x) {
  // An empty batch may have any strides, and contiguous() leaves it as it is.
  if (x.numel() == 0) return *view_as(at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous)), false);
  const auto by_channel = view_as(x, true), by_place = view_as(x, false);
  if (by_channel && (!by_place || by_channel->channels > by_channel->places)) return *by_channel;
  return by_place ? *by_place : *view_as(x.contiguous(), false);
}

}  // namespace kdkernels::attention_pool
