// align_singular_vectors: a warp for each vector of the teacher forwards, for each vector of either side backwards.
#pragma once

#include "../truncated_svd/cta/arithmetic.h"
#include "problem.h"

namespace kdkernels::align_singular_vectors::gpu {

using kdkernels::truncated_svd::gpu::absolute;
using kdkernels::truncated_svd::gpu::larger;
using kdkernels::truncated_svd::gpu::Limits;

template <typename T, typename Cta>
KDKERNELS_GPU void forward(Cta& cta, const ForwardProblem& m, int64_t task) {
  const int n = m.n;
  const T* own = static_cast<const T*>(m.teacher) + task * n;
  const T* others = static_cast<const T*>(m.student) + task / m.k * m.many * n;
  auto cosine = [&](int j) {
    return cta.template sum<double>(n,
                                    [&](int i) { return static_cast<double>(others[int64_t(j) * n + i]) * static_cast<double>(own[i]); });
  };
  double most = 0;
  for (int j = 0; j < m.many; ++j) most = larger(most, absolute(cosine(j)));
  // The first of equals. NaN equals nothing: the first vector then.
  int chosen = 0;
  double best = cosine(0);
  const double least = (1 - kTies) * most;
  for (int j = 1; j < m.many && !(absolute(best) >= least); ++j) best = cosine(j), chosen = j;
  if (!(absolute(best) >= least)) chosen = 0;
  const T flip = best < 0 ? T(-1) : T(1), factor = m.weight ? static_cast<const T*>(m.weight)[task] : T(1);
  const T of_student = m.flip_teacher ? factor : factor * flip, of_teacher = m.flip_teacher ? factor * flip : factor;
  cta.each(1, [&](int) {
    m.match[task] = chosen;
    static_cast<T*>(m.flips)[task] = flip;
  });
  cta.each(n, [&](int i) {
    static_cast<T*>(m.out_student)[task * n + i] = of_student * others[int64_t(chosen) * n + i];
    static_cast<T*>(m.out_teacher)[task * n + i] = of_teacher * own[i];
  });
}

// Tasks [0, many): the student's vectors, gathered, so that the order of sums is fixed; then the teacher's and their weights.
template <typename T, typename Cta>
KDKERNELS_GPU void backward(Cta& cta, const BackwardProblem& m, int64_t task) {
  const int n = m.n, k = m.k, each = m.many + k;
  const int64_t b = task / each;
  const int own = static_cast<int>(task % each);
  const T *up_s = static_cast<const T*>(m.grad_student), *up_t = static_cast<const T*>(m.grad_teacher);
  const T *flips = static_cast<const T*>(m.flips), *weight = static_cast<const T*>(m.weight);
  if (own < m.many) {
    if (!m.to_student) return;
    T* to = static_cast<T*>(m.to_student) + (b * m.many + own) * n;
    cta.each(n, [&](int c) {
      T sum = T(0);
      for (int64_t i = b * k; up_s && i < (b + 1) * k; ++i)
        if (m.match[i] == own) sum += (weight ? weight[i] : T(1)) * (m.flip_teacher ? T(1) : flips[i]) * up_s[i * n + c];
      to[c] = sum;
    });
    return;
  }
  const int64_t i = b * k + own - m.many;
  const T sign_s = m.flip_teacher ? T(1) : flips[i], sign_t = m.flip_teacher ? flips[i] : T(1), factor = weight ? weight[i] : T(1);
  if (m.to_teacher) {
    T* to = static_cast<T*>(m.to_teacher) + i * n;
    cta.each(n, [&](int c) { to[c] = up_t ? factor * sign_t * up_t[i * n + c] : T(0); });
  }
  if (m.to_weight) {
    const int64_t match = m.match[i];
    const bool known = match >= 0 && match < m.many;  // the forward's are
    const T* s = static_cast<const T*>(m.student) + (b * m.many + (known ? match : 0)) * n;
    const T* t = static_cast<const T*>(m.teacher) + i * n;
    const double total = cta.template sum<double>(n, [&](int c) {
      return (up_s ? static_cast<double>(sign_s * up_s[i * n + c]) * static_cast<double>(s[c]) : 0.0) +
             (up_t ? static_cast<double>(sign_t * up_t[i * n + c]) * static_cast<double>(t[c]) : 0.0);
    });
    cta.each(1, [&](int) { static_cast<T*>(m.to_weight)[i] = known ? static_cast<T>(total) : Limits<T>::nan; });
  }
}

}  // namespace kdkernels::align_singular_vectors::gpu
