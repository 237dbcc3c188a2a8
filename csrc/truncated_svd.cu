// The kernels of truncated_svd and align_singular_vectors on CUDA. Their bodies are in truncated_svd_cta/.
#include "truncated_svd_launch.h"

#include <type_traits>

#include "truncated_svd_cta/blocks.h"

namespace kdkernels::truncated_svd::gpu {
namespace {

constexpr int block_size(int threads) {
  return threads * matrices_together(threads);
}

template <typename T, int Threads>
__global__ void __launch_bounds__(block_size(Threads), 1)
    forward_kernel(const __grid_constant__ Group<ForwardProblem> group, int64_t limit) {
  extern __shared__ __align__(16) char shared[];
  const int part = threadIdx.x / Threads;
  Cta<Threads> cta(shared + part * limit);
  forward_block<T>(cta, group, blockIdx.x, part, shared, limit);
}

template <typename T, int Threads>
__global__ void __launch_bounds__(block_size(Threads), 1)
    solve_kernel(const __grid_constant__ Group<BackwardProblem> group, int64_t limit) {
  extern __shared__ __align__(16) char shared[];
  const int part = threadIdx.x / Threads;
  Cta<Threads> cta(shared + part * limit);
  solve_block<T>(cta, group, blockIdx.x, part, shared, limit);
}

template <typename T>
__global__ void __launch_bounds__(kUpdateThreads) update_kernel(const __grid_constant__ Group<BackwardProblem> group) {
  extern __shared__ __align__(16) char shared[];
  Cta<kUpdateThreads> cta(shared);
  update_block<T>(cta, group, blockIdx.x, shared);
}

template <typename Kernel, typename... Arguments>
const char* launch(Kernel kernel, int64_t blocks, int threads, int64_t shared, void* stream, Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Problem>
int size_of(const Problem& problem) {  // of the numbers that are computed with
  return problem.x.storage == Storage::float64 ? 8 : 4;
}

// f(T()) of the type that computes a storage type
template <typename F>
const char* with_type(Storage storage, F f) {
  return storage == Storage::float64 ? f(double()) : f(float());
}
// f(T(), threads) of the types that compute a problem: only what threads_for can give.
template <typename Problem, typename F>
const char* with_kernel(const Problem& problem, F f) {
  const int threads = threads_for(problem.p, size_of(problem));
  return with_type(problem.x.storage, [&](auto t) {
    if (threads == 32) return f(t, std::integral_constant<int, 32>());
    if constexpr (sizeof(t) == 4)
      if (threads == 512) return f(t, std::integral_constant<int, 512>());
    return f(t, std::integral_constant<int, 256>());
  });
}

// Puts problems into groups of one kernel each: f(group, indices) for every group.
template <typename Problem, typename Key, typename Blocks, typename F>
const char* in_groups(const Problem* problems, int count, Key key, Blocks blocks, F f) {
  for (int i = 0; i < count; ++i) {
    bool done = false;
    for (int before = 0; before < i; ++before) done = done || key(problems[before]) == key(problems[i]);
    if (done) continue;
    for (int next = i; next < count;) {
      Group<Problem> group{};
      for (; next < count && group.count < kMaxProblems; ++next) {
        if (key(problems[next]) != key(problems[i])) continue;
        group.problems[group.count] = problems[next];
        group.first_block[group.count + 1] = group.first_block[group.count] + blocks(problems[next]);
        ++group.count;
      }
      if (const char* error = f(group)) return error;
    }
  }
  return nullptr;
}

template <typename Problem>
int64_t matrix_blocks(const Problem& problem) {
  const int together = matrices_together(threads_for(problem.p, size_of(problem)));
  return (problem.batch + together - 1) / together;
}
template <typename Problem>
int kernel_key(const Problem& problem) {
  return threads_for(problem.p, size_of(problem)) * 2 + (problem.x.storage == Storage::float64);
}
// What a group needs of shared memory, and the part of each matrix.
template <typename Problem, typename F>
int64_t largest(const Group<Problem>& group, F f) {
  int64_t most = 0;
  for (int i = 0; i < group.count; ++i) most = f(group.problems[i]) > most ? f(group.problems[i]) : most;
  return most;
}

}  // namespace

const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void* stream) {
  return in_groups(problems, count, kernel_key<ForwardProblem>, matrix_blocks<ForwardProblem>, [&](const Group<ForwardProblem>& group) {
    return with_kernel(group.problems[0], [&](auto t, auto threads) {
      const int64_t own = limit_for(group.problems[0].p, sizeof(decltype(t)), limit);
      // A matrix's part begins where the one before ends: as far as the largest plan goes.
      const int64_t shared = largest(group, [&](const ForwardProblem& m) { return forward_plan<decltype(t)>(m.p, m.k, own).shared(); });
      return launch(forward_kernel<decltype(t), decltype(threads)::value>, group.first_block[group.count], block_size(threads),
                    shared * matrices_together(threads), stream, group, shared);
    });
  });
}

const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void* stream) {
  const char* error =
      in_groups(problems, count, kernel_key<BackwardProblem>, matrix_blocks<BackwardProblem>, [&](const Group<BackwardProblem>& group) {
        return with_kernel(group.problems[0], [&](auto t, auto threads) {
          const int64_t own = limit_for(group.problems[0].p, sizeof(decltype(t)), limit);
          const int64_t shared =
              largest(group, [&](const BackwardProblem& m) { return backward_plan<decltype(t)>(m.p, m.k, own).shared(); });
          return launch(solve_kernel<decltype(t), decltype(threads)::value>, group.first_block[group.count], block_size(threads),
                        shared * matrices_together(threads), stream, group, shared);
        });
      });
  if (error) return error;
  return in_groups(
      problems, count, [](const BackwardProblem& m) { return m.x.storage == Storage::float64; }, update_blocks,
      [&](const Group<BackwardProblem>& group) {
        return with_type(group.problems[0].x.storage, [&](auto t) {
          const int64_t shared = largest(group, [&](const BackwardProblem& m) { return update_shared<decltype(t)>(m.p, m.k); });
          return launch(update_kernel<decltype(t)>, group.first_block[group.count], kUpdateThreads, shared, stream, group);
        });
      });
}

}  // namespace kdkernels::truncated_svd::gpu

namespace kdkernels::align_singular_vectors::gpu {
namespace {

constexpr int kWarps = 4;

template <typename T, bool Backward, typename Problem>
__global__ void __launch_bounds__(32 * kWarps) align_kernel(const __grid_constant__ Problem problem, int64_t tasks) {
  const int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (task >= tasks) return;
  Cta<32> warp(nullptr);
  if constexpr (Backward)
    backward<T>(warp, problem, task);
  else
    forward<T>(warp, problem, task);
}

template <bool Backward, typename Problem>
const char* launch(const Problem& problem, bool wide, int64_t tasks, void* stream) {
  const unsigned blocks = static_cast<unsigned>((tasks + kWarps - 1) / kWarps);
  if (wide)
    align_kernel<double, Backward><<<blocks, 32 * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(problem, tasks);
  else
    align_kernel<float, Backward><<<blocks, 32 * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(problem, tasks);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_forward(const ForwardProblem& problem, bool wide, void* stream) {
  return launch<false>(problem, wide, problem.batch * problem.k, stream);
}
const char* launch_backward(const BackwardProblem& problem, bool wide, void* stream) {
  return launch<true>(problem, wide, problem.batch * (problem.many + problem.k), stream);
}

}  // namespace kdkernels::align_singular_vectors::gpu
