// Converts tensors to the arguments of the CUDA kernels. Used by cuda.cpp, which runs the kernels
// on a GPU, and by csrc/testing/truncated_svd_host.cpp, which runs them on the CPU.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "cta/plan.h"
#include "truncated_svd.h"

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

// x [..., M, N] as [B, M, N]: a view if the strides allow it.
inline Tensor flatten_batch(const Tensor& x) {
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

inline void check_fits(const Tensor& x, int64_t k, const MemoryNeed& need, int64_t limit) {
  const Shape shape(x);
  TORCH_CHECK_VALUE(shape.p <= kMaxSide && shape.q * std::max<int64_t>(k, shape.p) < (int64_t(1) << 31) && need.shared <= limit,
                    "the implementation \"cuda\" takes matrices whose smaller side is at most ", kMaxSide,
                    ", with sides and k that fit in the shared memory of a block; got x of shape ", x.sizes(), " with k = ", k,
                    "; choose another implementation");
}

inline void check_launched(const char* error) {
  TORCH_CHECK(error == nullptr, "truncated_svd: a CUDA kernel could not be launched: ", error);
}

inline Tensor bytes(int64_t count, const Tensor& like) {
  return at::empty({count}, like.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
}

// How problems are launched: the shared memory that a block may have, in bytes, and the CUDA
// stream.
struct LaunchOptions {
  int64_t limit;
  void* stream;
};

// The forward pass of one batch of matrices: its tensors, which must live until the launch, and the
// arguments of the kernel.
struct Decomposition {
  Decomposition(const Tensor& x, int64_t k, bool sign, bool return_u, bool save_state, int64_t limit) : shape(x), m(flatten_batch(x)) {
    check_matrices(x, k);
    const at::ScalarType dtype = compute_dtype(x);
    const int p = static_cast<int>(shape.p), q = static_cast<int>(shape.q), vectors = static_cast<int>(k);
    const MemoryNeed need = dtype == at::kDouble ? forward_memory<double>(p, vectors, limit) : forward_memory<float>(p, vectors, limit);
    check_fits(x, k, need, limit);
    const auto options = x.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
    const bool needs_b = return_u || !shape.tall;
    const int64_t batch = m.size(0);
    a = at::empty(batched(x, {k, p}), options);
    b = needs_b ? at::empty(batched(x, {k, q}), options) : at::empty({0}, options);
    s = at::empty(batched(x, {k}), options);
    state = at::empty({save_state ? batch * state_size(p, vectors) : 0}, options);
    workspace = bytes(batch * need.workspace, x);
    problem = {view_of(m, shape.tall),
               batch,
               p,
               q,
               vectors,
               sign,
               shape.tall,
               a.mutable_data_ptr(),
               needs_b ? b.mutable_data_ptr() : nullptr,
               s.mutable_data_ptr(),
               save_state ? state.mutable_data_ptr() : nullptr,
               workspace.mutable_data_ptr()};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const {
    const Tensor a_vectors = a.transpose(-1, -2), b_vectors = b.numel() > 0 || b.dim() > 1 ? b.transpose(-1, -2) : b;
    return {shape.tall ? b_vectors : a_vectors, s, shape.tall ? a_vectors : b_vectors, state};
  }

  Shape shape;
  Tensor m, a, b, s, state, workspace;
  ForwardProblem problem;
};

inline std::tuple<Tensor, Tensor, Tensor, Tensor> decompose(const Tensor& x, int64_t k, int64_t sign, bool return_u, bool save_state,
                                                            const LaunchOptions& launch) {
  const Decomposition decomposition(x, k, parse_sign(sign), return_u, save_state, launch.limit);
  if (decomposition.problem.batch > 0) check_launched(launch_forward(&decomposition.problem, 1, launch.limit, launch.stream));
  return decomposition.results();
}

using Lists = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

// Decomposes several batches of matrices, with as few launches as the different kernels allow.
inline Lists decompose_group(at::TensorList xs, int64_t k, int64_t sign, bool return_u, bool save_state, const LaunchOptions& launch) {
  std::vector<Decomposition> members;
  std::vector<ForwardProblem> problems;
  for (const Tensor& x : xs) {
    members.emplace_back(x, k, parse_sign(sign), return_u, save_state, launch.limit);
    if (members.back().problem.batch > 0) problems.push_back(members.back().problem);
  }
  check_launched(launch_forward(problems.data(), static_cast<int>(problems.size()), launch.limit, launch.stream));
  Lists lists;
  for (const Decomposition& member : members) {
    const auto [u, s, v, state] = member.results();
    std::get<0>(lists).push_back(u);
    std::get<1>(lists).push_back(s);
    std::get<2>(lists).push_back(v);
    std::get<3>(lists).push_back(state);
  }
  return lists;
}

// The backward pass of one batch of matrices: its tensors, which must live until the launch, and
// the arguments of the kernels.
struct Derivative {
  Derivative(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s, const std::optional<Tensor>& grad_v, const Tensor& x,
             const Tensor& u, const Tensor& s, const Tensor& v, const Tensor& state_, double gap_eps, int64_t limit)
      : in(grad_u, grad_s, grad_v, x, u, s, v, gap_eps),
        m(flatten_batch(x)),
        gradient(at::empty_like(x)),
        target(flatten_batch(gradient)),
        state(state_) {
    const Shape shape(x);
    const int p = static_cast<int>(shape.p), q = static_cast<int>(shape.q), k = static_cast<int>(in.k);
    const MemoryNeed need = in.dtype == at::kDouble ? backward_memory<double>(p, k, limit) : backward_memory<float>(p, k, limit);
    check_fits(x, k, need, limit);
    const int64_t batch = m.size(0);
    TORCH_CHECK_VALUE(state.numel() == 0 || (state.scalar_type() == in.dtype && state.is_contiguous() && state.device() == x.device() &&
                                             state.numel() == batch * state_size(p, k)),
                      "state must be the tensor that the forward op returned for x, or empty");
    const auto options = x.options().dtype(in.dtype).memory_format(at::MemoryFormat::Contiguous);
    auto rows = [](const Tensor& g) { return g.defined() ? g.contiguous() : g; };
    a = shape.tall ? in.v : in.u, b = shape.tall ? in.u : in.v;
    ga = rows(in.grad[shape.tall ? 2 : 0]), gs = in.grad[1], gb = rows(in.grad[shape.tall ? 0 : 2]);
    workspace = bytes(batch * need.workspace, x), z = at::empty({batch, k, p}, options);
    coefficients = at::empty({batch, coefficients_size(k)}, options.dtype(at::kDouble));
    problem = {view_of(m, shape.tall),
               view_of(target, shape.tall),
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
  }

  Tensor result() const {
    if (!target.is_alias_of(gradient)) gradient.copy_(target.view(gradient.sizes()));
    return gradient;
  }

  BackwardInputs in;
  Tensor m, gradient, target, state, a, b, ga, gs, gb, workspace, z, coefficients;
  BackwardProblem problem;
};

inline Tensor decompose_backward(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s,
                                 const std::optional<Tensor>& grad_v, const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v,
                                 const Tensor& state, double gap_eps, const LaunchOptions& launch) {
  const Derivative derivative(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, launch.limit);
  if (derivative.problem.batch > 0) check_launched(launch_backward(&derivative.problem, 1, launch.limit, launch.stream));
  return derivative.result();
}

// An upstream gradient that is missing is passed as a tensor with a different number of dimensions.
inline std::vector<Tensor> decompose_group_backward(at::TensorList grad_u, at::TensorList grad_s, at::TensorList grad_v, at::TensorList x,
                                                    at::TensorList u, at::TensorList s, at::TensorList v, at::TensorList state,
                                                    at::ArrayRef<double> gap_eps, const LaunchOptions& launch) {
  const size_t count = x.size();
  for (const at::TensorList& list : {grad_u, grad_s, grad_v, u, s, v, state})
    TORCH_CHECK_VALUE(list.size() == count, "every list of tensors must have one tensor for each x: expected ", count, ", got ",
                      list.size());
  TORCH_CHECK_VALUE(gap_eps.size() == count, "gap_eps must have one number for each x: expected ", count, ", got ", gap_eps.size());
  std::vector<Derivative> members;
  members.reserve(count);
  std::vector<BackwardProblem> problems;
  auto optional_gradient = [](const Tensor& g, const Tensor& of) { return g.dim() == of.dim() ? std::optional<Tensor>(g) : std::nullopt; };
  for (size_t i = 0; i < count; ++i) {
    members.emplace_back(optional_gradient(grad_u[i], x[i]), optional_gradient(grad_s[i], s[i]), optional_gradient(grad_v[i], x[i]), x[i],
                         u[i], s[i], v[i], state[i], gap_eps[i], launch.limit);
    if (members.back().problem.batch > 0) problems.push_back(members.back().problem);
  }
  check_launched(launch_backward(problems.data(), static_cast<int>(problems.size()), launch.limit, launch.stream));
  std::vector<Tensor> gradients;
  for (const Derivative& member : members) gradients.push_back(member.result());
  return gradients;
}

}  // namespace kdkernels::truncated_svd::gpu
