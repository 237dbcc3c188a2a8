// The kernels of align_singular_vectors: one warp for each vector of the teacher in the forward
// pass, and one for each vector of the student or the teacher in the backward pass.
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
  const T* teacher_vector = static_cast<const T*>(m.teacher) + task * n;
  const T* student_vectors = static_cast<const T*>(m.student) + task / m.k * m.student_k * n;
  auto cosine = [&](int j) {
    return cta.template sum<double>(
        n, [&](int i) { return static_cast<double>(student_vectors[int64_t(j) * n + i]) * static_cast<double>(teacher_vector[i]); });
  };
  double max_cosine = 0;
  for (int j = 0; j < m.student_k; ++j) max_cosine = larger(max_cosine, absolute(cosine(j)));
  // Choose the first of equal cosines. If cosines are NaN, choose the first vector.
  int chosen = 0;
  double best = cosine(0);
  const double threshold = (1 - kTies) * max_cosine;
  for (int j = 1; j < m.student_k && !(absolute(best) >= threshold); ++j) best = cosine(j), chosen = j;
  if (!(absolute(best) >= threshold)) chosen = 0;
  const T flip = best < 0 ? T(-1) : T(1), factor = m.weight ? static_cast<const T*>(m.weight)[task] : T(1);
  const T student_factor = m.flip_teacher ? factor : factor * flip, teacher_factor = m.flip_teacher ? factor * flip : factor;
  cta.each(1, [&](int) {
    m.match[task] = chosen;
    static_cast<T*>(m.flips)[task] = flip;
  });
  cta.each(n, [&](int i) {
    static_cast<T*>(m.out_student)[task * n + i] = student_factor * student_vectors[int64_t(chosen) * n + i];
    static_cast<T*>(m.out_teacher)[task * n + i] = teacher_factor * teacher_vector[i];
  });
}

// Tasks [0, student_k) of a matrix: the gradients of the student's vectors. Each task sums the
// contributions to one vector, so the order of summation is fixed. The remaining tasks: the
// gradients of the teacher's vectors and of their weights.
template <typename T, typename Cta>
KDKERNELS_GPU void backward(Cta& cta, const BackwardProblem& m, int64_t task) {
  const int n = m.n, k = m.k, tasks_per_matrix = m.student_k + k;
  const int64_t b = task / tasks_per_matrix;
  const int vector = static_cast<int>(task % tasks_per_matrix);
  const T *grad_s = static_cast<const T*>(m.grad_student), *grad_t = static_cast<const T*>(m.grad_teacher);
  const T *flips = static_cast<const T*>(m.flips), *weight = static_cast<const T*>(m.weight);
  if (vector < m.student_k) {
    if (!m.result_student) return;
    T* result = static_cast<T*>(m.result_student) + (b * m.student_k + vector) * n;
    cta.each(n, [&](int c) {
      T sum = T(0);
      for (int64_t i = b * k; grad_s && i < (b + 1) * k; ++i)
        if (m.match[i] == vector) sum += (weight ? weight[i] : T(1)) * (m.flip_teacher ? T(1) : flips[i]) * grad_s[i * n + c];
      result[c] = sum;
    });
    return;
  }
  const int64_t i = b * k + vector - m.student_k;
  const T sign_s = m.flip_teacher ? T(1) : flips[i], sign_t = m.flip_teacher ? flips[i] : T(1), factor = weight ? weight[i] : T(1);
  if (m.result_teacher) {
    T* result = static_cast<T*>(m.result_teacher) + i * n;
    cta.each(n, [&](int c) { result[c] = grad_t ? factor * sign_t * grad_t[i * n + c] : T(0); });
  }
  if (m.result_weight) {
    const int64_t match = m.match[i];
    // Always true for the `match` that the forward pass returned.
    const bool valid = match >= 0 && match < m.student_k;
    const T* s = static_cast<const T*>(m.student) + (b * m.student_k + (valid ? match : 0)) * n;
    const T* t = static_cast<const T*>(m.teacher) + i * n;
    const double total = cta.template sum<double>(n, [&](int c) {
      return (grad_s ? static_cast<double>(sign_s * grad_s[i * n + c]) * static_cast<double>(s[c]) : 0.0) +
             (grad_t ? static_cast<double>(sign_t * grad_t[i * n + c]) * static_cast<double>(t[c]) : 0.0);
    });
    cta.each(1, [&](int) { static_cast<T*>(m.result_weight)[i] = valid ? static_cast<T>(total) : Limits<T>::nan; });
  }
}

}  // namespace kdkernels::align_singular_vectors::gpu
