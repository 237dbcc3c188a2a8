// Sums and maxima over the channels of one sample.
//
// If positions are adjacent, a vector holds neighbouring positions, and channels are added to it.
// If channels are adjacent, a vector holds neighbouring channels, and its lanes are summed at the
// end. If the last vector of a row would be partial, it starts earlier and overlaps the vector
// before it; both compute the same values for the positions that they share.
//
// Channels are summed in blocks, and then the sums of the blocks are summed: the maps of many
// channels differ only slightly from one another, and a sum of 2000 terms in sequence would lose
// the digits in which they differ.
#pragma once

#include "../common/convert.h"
#include "../common/memory.h"
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

// Sums over the channels, for V vectors at once, in three levels: sums of 16 channels, sums of 16
// such blocks, and the total.
template <int V, typename T>
struct Blocks {
  static constexpr int64_t size = 16;
  Vec<T> part[V] = {}, blocks[V] = {}, total[V] = {};

  // Calls add(c, part) for channels [0, channels).
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

// The number of leading rows of `positions` numbers that can be read as whole vectors without
// reading past the end of the sample.
template <typename T>
int64_t rows_of_whole_vectors(int64_t channels, int64_t stride, int64_t positions) {
  const int64_t last_start = (channels - 1) * stride + positions - simd::kLanes<T>;
  return last_start < 0 || stride == 0 ? 0 : std::min(channels, last_start / stride + 1);
}

// Sums the channels at V vectors of positions. The vectors start at multiples of the vector width,
// except the last one, which starts at `last`.
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

// Adds R channels to out at positions [0, whole), where `whole` is a multiple of the vector width.
// With `first`, the sum is stored instead of added.
template <int R, typename T, typename Storage, typename Power>
void add_rows(const Storage* x, int64_t stride, int64_t whole, bool first, const Power& power, T* out) {
  for (int64_t s = 0; s < whole; s += simd::kLanes<T>) {
    Vec<T> total = first ? Vec<T>{} : simd::load(out + s), part = power.value(load<T>(x + s));
    for (int r = 1; r < R; ++r) part += power.value(load<T>(x + r * stride + s));
    simd::store(out + s, total + part);
  }
}

// Sums the channels if positions are adjacent. The order of summation is chosen from the number of
// positions of the whole map, so that computing a part of the map gives the same bits.
template <typename T, typename Storage, typename Power>
void sum_positions_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t positions, int64_t map_positions,
                            const Power& power, T* out) {
  constexpr int64_t lanes = simd::kLanes<T>, max_vectors = 8, rows = 8;
  if (positions < lanes) {  // vectors may reach into the next channels, but not past the end of the features
    const int64_t whole = rows_of_whole_vectors<T>(channels, stride, positions);
    Blocks<1, T> sums;
    sums.sum(whole, [&](int64_t c, Vec<T>* part) { *part += power.value(load<T>(x + c * stride)); });
    Vec<T> total = *sums.total;
    for (int64_t c = whole; c < channels; ++c) total += power.value(load_some<T>(x + c * stride, positions));
    std::memcpy(out, &total, positions * sizeof(T));
    return;
  }
  const int64_t vectors = (positions + lanes - 1) / lanes;
  if (map_positions <= max_vectors * lanes)
    return sum_few_columns<max_vectors>(static_cast<int>(vectors), x, channels, stride, positions - lanes, power, out);
  // Many positions: read whole rows one after the other, which suits the memory system best, and
  // several rows at a time, so that `out` is read and written less often.
  constexpr int64_t block = 8 * rows;
  const int64_t whole = positions / lanes * lanes;
  const WorkArray<T> part(channels > block ? whole : 0);
  for (int64_t first = 0; first < channels; first += block) {
    const int64_t last = std::min(channels, first + block);
    T* to = first == 0 ? out : part.get();
    int64_t c = first;
    for (; c + rows <= last; c += rows) add_rows<rows>(x + c * stride, stride, whole, c == first, power, to);
    for (; c < last; ++c) add_rows<1>(x + c * stride, stride, whole, c == first, power, to);
    if (first == 0) continue;
    for (int64_t s = 0; s < whole; s += lanes) simd::store(out + s, simd::load<T>(out + s) + simd::load<T>(to + s));
  }
  if (whole < positions) sum_columns<1>(x + positions - lanes, channels, stride, 0, power, out + positions - lanes);
}

// Loads `count` numbers that are `stride` apart.
template <typename T, typename Storage>
KDKERNELS_INLINE Vec<T> gather(const Storage* p, int64_t stride, int64_t count) {
  T numbers[simd::kLanes<T>] = {};
  if (count == simd::kLanes<T>)
    for (int64_t i = 0; i < simd::kLanes<T>; ++i) numbers[i] = static_cast<T>(p[i * stride]);
  else
    for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<T>(p[i * stride]);
  return simd::load<T>(numbers);
}

// The same sum for fewer channels than a vector has lanes: a vector holds neighbouring positions.
template <typename T, typename Storage, typename Power>
void sum_few_channels_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t positions, const Power& power, T* out) {
  constexpr int64_t lanes = simd::kLanes<T>;
  for (int64_t s = 0; s < positions; s += lanes, x += lanes * stride) {
    const int64_t count = std::min(lanes, positions - s);
    Vec<T> total{};
    for (int64_t c = 0; c < channels; ++c) total += power.value(gather<T>(x + c, stride, count));
    std::memcpy(out + s, &total, count * sizeof(T));
  }
}

// The sum over the channels of one position. The numbers 4 KiB further on are prefetched, because the
// processor's own prefetching stops at the end of a page. They may lie past the end of the features.
template <typename T, typename Storage, typename Power>
KDKERNELS_INLINE T sum_position(const Storage* x, int64_t channels, const Power& power) {
  constexpr int64_t lanes = simd::kLanes<T>, unroll = 4;
  Vec<T> total[unroll] = {};
  int64_t c = 0;
  for (; c + unroll * lanes <= channels; c += unroll * lanes)
    for (int u = 0; u < unroll; ++u) {
      __builtin_prefetch(x + c + u * lanes + 4096 / sizeof(Storage));
      total[u] += power.value(load<T>(x + c + u * lanes));
    }
  for (; c + lanes <= channels; c += lanes) total[0] += power.value(load<T>(x + c));
  if (c < channels) total[1] += power.value(load_some<T>(x + c, channels - c));
  return simd::sum<T>((total[0] + total[1]) + (total[2] + total[3]));
}

// Sums the channels if channels are adjacent. A vector holds channels of one position or, if there are
// fewer channels than lanes, neighbouring positions, unless these are even fewer.
template <typename T, typename Storage, typename Power>
void sum_channels_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t positions, const Power& power, T* out) {
  if (channels < simd::kLanes<T> && positions >= channels) return sum_few_channels_adjacent<T>(x, channels, stride, positions, power, out);
  for (int64_t s = 0; s < positions; ++s) out[s] = sum_position<T>(x + s * stride, channels, power);
}

// The maximum so far and the channel that it came from. Of equal values the first one is kept. A
// NaN counts as larger than all numbers and is kept.
template <typename T>
struct Best {
  using Int = typename simd::IntOf<T>::type;
  Vec<T> value;
  Mask<T> channel;
  KDKERNELS_INLINE void update(Vec<T> size, Mask<T> source_channel) {
    const Mask<T> is_larger = (size > value) | ((size != size) & (value == value));
    value = is_larger ? size : value;
    channel = is_larger ? source_channel : channel;
  }
};

template <typename T, typename Storage>
void max_positions_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t positions, T* out, int32_t* channel) {
  constexpr int64_t lanes = simd::kLanes<T>;
  using Int = typename Best<T>::Int;
  for (int64_t s = 0; s < positions; s += lanes) {
    const int64_t valid_count = std::min(lanes, positions - s);
    auto channel_magnitude = [&](int64_t c) {
      const Storage* p = x + c * stride + s;
      return magnitude<T>(valid_count == lanes ? load<T>(p) : load_some<T>(p, valid_count));
    };
    Best<T> best{channel_magnitude(0), {}};
    for (int64_t c = 1; c < channels; ++c) best.update(channel_magnitude(c), Mask<T>{} + static_cast<Int>(c));
    for (int64_t l = 0; l < valid_count; ++l) out[s + l] = best.value[l], channel[s + l] = static_cast<int32_t>(best.channel[l]);
  }
}

template <typename T, typename Storage>
void max_channels_adjacent(const Storage* x, int64_t channels, int64_t stride, int64_t positions, T* out, int32_t* channel) {
  constexpr int64_t lanes = simd::kLanes<T>;
  using Int = typename Best<T>::Int;
  Mask<T> lane;
  for (int64_t l = 0; l < lanes; ++l) lane[l] = static_cast<Int>(l);
  for (int64_t s = 0; s < positions; ++s, x += stride) {
    Best<T> best{load_some<T>(x, 0) - T(1), lane};  // below every magnitude
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t valid_count = std::min(lanes, channels - c);
      Vec<T> size = magnitude<T>(valid_count == lanes ? load<T>(x + c) : load_some<T>(x + c, valid_count));
      size = lane < static_cast<Int>(valid_count) ? size : simd::splat<T>(T(-1));
      best.update(size, lane + static_cast<Int>(c));
    }
    T value = best.value[0];
    Int source_channel = best.channel[0];
    for (int64_t l = 1; l < lanes; ++l) {
      const T v = best.value[l];
      const bool is_larger = v > value || (v != v && value == value);
      const bool equal = v == value || (v != v && value != value);
      if (is_larger || (equal && best.channel[l] < source_channel)) value = v, source_channel = best.channel[l];
    }
    out[s] = value;
    channel[s] = static_cast<int32_t>(source_channel);
  }
}

// Computes the map of one sample in out [positions] and, for the maximum, the channel of each
// position.
template <typename T, typename Storage, typename Power>
void pool(const Features& f, const Storage* x, bool use_max, bool use_mean, const Power& power, T* out, int32_t* channel) {
  constexpr int64_t lanes = simd::kLanes<T>;
  if (use_max) {
    if (f.channels_adjacent)
      max_channels_adjacent<T>(x, f.channels, f.stride, f.positions, out, channel);
    else
      max_positions_adjacent<T>(x, f.channels, f.stride, f.positions, out, channel);
  } else if (f.channels_adjacent) {
    sum_channels_adjacent<T>(x, f.channels, f.stride, f.positions, power, out);
  } else {
    sum_positions_adjacent<T>(x, f.channels, f.stride, f.positions, f.map_positions, power, out);
  }
  if (!use_max && (!use_mean || f.channels == 1)) return;
  const T count = static_cast<T>(f.channels);
  auto finished = [&](Vec<T> v) { return use_max ? power.value(v) : v / count; };
  int64_t s = 0;
  for (; s + lanes <= f.positions; s += lanes) simd::store<T>(out + s, finished(simd::load<T>(out + s)));
  if (s == f.positions) return;
  const Vec<T> result = finished(load_some<T>(out + s, f.positions - s));
  std::memcpy(out + s, &result, (f.positions - s) * sizeof(T));
}

}  // namespace kdkernels::attention_pool
