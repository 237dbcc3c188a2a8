// The implementation "cuda" on CPU tensors: the bodies of the CUDA kernels run by the Cta of host_cta.h, block by block. For tests; it is
// slow.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

#include "../align_singular_vectors/cta.h"
#include "../align_singular_vectors/cuda_problems.h"
#include "../truncated_svd/cta/blocks.h"

namespace kdkernels::truncated_svd::gpu {
namespace {

// Bytes of shared memory that a block may have, and the seed of the threads' order.
std::atomic<int64_t> shared_limit{227 << 10}, seed{1};

// Shared memory of a block: NaN at first, with a guard behind it that must stay as it is.
class Shared {
 public:
  explicit Shared(int64_t size) : memory_(size + 2 * kGuard) { poison(memory_.data(), memory_.size()); }
  char* get() { return memory_.data() + (kGuard - reinterpret_cast<uintptr_t>(memory_.data()) % kGuard); }
  void check(int64_t size) {
    for (char* at = get() + size; at < memory_.data() + memory_.size(); ++at)
      if (*at != char(0xff)) throw std::logic_error("a kernel wrote past its shared memory");
  }

 private:
  static constexpr int64_t kGuard = 64;
  std::vector<char> memory_;
};

// run(cta, block, part, shared) for every block and each part of it, the parts one after another in the memory of their block.
template <int Threads, typename F>
void over_blocks(int64_t blocks, int parts, int64_t shared, F run) {
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Shared memory(parts * shared);
      for (int part = 0; part < parts; ++part) {
        Cta<Threads> cta(static_cast<uint64_t>(seed) * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(block * parts + part));
        run(cta, block, part, memory.get());
      }
      memory.check(parts * shared);
    }
  });
}

}  // namespace

const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void*) {
  return in_forward_groups(problems, count, limit, [](const auto& group, auto t, auto threads, int64_t blocks, int64_t own) {
    constexpr int kThreads = decltype(threads)::value;
    over_blocks<kThreads>(blocks, matrices_together(kThreads), own, [&](auto& cta, int64_t block, int part, char* memory) {
      forward_block<decltype(t)>(cta, group, block, part, memory, own);
    });
    return static_cast<const char*>(nullptr);
  });
}

const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void*) {
  in_solve_groups(problems, count, limit, [](const auto& group, auto t, auto threads, int64_t blocks, int64_t own) {
    constexpr int kThreads = decltype(threads)::value;
    over_blocks<kThreads>(blocks, matrices_together(kThreads), own, [&](auto& cta, int64_t block, int part, char* memory) {
      solve_block<decltype(t)>(cta, group, block, part, memory, own);
    });
    return static_cast<const char*>(nullptr);
  });
  return in_update_groups(problems, count, [](const auto& group, auto t, int64_t blocks, int64_t shared) {
    over_blocks<kUpdateThreads>(blocks, 1, shared,
                                [&](auto& cta, int64_t block, int, char* memory) { update_block<decltype(t)>(cta, group, block, memory); });
    return static_cast<const char*>(nullptr);
  });
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_host(const Tensor& x, int64_t k, int64_t sign, bool return_u, double, bool save_state) {
  return decompose(x, k, sign, return_u, save_state, {shared_limit, nullptr});
}
Tensor backward_host(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s, const std::optional<Tensor>& grad_v,
                     const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v, const Tensor& state, double gap_eps) {
  return decompose_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, {shared_limit, nullptr});
}
Lists group_host(at::TensorList x, int64_t k, int64_t sign, bool return_u, at::ArrayRef<double>, bool save_state) {
  return decompose_group(x, k, sign, return_u, save_state, {shared_limit, nullptr});
}
std::vector<Tensor> group_backward_host(at::TensorList grad_u, at::TensorList grad_s, at::TensorList grad_v, at::TensorList x,
                                        at::TensorList u, at::TensorList s, at::TensorList v, at::TensorList state,
                                        at::ArrayRef<double> gap_eps) {
  return decompose_group_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, {shared_limit, nullptr});
}

// For tests: another amount of shared memory, another order of threads.
void set_host(int64_t limit, int64_t order) {
  shared_limit = limit;
  seed = order;
}

}  // namespace
}  // namespace kdkernels::truncated_svd::gpu

namespace kdkernels::align_singular_vectors::gpu {

namespace {
template <typename F>
void each_task(int64_t tasks, F f) {
  for (int64_t task = 0; task < tasks; ++task) {
    Cta<32> warp(static_cast<uint64_t>(task));
    f(warp, task);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_host(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                        bool flip_teacher) {
  return align(student, teacher, weight, flip_teacher, nullptr);
}
std::tuple<Tensor, Tensor, Tensor> backward_host(const std::optional<Tensor>& grad_student, const std::optional<Tensor>& grad_teacher,
                                                 const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                 const Tensor& match, const Tensor& flips, bool flip_teacher, std::array<bool, 3> wanted) {
  check_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, wanted);
  check_match(match, student.size(-1));
  return align_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, flip_teacher, wanted, nullptr);
}
}  // namespace

const char* launch_forward(const ForwardProblem& problem, bool wide, void*) {
  each_task(problem.batch * problem.k,
            [&](auto& warp, int64_t task) { wide ? forward<double>(warp, problem, task) : forward<float>(warp, problem, task); });
  return nullptr;
}
const char* launch_backward(const BackwardProblem& problem, bool wide, void*) {
  each_task(problem.batch * (problem.many + problem.k),
            [&](auto& warp, int64_t task) { wide ? backward<double>(warp, problem, task) : backward<float>(warp, problem, task); });
  return nullptr;
}

}  // namespace kdkernels::align_singular_vectors::gpu

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("_svd_host(int shared_limit, int order) -> ()", kdkernels::truncated_svd::gpu::set_host);
}

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("truncated_svd_cuda", kdkernels::truncated_svd::gpu::forward_host);
  m.impl("truncated_svd_backward_cuda", kdkernels::truncated_svd::gpu::backward_host);
  m.impl("truncated_svd_group_cuda", kdkernels::truncated_svd::gpu::group_host);
  m.impl("truncated_svd_group_backward_cuda", kdkernels::truncated_svd::gpu::group_backward_host);
  m.impl("align_singular_vectors_cuda", kdkernels::align_singular_vectors::gpu::forward_host);
  m.impl("align_singular_vectors_backward_cuda", kdkernels::align_singular_vectors::gpu::backward_host);
}
