// Tensors to problems of the GPU kernels, for whatever runs them.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "../align_singular_vectors.h"
#include "../truncated_svd.h"
#include "../truncated_svd_launch.h"

namespace kdkernels::truncated_svd::gpu {

using at::Tensor;

inline Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return Storage::float64;
    case at::kBFloat16:
      return Storage::bfloat16;
    case at::kHalf:
      return Storage::float16;
    default:
      return Storage::float32;
  }
}

// x [..., M, N] as [B, M, N]: a view where strides allow one.
inline Tensor one_batch(const Tensor& x) {
  int64_t batch = 1;
  for (int64_t d = 0; d + 2 < x.dim(); ++d) batch *= x.size(d);
  return x.reshape({batch, x.size(-2), x.size(-1)});
}

inline View view_of(const Tensor& x, bool tall) {
  return {const_cast<void*>(x.const_data_ptr()), storage_of(x), x.stride(0), x.stride(tall ? 2 : 1), x.stride(tall ? 1 : 2)};
}

inline const void* pointer(const Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

struct Shape {
  explicit Shape(const Tensor& x)
      : tall(x.size(-2) >= x.size(-1)), p(std::min(x.size(-1), x.size(-2))), q(std::max(x.size(-1), x.size(-2))) {}
  bool tall;
  int64_t p, q;
};

inline void check_fits(const Tensor& x, int64_t k, const Need& need, int64_t limit) {
  const Shape shape(x);
  TORCH_CHECK_VALUE(shape.p <= kMaxSide && shape.q * std::max<int64_t>(k, shape.p) < (int64_t(1) << 31) && need.shared <= limit,
                    "driver=\"cuda\" takes matrices whose smaller side is at most ", kMaxSide, ", got ", x.sizes(), " with k = ", k);
}

inline void check_launched(const char* error) {
  TORCH_CHECK(error == nullptr, "truncated_svd: a CUDA kernel could not be launched: ", error);
}

inline Tensor bytes(int64_t count, const Tensor& like) {
  return at::empty({count}, like.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> decompose(const Tensor& x, int64_t k, c10::string_view sign, bool return_u,
                                                            bool save_state, int64_t limit, void* stream) {
  check_matrices(x, k);
  const bool fix = parse_sign(sign);
  const Shape shape(x);
  const at::ScalarType dtype = compute_dtype(x);
  const int p = static_cast<int>(shape.p), q = static_cast<int>(shape.q), kept = static_cast<int>(k);
  const Need need = dtype == at::kDouble ? forward_need<double>(p, kept, limit) : forward_need<float>(p, kept, limit);
  check_fits(x, k, need, limit);
  const Tensor m = one_batch(x);
  const int64_t batch = m.size(0);
  const auto options = x.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  auto vectors = [&](int64_t n) { return at::empty(batched(x, {k, n}), options); };
  const bool wants_b = return_u || !shape.tall;
  const Tensor a = vectors(p), b = wants_b ? vectors(q) : at::empty({0}, options), s = at::empty(batched(x, {k}), options);
  const Tensor state = at::empty({save_state ? batch * state_size(p, kept) : 0}, options);
  if (batch > 0) {
    const Tensor workspace = bytes(batch * need.workspace, x);
    const ForwardProblem problem{view_of(m, shape.tall),
                                 batch,
                                 p,
                                 q,
                                 kept,
                                 fix,
                                 shape.tall,
                                 a.mutable_data_ptr(),
                                 wants_b ? b.mutable_data_ptr() : nullptr,
                                 s.mutable_data_ptr(),
                                 save_state ? state.mutable_data_ptr() : nullptr,
                                 workspace.mutable_data_ptr()};
    check_launched(launch_forward(&problem, 1, limit, stream));
  }
  const Tensor rows = a.transpose(-1, -2), others = wants_b ? b.transpose(-1, -2) : b;
  return {shape.tall ? others : rows, s, shape.tall ? rows : others, state};
}

inline Tensor decompose_backward(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s,
                                 const std::optional<Tensor>& grad_v, const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v,
                                 const Tensor& state, double gap_eps, int64_t limit, void* stream) {
  const BackwardInputs in(grad_u, grad_s, grad_v, x, u, s, v, gap_eps);
  const Shape shape(x);
  const int p = static_cast<int>(shape.p), q = static_cast<int>(shape.q), k = static_cast<int>(in.k);
  const Need need = in.dtype == at::kDouble ? backward_need<double>(p, k, limit) : backward_need<float>(p, k, limit);
  check_fits(x, k, need, limit);
  const Tensor m = one_batch(x), gradient = at::empty_like(x), to = one_batch(gradient);
  const int64_t batch = m.size(0);
  TORCH_CHECK_VALUE(state.numel() == 0 || (state.scalar_type() == in.dtype && state.is_contiguous() && state.device() == x.device() &&
                                           state.numel() == batch * state_size(p, k)),
                    "state must be that of the forward, or empty");
  if (batch == 0) return gradient;
  const auto options = x.options().dtype(in.dtype).memory_format(at::MemoryFormat::Contiguous);
  const Tensor workspace = bytes(batch * need.workspace, x), z = at::empty({batch, k, p}, options),
               coefficients = at::empty({batch, coefficients_size(k)}, options.dtype(at::kDouble));
  const Tensor &a = shape.tall ? in.v : in.u, &b = shape.tall ? in.u : in.v;
  auto rows = [](const Tensor& g) { return g.defined() ? g.contiguous() : g; };
  const Tensor ga = rows(in.grad[shape.tall ? 2 : 0]), gs = in.grad[1], gb = rows(in.grad[shape.tall ? 0 : 2]);
  const BackwardProblem problem{view_of(m, shape.tall),
                                view_of(to, shape.tall),
                                batch,
                                p,
                                q,
                                k,
                                gap_eps,
                                pointer(a),
                                gb.defined() ? pointer(b) : nullptr,
                                pointer(in.s),
                                pointer(ga),
                                pointer(gs),
                                pointer(gb),
                                state.numel() > 0 ? state.const_data_ptr() : nullptr,
                                workspace.mutable_data_ptr(),
                                z.mutable_data_ptr(),
                                coefficients.mutable_data_ptr<double>()};
  check_launched(launch_backward(&problem, 1, limit, stream));
  if (!to.is_alias_of(gradient)) gradient.copy_(to.view(gradient.sizes()));
  return gradient;
}

}  // namespace kdkernels::truncated_svd::gpu

namespace kdkernels::align_singular_vectors::gpu {

using at::Tensor;
using truncated_svd::gpu::check_launched;
using truncated_svd::gpu::pointer;

inline std::tuple<Tensor, Tensor, Tensor, Tensor> align(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                        bool flip_teacher, void* stream) {
  check(student, teacher, weight);
  const at::ScalarType dtype = in_double(student, teacher) ? at::kDouble : at::kFloat;
  const Tensor s = vectors_first(student, dtype), t = vectors_first(teacher, dtype), w = weight ? weight->to(dtype).contiguous() : Tensor();
  const int64_t many = s.size(1), k = t.size(1), n = t.size(2);
  const auto options = student.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  const Tensor out_s = at::empty(batched(teacher, {k, n}), options), out_t = at::empty(batched(teacher, {k, n}), options);
  const Tensor match = at::empty(batched(teacher, {k}), options.dtype(at::kLong)), flips = at::empty(batched(teacher, {k}), options);
  const ForwardProblem problem{t.size(0),
                               static_cast<int>(many),
                               static_cast<int>(k),
                               static_cast<int>(n),
                               flip_teacher,
                               pointer(s),
                               pointer(t),
                               pointer(w),
                               out_s.mutable_data_ptr(),
                               out_t.mutable_data_ptr(),
                               flips.mutable_data_ptr(),
                               match.mutable_data_ptr<int64_t>()};
  if (match.numel() > 0) check_launched(launch_forward(problem, dtype == at::kDouble, stream));
  return {out_s.transpose(-1, -2), out_t.transpose(-1, -2), match, flips};
}

inline std::tuple<Tensor, Tensor, Tensor> align_backward(const std::optional<Tensor>& grad_student,
                                                         const std::optional<Tensor>& grad_teacher, const Tensor& student,
                                                         const Tensor& teacher, const std::optional<Tensor>& weight, const Tensor& match,
                                                         const Tensor& flips, bool flip_teacher, std::array<bool, 3> wanted, void* stream) {
  check_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, wanted);
  const at::ScalarType dtype = in_double(student, teacher) ? at::kDouble : at::kFloat;
  const int64_t many = student.size(-1), k = teacher.size(-1), n = teacher.size(-2), batch = match.numel() / k;
  auto given = [&](const std::optional<Tensor>& g) { return g && g->defined() ? vectors_first(*g, dtype) : Tensor(); };
  const Tensor gs = given(grad_student), gt = given(grad_teacher), w = weight ? weight->to(dtype).contiguous() : Tensor();
  const Tensor s = wanted[2] ? vectors_first(student, dtype) : Tensor(), t = wanted[2] ? vectors_first(teacher, dtype) : Tensor();
  const auto options = student.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  auto result = [&](bool want, at::IntArrayRef shape) { return want ? at::empty(shape, options) : Tensor(); };
  const Tensor to_s = result(wanted[0], {batch, many, n}), to_t = result(wanted[1], {batch, k, n}), to_w = result(wanted[2], {batch, k});
  auto writable = [](const Tensor& r) { return r.defined() ? r.mutable_data_ptr() : nullptr; };
  const Tensor index = match.contiguous(), signs = flips.contiguous();
  const BackwardProblem problem{batch,
                                static_cast<int>(many),
                                static_cast<int>(k),
                                static_cast<int>(n),
                                flip_teacher,
                                pointer(gs),
                                pointer(gt),
                                pointer(s),
                                pointer(t),
                                pointer(w),
                                pointer(signs),
                                index.const_data_ptr<int64_t>(),
                                writable(to_s),
                                writable(to_t),
                                writable(to_w)};
  if (batch > 0) check_launched(launch_backward(problem, dtype == at::kDouble, stream));
  const Tensor none = at::empty({0}, student.options().memory_format(at::MemoryFormat::Contiguous));
  auto like = [&](const Tensor& rows, const Tensor& x) {
    return at::empty_like(x).copy_(rows.view(batched(x, {x.size(-1), x.size(-2)})).transpose(-1, -2));
  };
  return {wanted[0] ? like(to_s, student) : none, wanted[1] ? like(to_t, teacher) : none,
          wanted[2] ? at::empty_like(*weight).copy_(to_w.view(weight->sizes())) : none};
}

}  // namespace kdkernels::align_singular_vectors::gpu
