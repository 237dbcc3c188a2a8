// CPU kernels of the align_singular_vectors ops. Compiled once per instruction set.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../common/implementations.h"
#include "../common/simd.h"
#include "align_singular_vectors.h"

namespace kdkernels::align_singular_vectors {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 14;  // numbers below which a second thread costs more than it brings

template <typename T>
void scaled(const T* from, T factor, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = factor * from[i];
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                   bool flip_teacher) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const Tensor s = vectors_first(student, dtype), t = vectors_first(teacher, dtype);
  const Tensor w = weight ? weight->to(dtype).contiguous() : Tensor();
  const int64_t batch = t.size(0), many = s.size(1), k = t.size(1), n = t.size(2);
  const auto options = student.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  const Tensor out_s = at::empty(batched(teacher, {k, n}), options), out_t = at::empty(batched(teacher, {k, n}), options);
  const Tensor match = at::empty(batched(teacher, {k}), options.dtype(at::kLong)), flips = at::empty(batched(teacher, {k}), options);
  at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / (many * k * n)), [&](int64_t begin, int64_t end) {
    std::vector<double> cosine(many);
    for (int64_t i = begin * k; i < end * k; ++i) {
      const T *own = t.const_data_ptr<T>() + i * n, *others = s.const_data_ptr<T>() + i / k * many * n;
      double most = 0;
      for (int64_t j = 0; j < many; ++j) {
        cosine[j] = simd::dot_product(others + j * n, own, n);
        most = std::max(most, std::abs(cosine[j]));
      }
      // The first of equals. NaN equals nothing: the first vector then.
      int64_t chosen = 0;
      while (chosen < many && !(std::abs(cosine[chosen]) >= (1 - kTies) * most)) ++chosen;
      if (chosen == many) chosen = 0;
      const T flip = cosine[chosen] < 0 ? T(-1) : T(1), factor = w.defined() ? w.const_data_ptr<T>()[i] : T(1);
      match.mutable_data_ptr<int64_t>()[i] = chosen;
      flips.mutable_data_ptr<T>()[i] = flip;
      scaled<T>(others + chosen * n, flip_teacher ? factor : factor * flip, n, out_s.mutable_data_ptr<T>() + i * n);
      scaled<T>(own, flip_teacher ? factor * flip : factor, n, out_t.mutable_data_ptr<T>() + i * n);
    }
  });
  return {out_s.transpose(-1, -2), out_t.transpose(-1, -2), match, flips};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& grad_student, const std::optional<Tensor>& grad_teacher,
                                            const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                            const Tensor& match, const Tensor& flips, bool flip_teacher, std::array<bool, 3> wanted) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const int64_t many = student.size(-1), k = teacher.size(-1), n = teacher.size(-2), batch = match.numel() / k;
  auto given = [&](const std::optional<Tensor>& g) { return g && g->defined() ? vectors_first(*g, dtype) : Tensor(); };
  const Tensor gs = given(grad_student), gt = given(grad_teacher), w = weight ? weight->to(dtype).contiguous() : Tensor();
  const Tensor s = wanted[2] ? vectors_first(student, dtype) : Tensor(), t = wanted[2] ? vectors_first(teacher, dtype) : Tensor();
  const auto options = student.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  const Tensor to_s = at::zeros({wanted[0] ? batch : 0, many, n}, options), to_t = at::zeros({wanted[1] ? batch : 0, k, n}, options);
  const Tensor to_w = at::zeros({wanted[2] ? batch : 0, k}, options);
  at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / (many * n)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * k; i < end * k; ++i) {
      const int64_t source = i / k * many + match.const_data_ptr<int64_t>()[i];
      const T flip = flips.const_data_ptr<T>()[i], factor = w.defined() ? w.const_data_ptr<T>()[i] : T(1);
      const T sign_s = flip_teacher ? T(1) : flip, sign_t = flip_teacher ? flip : T(1);
      const T *up_s = gs.defined() ? gs.const_data_ptr<T>() + i * n : nullptr,
              *up_t = gt.defined() ? gt.const_data_ptr<T>() + i * n : nullptr;
      if (wanted[0] && up_s) {
        T* to = to_s.mutable_data_ptr<T>() + source * n;
        for (int64_t c = 0; c < n; ++c) to[c] += factor * sign_s * up_s[c];
      }
      if (wanted[1] && up_t) scaled<T>(up_t, factor * sign_t, n, to_t.mutable_data_ptr<T>() + i * n);
      if (wanted[2])
        to_w.mutable_data_ptr<T>()[i] =
            static_cast<T>((up_s ? sign_s * simd::dot_product(up_s, s.const_data_ptr<T>() + source * n, n) : 0.0) +
                           (up_t ? sign_t * simd::dot_product(up_t, t.const_data_ptr<T>() + i * n, n) : 0.0));
    }
  });
  auto like = [&](const Tensor& result, const Tensor& x) {
    return at::empty_like(x).copy_(result.view(batched(x, {x.size(-1), x.size(-2)})).transpose(-1, -2));
  };
  const Tensor none = at::empty({0}, student.options().memory_format(at::MemoryFormat::Contiguous));
  return {wanted[0] ? like(to_s, student) : none, wanted[1] ? like(to_t, teacher) : none,
          wanted[2] ? at::empty_like(*weight).copy_(to_w.view(weight->sizes())) : none};
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
