// Sums and maxima over the channels of one sample.
//
// Where places are adjacent, a vector holds neighbouring places and channels are added to it; where channels are adjacent, a vector holds
// neighbouring channels and is summed in the end. The last vector of a row that does not fill one overlaps its neighbour: what they share
// they compute alike.
//
// Channels are summed in blocks, and the blocks' sums then: the maps of many channels differ by little, and a sum of 2000 terms in a row
// has lost digits of what they differ by.
#pragma once

#include <memory>

#include "../common/convert.h"
#include "layout.h"
#include "power.h"

namespace kdkernels::attention_pool {

template <typename T, typename Storage>
KDKERNELS_INLINE Vec<T> load(const Storage* p) {
  if constexpr (std::is_same_v<T, Storage>)
    return simd::load<T>(p);
  else
    return widen(p);
}

// The first `count` lanes; zeros in the others.
template <typename T, typename Storage>
KDKERNELS_INLINE Vec<T> load_some(const Storage* p, int64_t count) {
  Vec<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = static_cast<T>(p[i]);
  return v;
}

// Sums over channels of V vectors side by side: of 16 channels, of 16 such blocks, and of those.
template <int V, typename T>
struct Blocks {
  static constexpr int64_t size = 16;
  Vec<T> part[V] = {}, blocks[V] = {}, total[V] = {};

  // add(c, part) for channels [0, channels).
  template <typename Add>
  KDKERNELS_INLINE void sum(int64_t channels, Add&& add) {
    for (int64_t first = 0; first < channels; first += size) {
      for (int64_t c = first; c < std::min(channels, first + size); ++c) add(c, part);
      const bool last = (first / size + 1) % size == 0 || first + size >= channels;
      for (int v = 0; v < V; ++v) {
        blocks[v] += part[v];
        part[v] = Vec<T>{};
        if (last) total[v] += blocks[v], blocks[v] = Vec<T>{};
      }
    }
  }
};

// How many of the first rows of `places` numbers can be read as whole vectors without leaving the sample.
template <typename T>
int64_t rows_of_whole_vectors(int64_t channels, int64_t stride, int64_t places) {
  const int64_t room = (channels - 1) * stride + places - simd::kLanes<T>;
  return room < 0 || stride == 0 ? 0 : std::min(channels, room / stride + 1);
}

// Places [0, V * lanes) but for the last vector, which starts at `last`.
template <int V, typename T, typename Storage, typename Power>
void sum_columns(const Storage* x, int64_t channels, int64_t stride, int64_t last, const Power& power, T* out) {
  constexpr int lanes = simd::kLanes<T>;
  Blocks<V, T> sums;
  sums.sum(channels, [&](int64_t c, Vec<T>* part) {
    for (int v = 0; v < V; ++v) part[v] += power.value(load<T>(x + c * stride + (v == V - 1 ? last : v * lanes)));
  });
  for (int v = 0; v < V; ++v) simd::store(out + (v == V - 1 ? last : v * lanes), sums.total[v]);
}

template <int V, typename T, typename Storage, typename Power>
void sum_few_columns(int vectors, const Storage* x, int64_t channels, int64_t stride, int64_t last, const Power& power, T* out) {
  if (vectors == V) return sum_columns<V>(x, channels, stride, last, power, out);
  if constexpr (V > 1) sum_few_columns<V - 1>(vectors, x, channels, stride, last, power, out);
}

// Adds R channels to out at places [0, whole), whole a multiple of the lanes; the first ones are stored.
template <int R, typename T, typename Storage, typename Power>
void add_rows(const Storage* x, int64_t stride, int64_t whole, bool first, const Power& power, T* out) {
  for (int64_t s = 0; s < whole; s += simd::kLanes<T>) {
    Vec<T> total = first ? Vec<T>{} : simd::load(out + s), part = power.value(load<T>(x + s));
    for (int r = 1; r < R; ++r) part += power.value(load<T>(x + r * stride + s));
    simd::store(out + s, total + part);
  }
}

// The order of the sums depends on the number of places of the whole map, so that a part of it gives the same bits.
template <typename T, typename Storage, typename Power>
void sum_places_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t places, int64_t map_places, const Power& power,
                         T* out) {
  constexpr int64_t lanes = simd::kLanes<T>, most = 8, rows = 8;
  if (places < lanes) {  // what a vector holds of the next channels does no harm; the last ones end with the features
    const int64_t whole = rows_of_whole_vectors<T>(channels, stride, places);
    Blocks<1, T> sums;
    sums.sum(whole, [&](int64_t c, Vec<T>* part) { *part += power.value(load<T>(x + c * stride)); });
    Vec<T> total = *sums.total;
    for (int64_t c = whole; c < channels; ++c) total += power.value(load_some<T>(x + c * stride, places));
    std::memcpy(out, &total, places * sizeof(T));
    return;
  }
  const int64_t vectors = (places + lanes - 1) / lanes;
  if (map_places <= most * lanes) return sum_few_columns<most>(static_cast<int>(vectors), x, channels, stride, places - lanes, power, out);
  // Many places: whole rows one after the other, as memory is read best, a few at a time for the sake of `out`.
  constexpr int64_t block = 8 * rows;
  const int64_t whole = places / lanes * lanes;
  const std::unique_ptr<T[]> part(channels > block ? new T[whole] : nullptr);
  for (int64_t first = 0; first < channels; first += block) {
    const int64_t last = std::min(channels, first + block);
    T* to = first == 0 ? out : part.get();
    int64_t c = first;
    for (; c + rows <= last; c += rows) add_rows<rows>(x + c * stride, stride, whole, c == first, power, to);
    for (; c < last; ++c) add_rows<1>(x + c * stride, stride, whole, c == first, power, to);
    if (first == 0) continue;
    for (int64_t s = 0; s < whole; s += lanes) simd::store(out + s, simd::load<T>(out + s) + simd::load<T>(to + s));
  }
  if (whole < places) sum_columns<1>(x + places - lanes, channels, stride, 0, power, out + places - lanes);
}

template <typename T, typename Storage, typename Power>
void sum_channels_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t places, const Power& power, T* out) {
  constexpr int64_t lanes = simd::kLanes<T>, unroll = 4;
  for (int64_t s = 0; s < places; ++s, x += stride) {
    Vec<T> total[unroll] = {};
    int64_t c = 0;
    for (; c + unroll * lanes <= channels; c += unroll * lanes)
      for (int u = 0; u < unroll; ++u) total[u] += power.value(load<T>(x + c + u * lanes));
    for (; c + lanes <= channels; c += lanes) total[0] += power.value(load<T>(x + c));
    if (c < channels) total[1] += power.value(load_some<T>(x + c, channels - c));
    out[s] = simd::sum<T>((total[0] + total[1]) + (total[2] + total[3]));
  }
}

// A maximum so far, and the channel that it came from; the first of equals stays. A NaN is larger than all and stays.
template <typename T>
struct Best {
  using Int = typename simd::IntOf<T>::type;
  Vec<T> value;
  Mask<T> channel;
  KDKERNELS_INLINE void offer(Vec<T> size, Mask<T> from) {
    const Mask<T> better = (size > value) | ((size != size) & (value == value));
    value = better ? size : value;
    channel = better ? from : channel;
  }
};

template <typename T, typename Storage>
void max_places_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t places, T* out, int32_t* channel) {
  constexpr int64_t lanes = simd::kLanes<T>;
  using Int = typename Best<T>::Int;
  for (int64_t s = 0; s < places; s += lanes) {
    const int64_t here = std::min(lanes, places - s);
    auto at = [&](int64_t c) {
      const Storage* p = x + c * stride + s;
      return magnitude<T>(here == lanes ? load<T>(p) : load_some<T>(p, here));
    };
    Best<T> best{at(0), {}};
    for (int64_t c = 1; c < channels; ++c) best.offer(at(c), Mask<T>{} + static_cast<Int>(c));
    for (int64_t l = 0; l < here; ++l) out[s + l] = best.value[l], channel[s + l] = static_cast<int32_t>(best.channel[l]);
  }
}

template <typename T, typename Storage>
void max_channels_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t places, T* out, int32_t* channel) {
  constexpr int64_t lanes = simd::kLanes<T>;
  using Int = typename Best<T>::Int;
  Mask<T> lane;
  for (int64_t l = 0; l < lanes; ++l) lane[l] = static_cast<Int>(l);
  for (int64_t s = 0; s < places; ++s, x += stride) {
    Best<T> best{load_some<T>(x, 0) - T(1), lane};  // below every magnitude
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t here = std::min(lanes, channels - c);
      Vec<T> size = magnitude<T>(here == lanes ? load<T>(x + c) : load_some<T>(x + c, here));
      size = lane < static_cast<Int>(here) ? size : simd::splat<T>(T(-1));
      best.offer(size, lane + static_cast<Int>(c));
    }
    T value = best.value[0];
    Int from = best.channel[0];
    for (int64_t l = 1; l < lanes; ++l) {
      const T v = best.value[l];
      const bool better = v > value || (v != v && value == value);
      const bool equal = v == value || (v != v && value != value);
      if (better || (equal && best.channel[l] < from)) value = v, from = best.channel[l];
    }
    out[s] = value;
    channel[s] = static_cast<int32_t>(from);
  }
}

// The map of one sample: out [places], and for a maximum the channel of each.
template <typename T, typename Storage, typename Power>
void pool(const Features& f, const Storage* x, bool maximum, bool mean, const Power& power, T* out, int32_t* channel) {
  constexpr int64_t lanes = simd::kLanes<T>;
  if (maximum) {
    if (f.channels_adjacent)
      max_channels_adjacent<T>(x, f.channels, f.stride, f.places, out, channel);
    else
      max_places_adjacent<T>(x, f.channels, f.stride, f.places, out, channel);
  } else if (f.channels_adjacent) {
    sum_channels_adjacent<T>(x, f.channels, f.stride, f.places, power, out);
  } else {
    sum_places_adjacent<T>(x, f.channels, f.stride, f.places, f.map_places, power, out);
  }
  if (!maximum && !mean) return;
  const T count = static_cast<T>(f.channels);
  for (int64_t s = 0; s < f.places; s += lanes) {
    const int64_t here = std::min(lanes, f.places - s);
    const Vec<T> v = load_some<T>(out + s, here), result = maximum ? power.value(v) : v / count;
    std::memcpy(out + s, &result, here * sizeof(T));
  }
}

}  // namespace kdkernels::attention_pool
