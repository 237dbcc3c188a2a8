// The implementation "cuda" on CPU tensors, for tests: the Cta (cooperative thread array, a block
// of threads) of host_cta.h runs the bodies of the CUDA kernels, block after block. This is slow.
#include <torch/library.h>

#include <atomic>

#include "../align_singular_vectors/cta.h"
#include "../align_singular_vectors/cuda_problems.h"
#include "../common/parallel.h"
#include "../truncated_svd/cta/blocks.h"

namespace kdkernels::truncated_svd::gpu {
namespace {

// The shared memory that a block may have, in bytes, and the seed of the order of threads.
std::atomic<int64_t> shared_limit{227 << 10}, order_seed{1};

// The shared memory of a block. It starts as NaN, and is followed by a guard that kernels must not
// change.
class GuardedMemory {
 public:
  explicit GuardedMemory(int64_t size) : memory_(size + 2 * kGuard) { poison(memory_.data(), memory_.size()); }
  char* get() { return memory_.data() + (kGuard - reinterpret_cast<uintptr_t>(memory_.data()) % kGuard); }
  void check(int64_t size) {
    for (char* at = get() + size; at < memory_.data() + memory_.size(); ++at)
      if (*at != char(0xff)) throw std::logic_error("a kernel wrote past the end of its shared memory");
  }

 private:
  static constexpr int64_t kGuard = 64;
  std::vector<char> memory_;
};

// Calls run(cta, block, slot, shared) for every block and each of its slots (the matrices that
// share the block). The slots of a block run one after another.
template <int Threads, typename F>
void for_each_block(int64_t blocks, int slots, int64_t shared, F run) {
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      GuardedMemory memory(slots * shared);
      for (int slot = 0; slot < slots; ++slot) {
        Cta<Threads> cta(static_cast<uint64_t>(order_seed) * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(block * slots + slot));
        run(cta, block, slot, memory.get());
      }
      memory.check(slots * shared);
    }
  });
}

}  // namespace

const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void*) {
  return for_each_forward_group(problems, count, limit, [](const auto& group, auto t, auto threads, int64_t blocks, int64_t matrix_limit) {
    constexpr int kThreads = decltype(threads)::value;
    for_each_block<kThreads>(blocks, matrices_per_block(kThreads), matrix_limit, [&](auto& cta, int64_t block, int slot, char* memory) {
      forward_block<decltype(t)>(cta, group, block, slot, memory, matrix_limit);
    });
    return static_cast<const char*>(nullptr);
  });
}

const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void*) {
  for_each_solve_group(problems, count, limit, [](const auto& group, auto t, auto threads, int64_t blocks, int64_t matrix_limit) {
    constexpr int kThreads = decltype(threads)::value;
    for_each_block<kThreads>(blocks, matrices_per_block(kThreads), matrix_limit, [&](auto& cta, int64_t block, int slot, char* memory) {
      solve_block<decltype(t)>(cta, group, block, slot, memory, matrix_limit);
    });
    return static_cast<const char*>(nullptr);
  });
  return for_each_update_group(problems, count, [](const auto& group, auto t, int64_t blocks, int64_t shared) {
    for_each_block<kUpdateThreads>(
        blocks, 1, shared, [&](auto& cta, int64_t block, int, char* memory) { update_block<decltype(t)>(cta, group, block, memory); });
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

// Sets the amount of shared memory and the order of threads, for tests.
void set_host_options(int64_t limit, int64_t order) {
  shared_limit = limit;
  order_seed = order;
}

}  // namespace
}  // namespace kdkernels::truncated_svd::gpu

namespace kdkernels::align_singular_vectors::gpu {

namespace {
template <typename F>
void for_each_task(int64_t tasks, F f) {
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

const char* launch_forward(const ForwardProblem& problem, bool is_double, void*) {
  for_each_task(problem.batch * problem.k,
                [&](auto& warp, int64_t task) { is_double ? forward<double>(warp, problem, task) : forward<float>(warp, problem, task); });
  return nullptr;
}
const char* launch_backward(const BackwardProblem& problem, bool is_double, void*) {
  for_each_task(problem.batch * (problem.student_k + problem.k), [&](auto& warp, int64_t task) {
    is_double ? backward<double>(warp, problem, task) : backward<float>(warp, problem, task);
  });
  return nullptr;
}

}  // namespace kdkernels::align_singular_vectors::gpu

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("_svd_host(int shared_limit, int order) -> ()", kdkernels::truncated_svd::gpu::set_host_options);
}

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("truncated_svd_cuda", kdkernels::truncated_svd::gpu::forward_host);
  m.impl("truncated_svd_backward_cuda", kdkernels::truncated_svd::gpu::backward_host);
  m.impl("truncated_svd_group_cuda", kdkernels::truncated_svd::gpu::group_host);
  m.impl("truncated_svd_group_backward_cuda", kdkernels::truncated_svd::gpu::group_backward_host);
  m.impl("align_singular_vectors_cuda", kdkernels::align_singular_vectors::gpu::forward_host);
  m.impl("align_singular_vectors_backward_cuda", kdkernels::align_singular_vectors::gpu::backward_host);
}
