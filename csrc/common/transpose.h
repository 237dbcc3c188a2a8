// Transpositions and sums across lanes of several vectors at once. The sums of as many vectors as a
// vector has lanes take a third of the instructions of one sum after the other.
#pragma once

#include <utility>

#include "simd.h"

namespace kdkernels::simd {

// One step of a transposition: swaps the lanes of a whose index has the bit `Step` set with the
// lanes of b whose index does not.
template <typename T, int Step, size_t... I>
KDKERNELS_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<I...>) {
  constexpr int lanes = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, (int(I) & Step ? lanes + int(I) - Step : int(I))...);
  const Vec<T> high = __builtin_shufflevector(a, b, (int(I) & Step ? lanes + int(I) : int(I) + Step)...);
  a = low;
  b = high;
}

// For J vectors, each with J groups of lanes: swaps group i of v[j] with group j of v[i].
template <typename T, int J, int Bit = 1>
KDKERNELS_INLINE void transpose_groups(Vec<T>* v) {
  if constexpr (Bit < J) {
#pragma GCC unroll 16
    for (int i = 0; i < J; ++i)
      if (!(i & Bit)) exchange<T, kLanes<T> / J * Bit>(v[i], v[i | Bit], std::make_index_sequence<kLanes<T>>{});
    transpose_groups<T, J, 2 * Bit>(v);
  }
}

// Transposes the square matrix whose rows are kLanes vectors.
template <typename T>
KDKERNELS_INLINE void transpose(Vec<T>* v) {
  transpose_groups<T, kLanes<T>>(v);
}

// For 2 Step vectors with groups of 2 Step lanes: lane i of a group of v[0] becomes the sum over that
// group of v[i].
template <typename T, int Step>
KDKERNELS_INLINE void fold(Vec<T>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < Step; ++i) {
    exchange<T, Step>(v[i], v[i + Step], std::make_index_sequence<kLanes<T>>{});
    v[i] += v[i + Step];
  }
  if constexpr (Step > 1) fold<T, Step / 2>(v);
}

// For kLanes vectors, each with J groups of lanes: lane i of v[j] becomes the sum over group j of
// v[i].
template <typename T, int J>
KDKERNELS_INLINE void sum_groups(Vec<T>* v) {
  constexpr int width = kLanes<T> / J;
  if constexpr (width > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < J; ++i) {
      fold<T, width / 2>(v + i * width);
      v[i] = v[i * width];
    }
  }
  transpose_groups<T, J>(v);
}

// out[i] = the sum over the lanes of v[i], for N vectors. `out` is written in whole vectors.
template <typename T, int N>
KDKERNELS_INLINE void sums(const Vec<T>* v, T* out) {
#pragma GCC unroll 4
  for (int first = 0; first < N; first += kLanes<T>) {
    Vec<T> group[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) group[i] = first + i < N ? v[first + i] : Vec<T>{};
    fold<T, kLanes<T> / 2>(group);
    store<T>(out + first, group[0]);
  }
}

}  // namespace kdkernels::simd
