// The kernel of temperature_kl for long rows on a GPU: the forward KL of each row and the gradient of
// the student's logits. It computes ordinary rows; see kdkernels/triton/temperature_kl_fast.py, which
// also says what is done with the others.
//
// A cluster of blocks processes a row. The row is read once: it stays in the shared memory of the
// cluster until its gradient is written. As each part of the gradient is written, the same part of
// the cluster's next row is requested, so that memory is read and written at the same time. A
// thread works on the vectors of 16 bytes that it has copied itself; barriers are only needed for
// the reductions.
//
// With e = 2^(t - i), t = teacher log2(e) / T and an integer i (the same for the row), z = sum of e,
// and f = 2^(s - j) with sum z' for the student:
//     y = log(p_s / p_t) = (student - teacher) / T - log(z' / z) - (j - i) log(2)
// up to the rounding errors of the two sums. The identities of divergence.h hold for every centre,
// so these errors do not affect the loss. In bfloat16 the gradient is computed in the same pass as the
// loss. There they add an error of about 1e-7 times the probability of a class, as in a difference of
// two softmaxes. In float32 the terms of that pass are written over the logits, and the gradient
// follows when their sums are known.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/cluster.h"
#include "convex.h"
#include "long_rows_plan.h"

#ifndef __CUDACC__
#include <cstring>
#endif

namespace kdkernels::temperature_kl::gpu {

// The logits of a class that is excluded (by -infinity) or not present. Its difference from all
// other logits is finite, or minus infinity, and its probability is 0.
constexpr float kExcluded = -3.0e38f;

// Rows with larger exponents log2(p_s / p_t), or with a larger offset between the networks, are
// left, see temperature_kl_fast.py.
// The GPU flushes e to 0 below 2^-126, so that a class of an ordinary row loses at most 2^-66.
constexpr float kSteep = 60, kFar = 90;

constexpr float kLargeDivergence = 0.25f;  // of a row, divided by T^2

// Sums are rescaled when an exponent exceeds their own by more than this; 2^(kSlack + 20) is far
// below the largest number.
constexpr float kSlack = 40;

constexpr float kNoExponent = -1e30f;  // of an empty sum
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct alignas(16) Bits {
  uint32_t word[4];
};

KDKERNELS_GPU float as_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}
KDKERNELS_GPU uint32_t as_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}
KDKERNELS_GPU float exp2_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0 : std::exp2(x);  // the GPU flushes smaller results to 0
#endif
}
// The larger number, or NaN if one is NaN.
KDKERNELS_GPU float max_or_nan(float a, float b) {
#ifdef __CUDACC__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// Writes what this kernel does not read again.
KDKERNELS_GPU void store(char* to, const Bits& bits) {
#ifdef __CUDACC__
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(bits.word[0], bits.word[1], bits.word[2], bits.word[3]));
#else
  std::memcpy(to, &bits, 16);
#endif
}

// Vectors of logits of 16 bytes. read() excludes logits of -infinity; the largest logit of a vector
// with a NaN may be any.
template <typename T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  static constexpr bool kKeepsTerms = true;  // a vector has room for the terms of the gradient
  KDKERNELS_GPU static void read(const Bits& bits, float (&x)[kSize]) {
    KDKERNELS_UNROLL
    for (int i = 0; i < kSize; ++i) x[i] = max_or_nan(as_float(bits.word[i]), kExcluded);
  }
  KDKERNELS_GPU static float largest(const Bits&, const float (&x)[kSize]) { return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])); }
  KDKERNELS_GPU static void exclude(Bits& bits, int i) { bits.word[i] = as_bits(kExcluded); }
  KDKERNELS_GPU static Bits round(const float (&x)[kSize]) { return {{as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])}}; }
  KDKERNELS_GPU static void write(char* to, const Bits& bits, int i) { *reinterpret_cast<uint32_t*>(to) = bits.word[i]; }
};

struct BFloat16;

template <>
struct Vector<BFloat16> {
  static constexpr int kSize = 8;
  static constexpr bool kKeepsTerms = false;
  static constexpr uint32_t kExcludedBits = 0xff61;  // the largest number that is not above kExcluded: -2.99e38
  KDKERNELS_GPU static void read(const Bits& bits, float (&x)[kSize]) {
    KDKERNELS_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t word = bits.word[i];
#ifdef __CUDACC__
      asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(kExcludedBits * 0x10001u));
      x[2 * i] = as_float(word << 16);
      x[2 * i + 1] = as_float(word & 0xffff0000u);
#else
      x[2 * i] = max_or_nan(as_float(word << 16), as_float(kExcludedBits << 16));
      x[2 * i + 1] = max_or_nan(as_float(word & 0xffff0000u), as_float(kExcludedBits << 16));
#endif
    }
  }
  KDKERNELS_GPU static float largest(const Bits& bits, const float (&x)[kSize]) {
#ifdef __CUDACC__
    uint32_t word = kExcludedBits * 0x10001u;
    KDKERNELS_UNROLL
    for (int i = 0; i < 4; ++i) asm("max.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(bits.word[i]));
    return fmaxf(as_float(word << 16), as_float(word & 0xffff0000u));
#else
    float most = x[0];
    for (int i = 1; i < kSize; ++i) most = fmaxf(most, x[i]);
    return most;
#endif
  }
  KDKERNELS_GPU static void exclude(Bits& bits, int i) {
    const uint32_t shift = i % 2 * 16;
    bits.word[i / 2] = (bits.word[i / 2] & ~(0xffffu << shift)) | kExcludedBits << shift;
  }
  KDKERNELS_GPU static Bits round(const float (&x)[kSize]) {
    Bits bits;
    KDKERNELS_UNROLL
    for (int i = 0; i < 4; ++i) bits.word[i] = pair(x[2 * i], x[2 * i + 1]);
    return bits;
  }
  KDKERNELS_GPU static void write(char* to, const Bits& bits, int i) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits.word[i / 2] >> (i % 2 * 16));
  }

 private:
  KDKERNELS_GPU static uint32_t pair(float low, float high) {
#ifdef __CUDACC__
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    auto rounded = [](float x) {
      const uint32_t b = as_bits(x);
      return x != x ? 0x7fffu : (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
#endif
  }
};

// Sums of 2^(t - teacher_exponent) and 2^(s - student_exponent). The exponents are integers, so that
// sums are rescaled without rounding.
struct Extent {
  float teacher_exponent, teacher_sum, student_exponent, student_sum;
};

struct MergeExtents {
  KDKERNELS_GPU static Extent neutral() { return {kNoExponent, 0, kNoExponent, 0}; }
  KDKERNELS_GPU static Extent join(const Extent& a, const Extent& b) {
    const float t = reduce::Max::join(a.teacher_exponent, b.teacher_exponent),
                s = reduce::Max::join(a.student_exponent, b.student_exponent);
    return {t, a.teacher_sum * exp2_fast(a.teacher_exponent - t) + b.teacher_sum * exp2_fast(b.teacher_exponent - t), s,
            a.student_sum * exp2_fast(a.student_exponent - s) + b.student_sum * exp2_fast(b.student_exponent - s)};
  }
  template <typename Lanes>
  KDKERNELS_GPU static void lanes(Lanes& lanes) {
    lanes.template butterfly<reduce::Max>(&Extent::teacher_exponent,
                                          [](Extent& x, float old) { x.teacher_sum *= exp2_fast(old - x.teacher_exponent); });
    lanes.template butterfly<reduce::Max>(&Extent::student_exponent,
                                          [](Extent& x, float old) { x.student_sum *= exp2_fast(old - x.student_exponent); });
    lanes.template butterfly<reduce::Sum>(&Extent::teacher_sum, [](Extent&, float) {});
    lanes.template butterfly<reduce::Sum>(&Extent::student_sum, [](Extent&, float) {});
  }
};

// Sums of e (e^y - 1 - y) and of -e y / log(2); see divergence.h.
struct Means {
  float convex, drift;
};

struct MergeMeans {
  KDKERNELS_GPU static Means neutral() { return {0, 0}; }
  KDKERNELS_GPU static Means join(const Means& a, const Means& b) { return {a.convex + b.convex, a.drift + b.drift}; }
  template <typename Lanes>
  KDKERNELS_GPU static void lanes(Lanes& lanes) {
    lanes.template butterfly<reduce::Sum>(&Means::convex, [](Means&, float) {});
    lanes.template butterfly<reduce::Sum>(&Means::drift, [](Means&, float) {});
  }
};

// The vectors of a row that a block keeps, and where they are. A row need not start at a multiple of
// 16 bytes: then its first vector contains logits of the row before it, which are excluded. All
// three tensors have the same position relative to these multiples.
template <typename T>
struct RowVectors {
  static constexpr int kSize = Vector<T>::kSize, kBytes = 16 / kSize;

  KDKERNELS_GPU RowVectors(const LongRows& p, int row) : classes(p.classes) {
    const int outer = p.inner_size == p.rows ? 0 : row / p.inner_size, inner = row - outer * p.inner_size;
    teacher = p.teacher + outer * p.teacher_strides.outer + inner * p.teacher_strides.inner;
    student = p.student + outer * p.student_strides.outer + inner * p.student_strides.inner;
    grad = p.grad + outer * p.grad_strides.outer + inner * p.grad_strides.inner;
    const int bytes = static_cast<int>(reinterpret_cast<uintptr_t>(teacher) % 16);
    teacher -= bytes, student -= bytes, grad -= bytes;
    skipped = bytes / kBytes;
    count = (skipped + classes + kSize - 1) / kSize;
  }
  // The number of bytes of a vector up to the end of the row.
  KDKERNELS_GPU int bytes(int vector) const {
    const int left = (skipped + classes - vector * kSize) * kBytes;
    return left < 16 ? left : 16;
  }
  KDKERNELS_GPU bool is_edge(int vector) const { return vector == 0 || vector == count - 1; }
  KDKERNELS_GPU bool has(int vector, int i) const { return unsigned(vector * kSize + i - skipped) < unsigned(classes); }

  const char *teacher, *student;  // the first vectors
  char* grad;
  int classes, skipped, count;  // `skipped` logits of the first vector belong to another row
};

// A warp waits for its copies in this many steps, to work on the first while the last arrive.
constexpr int kSteps = 4;

template <typename T, int Threads>
class LongRowsBody {
  using V = Vector<T>;
  static constexpr int kSize = V::kSize;

 public:
  KDKERNELS_GPU LongRowsBody(Cluster<Threads>& cluster, const LongRows& p) : cluster_(cluster), p_(p), slots_(slots(p.vectors, Threads)) {}

  KDKERNELS_GPU void run(int first, int step) {
    RowVectors<T> row(p_, first);
    bool is_kept = keeps(first);
    for (int s = 0; s < kSteps; ++s) request(row, is_kept, s);
    for (int index = first; index < p_.rows; index += step) {
      const int next_index = index + step;
      const bool keeps_next = keeps(next_index);
      const RowVectors<T> next(p_, next_index < p_.rows ? next_index : index);
      if (is_kept)
        compute(index, row, next, keeps_next);
      else
        skip(index, row, next, keeps_next);
      row = next;
      is_kept = keeps_next;
    }
    cluster_.barrier();
  }

 private:
  KDKERNELS_GPU bool keeps(int row) const { return row < p_.rows && (!p_.mask || p_.mask[row]); }

  KDKERNELS_GPU Bits& teacher(int rank, int slot) const { return reinterpret_cast<Bits*>(cluster_.shared(rank))[slot]; }
  KDKERNELS_GPU Bits& student(int rank, int slot) const { return reinterpret_cast<Bits*>(cluster_.shared(rank))[slots_ + slot]; }

  // Calls f(rank, t, slot, vector) for the vectors of a step, in every thread.
  template <typename F>
  KDKERNELS_GPU void each(const RowVectors<T>& row, int step, F f) {
    const int rounds = static_cast<int>(slots_) / Threads;
    cluster_.threads([&](int rank, int t) {
      const int first = rank * p_.vectors, left = row.count - first, here = left < p_.vectors ? left : p_.vectors;
      const int step_end = rounds * (step + 1) / kSteps * Threads, end = here < step_end ? here : step_end;
      for (int slot = rounds * step / kSteps * Threads + t; slot < end; slot += Threads) f(rank, t, slot, first + slot);
    });
  }

  // Requests the vectors of a step of a row, whose slots are no longer needed.
  KDKERNELS_GPU void request(const RowVectors<T>& row, bool is_kept, int step) {
    if (is_kept) {
      each(row, step, [&](int rank, int t, int slot, int vector) {
        const int bytes = row.bytes(vector);
        cluster_.copy_16_bytes_async(rank, t, &teacher(rank, slot), row.teacher + int64_t(vector) * 16, bytes);
        cluster_.copy_16_bytes_async(rank, t, &student(rank, slot), row.student + int64_t(vector) * 16, bytes);
      });
    }
    cluster_.commit();
  }

  KDKERNELS_GPU static void exclude_others(const RowVectors<T>& row, int vector, Bits& teacher, Bits& student) {
    KDKERNELS_UNROLL
    for (int i = 0; i < kSize; ++i) {
      if (row.has(vector, i)) continue;
      V::exclude(teacher, i);
      V::exclude(student, i);
    }
  }

  // Adds 2^(x c - exponent) to a sum, for the logits x of a vector.
  KDKERNELS_GPU static void add(const Bits& bits, float c, float& exponent, float& sum) {
    float x[kSize];
    V::read(bits, x);
    const float largest = V::largest(bits, x) * c;
    if (largest > exponent + kSlack) {
      const float raised = rintf(largest);
      sum *= exp2_fast(exponent - raised);
      exponent = raised;
    }
    float terms[kSize];
    KDKERNELS_UNROLL
    for (int i = 0; i < kSize; ++i) terms[i] = exp2_fast(fmaf(x[i], c, -exponent));
    KDKERNELS_UNROLL
    for (int width = kSize / 2; width > 0; width /= 2) {
      KDKERNELS_UNROLL
      for (int i = 0; i < width; ++i) terms[i] += terms[i + width];
    }
    sum += terms[0];
  }

  KDKERNELS_GPU void compute(int index, const RowVectors<T>& row, const RowVectors<T>& next, bool keeps_next) {
    const float temperature = p_.row_temperature ? p_.row_temperature[index] : p_.temperature;
    const float inverse_t = 1.0f / temperature, c = kLog2E * inverse_t;
    cluster_.threads([&](int rank, int t) { extents_(rank, t) = MergeExtents::neutral(); });
    sum_step<0>(row, c);
    sum_step<1>(row, c);
    sum_step<2>(row, c);
    sum_step<3>(row, c);
    const Extent extent = cluster_.template reduce<MergeExtents>(extents_);
    Centre centre;
    centre.c = c;
    centre.exponent = extent.teacher_exponent;
    const float ratio = extent.student_sum / extent.teacher_sum, power = rintf(log2f(ratio));
    centre.offset = (extent.student_exponent - extent.teacher_exponent) + power;
    centre.rest = log2f(ratio * exp2_fast(-power));
    const float inverse_sum = 1.0f / extent.teacher_sum;
    float row_weight = p_.weight;
    if (p_.weight_factor) row_weight *= *p_.weight_factor;
    if (p_.upstream) row_weight *= p_.upstream[index * p_.upstream_stride];
    const float factor = (p_.scale_by_t2 ? row_weight * temperature : row_weight * inverse_t) * inverse_sum;
    cluster_.threads([&](int rank, int t) {
      means_(rank, t) = MergeMeans::neutral();
      steepest_(rank, t) = 0;
    });
    for (int step = 0; step < kSteps; ++step) {
      each(row, step, [&](int rank, int t, int slot, int vector) {
        Bits &teacher_bits = teacher(rank, slot), &student_bits = student(rank, slot);
        float weight[kSize], gradient[kSize];
        terms(teacher_bits, student_bits, centre, means_(rank, t), steepest_(rank, t), weight, gradient);
        if (V::kKeepsTerms) {
          teacher_bits = V::round(weight);
          student_bits = V::round(gradient);
        } else {
          KDKERNELS_UNROLL
          for (int i = 0; i < kSize; ++i) gradient[i] *= factor;
          write(row, vector, V::round(gradient));
        }
      });
      if (!V::kKeepsTerms) request(next, keeps_next, step);
    }
    cluster_.threads([&](int rank, int t) {
      if (!(steepest_(rank, t) < kSteep)) means_(rank, t).convex = as_float(0x7f800000u);
    });
    const Means sums = cluster_.template reduce<MergeMeans>(means_);
    const float convex = sums.convex * inverse_sum, drift = sums.drift * (kLn2 * inverse_sum);
    // Both sums are the divergence up to rounding. If it is large, their difference is only rounding.
    const float w = convex < kLargeDivergence ? convex - drift : 0;
    if (V::kKeepsTerms) {
      const float final_factor = factor / (1.0f + w);
      for (int step = 0; step < kSteps; ++step) {
        each(row, step, [&](int rank, int, int slot, int vector) {
          const Bits weights = teacher(rank, slot), growths = student(rank, slot);
          float gradient[kSize];
          KDKERNELS_UNROLL
          for (int i = 0; i < kSize; ++i) gradient[i] = (as_float(growths.word[i % 4]) - as_float(weights.word[i % 4]) * w) * final_factor;
          write(row, vector, V::round(gradient));
        });
        request(next, keeps_next, step);
      }
    }
    finish(index, temperature, convex, drift, w, centre, extent);
  }

  template <int Step>
  KDKERNELS_GPU void sum_step(const RowVectors<T>& row, float c) {
    cluster_.template wait<kSteps - 1 - Step>();
    each(row, Step, [&](int rank, int t, int slot, int vector) {
      Bits &teacher_bits = teacher(rank, slot), &student_bits = student(rank, slot);
      if (row.is_edge(vector)) exclude_others(row, vector, teacher_bits, student_bits);
      Extent& extent = extents_(rank, t);
      add(teacher_bits, c, extent.teacher_exponent, extent.teacher_sum);
      add(student_bits, c, extent.student_exponent, extent.student_sum);
    });
  }

  struct Centre {
    float c, exponent;  // log2(e) / T, i
    // offset + rest is (log z' - log z) / log(2) + j - i. The offset is an integer, and the rest small,
    // so that the sum is not rounded.
    float offset, rest;
  };

  // Computes e and e (e^y - 1) of a vector, and adds to the sums.
  KDKERNELS_GPU static void terms(const Bits& teacher_bits, const Bits& student_bits, const Centre& centre, Means& means, float& steepest,
                                  float (&weight)[kSize], float (&growth)[kSize]) {
    float student[kSize];
    V::read(teacher_bits, weight);
    V::read(student_bits, student);
    Means sums = MergeMeans::neutral();
    KDKERNELS_UNROLL
    for (int i = 0; i < kSize; ++i) {
      const float difference = student[i] - weight[i];
      weight[i] = exp2_fast(fmaf(weight[i], centre.c, -centre.exponent));
      const float t = fmaf(difference, centre.c, -centre.offset) - centre.rest;  // y / log(2)
      const float small = t * t * convex_polynomial<true>(t), large = exp2_fast(t) - 1.0f;
      const bool is_small = fabsf(t) <= kLog2E;
      const float convex = is_small ? small : fmaf(-kLn2, t, large);
      steepest = fmaxf(steepest, t);
      growth[i] = weight[i] * (is_small ? fmaf(kLn2, t, small) : large);
      sums.convex = fmaf(weight[i], convex, sums.convex);
      sums.drift = fmaf(-weight[i], t, sums.drift);
    }
    means.convex += sums.convex;
    means.drift += sums.drift;
  }

  KDKERNELS_GPU static void write(const RowVectors<T>& row, int vector, const Bits& bits) {
    char* to = row.grad + int64_t(vector) * 16;
    if (!row.is_edge(vector)) {
      store(to, bits);
      return;
    }
    KDKERNELS_UNROLL
    for (int i = 0; i < kSize; ++i)
      if (row.has(vector, i)) V::write(to + i * RowVectors<T>::kBytes, bits, i);
  }

  KDKERNELS_GPU void finish(int index, float temperature, float convex, float drift, float w, const Centre& centre, const Extent& extent) {
    const float excluded = 0.5f * kExcluded * centre.c;
    const bool is_ordinary = temperature > 0 && extent.teacher_sum > 0 && extent.student_sum > 0 && extent.teacher_exponent > excluded &&
                             extent.student_exponent > excluded && convex > -1e30f && convex < 1e30f && fabsf(drift) < kFar * kLn2 &&
                             fabsf(centre.offset) < kFar;
    cluster_.threads([&](int rank, int t) {
      if (rank != 0 || t != 0) return;
      p_.state[index] = is_ordinary ? kComputed : kLeft;
      if (!is_ordinary) cluster_.add(p_.left, 1);
      if (p_.loss && is_ordinary) {
        const float kl = convex < kLargeDivergence ? centred_kl(convex, drift, w) : convex;
        p_.loss[index] = p_.scale_by_t2 ? kl * temperature * temperature : kl;
      }
    });
  }

  // E_p[-y] + log(1 + w); see divergence.h.
  KDKERNELS_GPU static float centred_kl(float convex, float drift, float w) {
    float series = 1.0f / 12;
    KDKERNELS_UNROLL
    for (int k = 11; k >= 2; --k) series = 1.0f / k - w * series;
    const float kl = fabsf(w) < 0.03f ? convex - w * w * series : drift + log1pf(w);
    return kl < 0 ? 0 : kl;
  }

  // A row that the mask excludes has no loss and no gradient.
  KDKERNELS_GPU void skip(int index, const RowVectors<T>& row, const RowVectors<T>& next, bool keeps_next) {
    for (int step = 0; step < kSteps; ++step) {
      each(row, step, [&](int, int, int, int vector) { write(row, vector, Bits{{0, 0, 0, 0}}); });
      request(next, keeps_next, step);
    }
    cluster_.threads([&](int rank, int t) {
      if (rank != 0 || t != 0) return;
      p_.state[index] = kComputed;
      if (p_.loss) p_.loss[index] = 0;
    });
  }

  Cluster<Threads>& cluster_;
  const LongRows& p_;
  int64_t slots_;
  OfThread<Extent> extents_;
  OfThread<Means> means_;
  OfThread<float> steepest_;
};

}  // namespace kdkernels::temperature_kl::gpu
