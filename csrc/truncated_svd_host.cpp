// driver="cuda" on CPU tensors: the bodies of the CUDA kernels run by the Cta of cta_host.h, block by block. For tests; it is slow.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <random>

#include "truncated_svd_cta/blocks.h"
#include "truncated_svd_cta/torch.h"

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

// run(cta, block, part, shared) for every block and each part of it.
template <int Threads, typename F>
void over_blocks(int64_t blocks, int parts, int64_t shared, F run) {
  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Shared memory(shared);
      Cta<Threads> cta(static_cast<uint64_t>(seed) * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(task));
      run(cta, task / parts, memory.get());
      memory.check(shared);
    }
  });
}

template <typename Problem>
Group<Problem> alone(const Problem& problem, int64_t blocks) {
  Group<Problem> group{};
  group.problems[0] = problem;
  group.first_block[1] = blocks;
  group.count = 1;
  return group;
}

template <typename F>
void with_kernel(int p, Storage storage, F f) {
  const int threads = threads_for(p, storage == Storage::float64 ? 8 : 4);
  auto narrow_or_not = [&](auto type) {
    if (threads == 32) return f(std::integral_constant<int, 32>(), type);
    if constexpr (sizeof(type) == 4)
      if (threads == 512) return f(std::integral_constant<int, 512>(), type);
    return f(std::integral_constant<int, 256>(), type);
  };
  storage == Storage::float64 ? narrow_or_not(double()) : narrow_or_not(float());
}

}  // namespace

const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void*) {
  for (int i = 0; i < count; ++i) {
    const ForwardProblem& m = problems[i];
    with_kernel(m.p, m.x.storage, [&](auto threads, auto type) {
      using T = decltype(type);
      // Parts of a block run one by one, each as part 0 of a block of its own.
      const int64_t own = limit_for(m.p, sizeof(T), limit), shared = forward_plan<T>(m.p, m.k, own).shared();
      over_blocks<decltype(threads)::value>(m.batch, 1, shared,
                                            [&](auto& cta, int64_t b, char* memory) { forward<T>(cta, m, b, memory, own); });
    });
  }
  return nullptr;
}

const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void*) {
  for (int i = 0; i < count; ++i) {
    const BackwardProblem& m = problems[i];
    with_kernel(m.p, m.x.storage, [&](auto threads, auto type) {
      using T = decltype(type);
      const int64_t own = limit_for(m.p, sizeof(T), limit), shared = backward_plan<T>(m.p, m.k, own).shared();
      over_blocks<decltype(threads)::value>(m.batch, 1, shared,
                                            [&](auto& cta, int64_t b, char* memory) { solve<T>(cta, m, b, memory, own); });
      const Group<BackwardProblem> group = alone(m, update_blocks(m));
      over_blocks<kUpdateThreads>(update_blocks(m), 1, update_shared<T>(m.p, m.k),
                                  [&](auto& cta, int64_t block, char* memory) { update_block<T>(cta, group, block, memory); });
    });
  }
  return nullptr;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_host(const Tensor& x, int64_t k, c10::string_view sign, bool return_u, double,
                                                        bool save_state) {
  return decompose(x, k, sign, return_u, save_state, shared_limit, nullptr);
}
Tensor backward_host(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s, const std::optional<Tensor>& grad_v,
                     const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v, const Tensor& state, double gap_eps) {
  return decompose_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, shared_limit, nullptr);
}

// For tests: another amount of shared memory, another order of threads.
void set_host(int64_t limit, int64_t order) {
  shared_limit = limit;
  seed = order;
}

// Whether the CUDA kernels can take p x q matrices with so much shared memory for a block.
bool fits(int64_t p, int64_t k, bool wide, int64_t limit) {
  const int side = static_cast<int>(p), kept = static_cast<int>(k);
  auto has_room = [&](auto type) {
    using T = decltype(type);
    return forward_need<T>(side, kept, limit).shared <= limit && backward_need<T>(side, kept, limit).shared <= limit;
  };
  return p <= kMaxSide && (wide ? has_room(double()) : has_room(float()));
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
  m.def("_svd_fits(int p, int k, bool wide, int shared_memory) -> bool", kdkernels::truncated_svd::gpu::fits);
  m.def("_svd_host(int shared_limit, int order) -> ()", kdkernels::truncated_svd::gpu::set_host);
}

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("truncated_svd_cuda", kdkernels::truncated_svd::gpu::forward_host);
  m.impl("truncated_svd_backward_cuda", kdkernels::truncated_svd::gpu::backward_host);
  m.impl("align_singular_vectors_cuda", kdkernels::align_singular_vectors::gpu::forward_host);
  m.impl("align_singular_vectors_backward_cuda", kdkernels::align_singular_vectors::gpu::backward_host);
}
