// Computes the gradient of the features from the gradient of a map: dL/dx = weight(position)
// |x|^(p-1) sign(x), where weight is dL/dmap times p, divided by the number of channels if the map
// is a mean.
#pragma once

#include "pool.h"

namespace kdkernels::attention_pool {

template <typename T, bool streaming, typename Storage>
KDKERNELS_INLINE void store_vector(Storage* p, Vec<T> v) {
  if constexpr (!std::is_same_v<T, Storage>)
    narrow(v, p);
  else if constexpr (streaming)
    simd::stream<T>(p, v);
  else
    simd::store<T>(p, v);
}

// out[i] = scaled_derivative(x[i]) * weight(i) for i in [0, count).
template <typename T, bool streaming, typename Storage, typename Power, typename Weight>
KDKERNELS_INLINE void scale_row(const Storage* x, int64_t count, const Power& power, const Weight& weight, Storage* out) {
  constexpr int64_t lanes = simd::kLanes<T>;
  if (count < lanes) return store_some<T>(out, count, power.scaled_derivative(load_some<T>(x, count)) * weight(0, count));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_vector<T, streaming>(out + i, power.scaled_derivative(load<T>(x + i)) * weight(i, lanes));
  if (i < count)
    store_vector<T, false>(out + count - lanes, power.scaled_derivative(load<T>(x + count - lanes)) * weight(count - lanes, lanes));
}

template <typename T, bool streaming, typename Storage, typename Power>
void scatter_sum(const Features& f, const Storage* x, const Features& g, const Power& power, const T* weight, Storage* out) {
  constexpr int64_t lanes = simd::kLanes<T>;
  if (f.channels_adjacent && f.channels < lanes) {  // a vector holds neighbouring positions
    for (int64_t s = 0; s < f.positions; s += lanes) {
      const int64_t count = std::min(lanes, f.positions - s);
      const Vec<T> w = count == lanes ? simd::load<T>(weight + s) : load_some<T>(weight + s, count);
      for (int64_t c = 0; c < f.channels; ++c) {
        T numbers[lanes];
        simd::store<T>(numbers, power.scaled_derivative(gather<T>(x + s * f.stride + c, f.stride, count)) * w);
        for (int64_t i = 0; i < count; ++i) out[(s + i) * g.stride + c] = static_cast<Storage>(numbers[i]);
      }
    }
  } else if (f.channels_adjacent) {
    for (int64_t s = 0; s < f.positions; ++s) {
      const Vec<T> w = simd::splat<T>(weight[s]);
      scale_row<T, streaming>(x + s * f.stride, f.channels, power, [&](int64_t, int64_t) { return w; }, out + s * g.stride);
    }
  } else if (f.positions < simd::kLanes<T> && g.stride == g.positions) {
    // Write whole vectors from the first channel to the last: numbers that a vector writes past the
    // end of its row are overwritten by the next one.
    const int64_t whole =
        std::min(rows_of_whole_vectors<T>(f.channels, f.stride, f.positions), rows_of_whole_vectors<T>(g.channels, g.stride, g.positions));
    const Vec<T> w = load_some<T>(weight, f.positions);
    for (int64_t c = 0; c < whole; ++c) store_vector<T, false>(out + c * g.stride, power.scaled_derivative(load<T>(x + c * f.stride)) * w);
    for (int64_t c = whole; c < f.channels; ++c)
      store_some<T>(out + c * g.stride, f.positions, power.scaled_derivative(load_some<T>(x + c * f.stride, f.positions)) * w);
  } else {
    auto load_weight = [&](int64_t s, int64_t count) {
      return count == simd::kLanes<T> ? simd::load<T>(weight + s) : load_some<T>(weight + s, count);
    };
    for (int64_t c = 0; c < f.channels; ++c) scale_row<T, streaming>(x + c * f.stride, f.positions, power, load_weight, out + c * g.stride);
  }
}

template <typename T, typename Storage, typename Power>
void scatter_max(const Features& f, const Storage* x, const Features& g, const Power& power, const T* weight, const int32_t* channel,
                 Storage* out) {
  const int64_t channel_step = f.channels_adjacent ? 1 : f.stride, position_step = f.channels_adjacent ? f.stride : 1;
  const int64_t out_channel_step = g.channels_adjacent ? 1 : g.stride, out_position_step = g.channels_adjacent ? g.stride : 1;
  const int64_t rows = g.channels_adjacent ? g.positions : g.channels, row_size = g.channels_adjacent ? g.channels : g.positions;
  for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * g.stride, row_size, Storage(0));
  for (int64_t s = 0; s < f.positions; ++s) {
    const Vec<T> v = simd::splat<T>(static_cast<T>(x[channel[s] * channel_step + s * position_step]));
    out[channel[s] * out_channel_step + s * out_position_step] = static_cast<Storage>(power.scaled_derivative(v)[0] * weight[s]);
  }
}

// Writes the gradient of one sample to `out` in the layout of g. Streaming writes require rows that
// start and end at vector boundaries.
template <typename T, typename Storage, typename Power>
void scatter(const Features& f, const Storage* x, const Features& g, bool use_max, bool streaming, const Power& power, const T* weight,
             const int32_t* channel, Storage* out) {
  if (use_max) return scatter_max<T>(f, x, g, power, weight, channel, out);
  if (streaming) return scatter_sum<T, true>(f, x, g, power, weight, out);
  scatter_sum<T, false>(f, x, g, power, weight, out);
}

}  // namespace kdkernels::attention_pool
