// CPU kernels of the align_singular_vectors ops. Compiled once per instruction set.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../common/implementations.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "align_singular_vectors.h"

namespace kdkernels::align_singular_vectors {
namespace {

using at::Tensor;

// With fewer numbers than this, a second thread costs more time than it saves.
constexpr int64_t kGrain = 1 << 14;

// to = factor * from
template <typename T>
void scale_to(const T* from, T factor, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = factor * from[i];
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                   bool flip_teacher) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const Tensor s = vectors_first(student, dtype), t = vectors_first(teacher, dtype);
  const Tensor w = weight ? weight->to(dtype).contiguous() : Tensor();
  const int64_t batch = t.size(0), student_k = s.size(1), k = t.size(1), n = t.size(2);
  const auto options = student.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  const Tensor out_s = at::empty(batched(teacher, {k, n}), options), out_t = at::empty(batched(teacher, {k, n}), options);
  const Tensor match = at::empty(batched(teacher, {k}), options.dtype(at::kLong)), flips = at::empty(batched(teacher, {k}), options);
  parallel_for(0, batch, std::max<int64_t>(1, kGrain / (student_k * k * n)), [&](int64_t begin, int64_t end) {
    std::vector<double> cosine(student_k);
    for (int64_t i = begin * k; i < end * k; ++i) {
      const T *teacher_vector = t.const_data_ptr<T>() + i * n, *student_vectors = s.const_data_ptr<T>() + i / k * student_k * n;
      double max_cosine = 0;
      for (int64_t j = 0; j < student_k; ++j) {
        cosine[j] = simd::dot_product(student_vectors + j * n, teacher_vector, n);
        max_cosine = std::max(max_cosine, std::abs(cosine[j]));
      }
      // Choose the first of equal cosines. If cosines are NaN, choose the first vector.
      int64_t chosen = 0;
      while (chosen < student_k && !(std::abs(cosine[chosen]) >= (1 - kTies) * max_cosine)) ++chosen;
      if (chosen == student_k) chosen = 0;
      const T flip = cosine[chosen] < 0 ? T(-1) : T(1), factor = w.defined() ? w.const_data_ptr<T>()[i] : T(1);
      match.mutable_data_ptr<int64_t>()[i] = chosen;
      flips.mutable_data_ptr<T>()[i] = flip;
      scale_to<T>(student_vectors + chosen * n, flip_teacher ? factor : factor * flip, n, out_s.mutable_data_ptr<T>() + i * n);
      scale_to<T>(teacher_vector, flip_teacher ? factor * flip : factor, n, out_t.mutable_data_ptr<T>() + i * n);
    }
  });
  return {out_s.transpose(-1, -2), out_t.transpose(-1, -2), match, flips};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& grad_student, const std::optional<Tensor>& grad_teacher,
                                            const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                            const Tensor& match, const Tensor& flips, bool flip_teacher, std::array<bool, 3> wanted) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const int64_t student_k = student.size(-1), k = teacher.size(-1), n = teacher.size(-2), batch = match.numel() / k;
  auto rows_of = [&](const std::optional<Tensor>& g) { return g && g->defined() ? vectors_first(*g, dtype) : Tensor(); };
  const Tensor gs = rows_of(grad_student), gt = rows_of(grad_teacher), w = weight ? weight->to(dtype).contiguous() : Tensor();
  const Tensor s = wanted[2] ? vectors_first(student, dtype) : Tensor(), t = wanted[2] ? vectors_first(teacher, dtype) : Tensor();
  const auto options = student.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  const Tensor result_s = at::zeros({wanted[0] ? batch : 0, student_k, n}, options),
               result_t = at::zeros({wanted[1] ? batch : 0, k, n}, options);
  const Tensor result_w = at::zeros({wanted[2] ? batch : 0, k}, options);
  parallel_for(0, batch, std::max<int64_t>(1, kGrain / (student_k * n)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * k; i < end * k; ++i) {
      const int64_t source = i / k * student_k + match.const_data_ptr<int64_t>()[i];
      const T flip = flips.const_data_ptr<T>()[i], factor = w.defined() ? w.const_data_ptr<T>()[i] : T(1);
      const T sign_s = flip_teacher ? T(1) : flip, sign_t = flip_teacher ? flip : T(1);
      const T *grad_s = gs.defined() ? gs.const_data_ptr<T>() + i * n : nullptr,
              *grad_t = gt.defined() ? gt.const_data_ptr<T>() + i * n : nullptr;
      if (wanted[0] && grad_s) {
        T* result = result_s.mutable_data_ptr<T>() + source * n;
        for (int64_t c = 0; c < n; ++c) result[c] += factor * sign_s * grad_s[c];
      }
      if (wanted[1] && grad_t) scale_to<T>(grad_t, factor * sign_t, n, result_t.mutable_data_ptr<T>() + i * n);
      if (wanted[2])
        result_w.mutable_data_ptr<T>()[i] =
            static_cast<T>((grad_s ? sign_s * simd::dot_product(grad_s, s.const_data_ptr<T>() + source * n, n) : 0.0) +
                           (grad_t ? sign_t * simd::dot_product(grad_t, t.const_data_ptr<T>() + i * n, n) : 0.0));
    }
  });
  auto with_layout_of = [&](const Tensor& result, const Tensor& x) {
    return at::empty_like(x).copy_(result.view(batched(x, {x.size(-1), x.size(-2)})).transpose(-1, -2));
  };
  const Tensor none = at::empty({0}, student.options().memory_format(at::MemoryFormat::Contiguous));
  return {wanted[0] ? with_layout_of(result_s, student) : none, wanted[1] ? with_layout_of(result_t, teacher) : none,
          wanted[2] ? at::empty_like(*weight).copy_(result_w.view(weight->sizes())) : none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> align_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                     bool flip_teacher, int64_t implementation) {
  if (const auto chosen = parse_implementation(implementation); chosen != Implementation::fastest)
    return implementation_op<Signature>("align_singular_vectors", chosen).call(student, teacher, weight, flip_teacher);
  check(student, teacher, weight);
  return (in_double(student, teacher) ? forward<double> : forward<float>)(student, teacher, weight, flip_teacher);
}

std::tuple<Tensor, Tensor, Tensor> align_backward_cpu(const std::optional<Tensor>& grad_student, const std::optional<Tensor>& grad_teacher,
                                                      const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                      const Tensor& match, const Tensor& flips, bool flip_teacher,
                                                      std::array<bool, 3> wanted, int64_t implementation) {
  if (const auto chosen = parse_implementation(implementation); chosen != Implementation::fastest)
    return implementation_op<BackwardSignature>("align_singular_vectors_backward", chosen)
        .call(grad_student, grad_teacher, student, teacher, weight, match, flips, flip_teacher, wanted);
  check_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, wanted);
  check_match(match, student.size(-1));
  return (in_double(student, teacher) ? backward<double> : backward<float>)(grad_student, grad_teacher, student, teacher, weight,
                                                                            match.contiguous(), flips.contiguous(), flip_teacher, wanted);
}

}  // namespace
}  // namespace kdkernels::align_singular_vectors

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("align_singular_vectors", kdkernels::align_singular_vectors::align_cpu);
  m.impl("align_singular_vectors_backward", kdkernels::align_singular_vectors::align_backward_cpu);
}
