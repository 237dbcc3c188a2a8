// From the gradient of a map back to the features: dL/dx = weight(place) |x|^(p-1) sign(x), where weight is dL/dmap times p, and for a mean
// over the number of channels.
#pragma once

#include "pool.h"

namespace kdkernels::attention_pool {

template <typename T, bool streamed, typename Storage>
KDKERNELS_INLINE void put(Storage* p, Vec<T> v) {
  if constexpr (!std::is_same_v<T, Storage>)
    narrow(v, p);
  else if constexpr (streamed)
    simd::stream<T>(p, v);
  else
    simd::store<T>(p, v);
}

template <typename T, typename Storage>
KDKERNELS_INLINE void put_some(Storage* p, Vec<T> v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<Storage>(v[i]);
}

// out[i] = slope(x[i]) * weight(i) for i in [0, count).
template <typename T, bool streamed, typename Storage, typename Power, typename Weight>
KDKERNELS_INLINE void scale_row(const Storage* x, int64_t count, const Power& power, const Weight& weight, Storage* out) {
  constexpr int64_t lanes = simd::kLanes<T>;
  if (count < lanes) return put_some<T>(out, power.slope(load_some<T>(x, count)) * weight(0, count), count);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) put<T, streamed>(out + i, power.slope(load<T>(x + i)) * weight(i, lanes));
  if (i < count) put<T, false>(out + count - lanes, power.slope(load<T>(x + count - lanes)) * weight(count - lanes, lanes));
}

template <typename T, bool streamed, typename Storage, typename Power>
void scatter_sum(const Features& f, const Storage* x, const Features& g, const Power& power, const T* weight, Storage* out) {
  if (f.channels_adjacent) {
    for (int64_t s = 0; s < f.places; ++s) {
      const Vec<T> w = simd::splat<T>(weight[s]);
      scale_row<T, streamed>(x + s * f.stride, f.channels, power, [&](int64_t, int64_t) { return w; }, out + s * g.stride);
    }
  } else if (f.places < simd::kLanes<T> && g.stride == g.places) {
    // Whole vectors from the first channel to the last: what one writes past its row the next one writes anew.
    const int64_t whole =
        std::min(rows_of_whole_vectors<T>(f.channels, f.stride, f.places), rows_of_whole_vectors<T>(g.channels, g.stride, g.places));
    const Vec<T> w = load_some<T>(weight, f.places);
    for (int64_t c = 0; c < whole; ++c) put<T, false>(out + c * g.stride, power.slope(load<T>(x + c * f.stride)) * w);
    for (int64_t c = whole; c < f.channels; ++c)
      put_some<T>(out + c * g.stride, power.slope(load_some<T>(x + c * f.stride, f.places)) * w, f.places);
  } else {
    auto at = [&](int64_t s, int64_t count) {
      return count == simd::kLanes<T> ? simd::load<T>(weight + s) : load_some<T>(weight + s, count);
    };
    for (int64_t c = 0; c < f.channels; ++c) scale_row<T, streamed>(x + c * f.stride, f.places, power, at, out + c * g.stride);
  }
}

template <typename T, typename Storage, typename Power>
void scatter_max(const Features& f, const Storage* x, const Features& g, const Power& power, const T* weight, const int32_t* channel,
                 Storage* out) {
  const int64_t step = f.channels_adjacent ? 1 : f.stride, place = f.channels_adjacent ? f.stride : 1;
  const int64_t out_step = g.channels_adjacent ? 1 : g.stride, out_place = g.channels_adjacent ? g.stride : 1;
  const int64_t rows = g.channels_adjacent ? g.places : g.channels, row = g.channels_adjacent ? g.channels : g.places;
  for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * g.stride, row, Storage(0));
  for (int64_t s = 0; s < f.places; ++s) {
    const Vec<T> v = simd::splat<T>(static_cast<T>(x[channel[s] * step + s * place]));
    out[channel[s] * out_step + s * out_place] = static_cast<Storage>(power.slope(v)[0] * weight[s]);
  }
}

// The gradient of one sample, written to `out` in the layout of g. Streamed writes need rows that start and end on vector boundaries.
template <typename T, typename Storage, typename Power>
void scatter(const Features& f, const Storage* x, const Features& g, bool maximum, bool streamed, const Power& power, const T* weight,
             const int32_t* channel, Storage* out) {
  if (maximum) return scatter_max<T>(f, x, g, power, weight, channel, out);
  if (streamed) return scatter_sum<T, true>(f, x, g, power, weight, out);
  scatter_sum<T, false>(f, x, g, power, weight, out);
}

}  // namespace kdkernels::attention_pool
