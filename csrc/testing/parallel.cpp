// kdkernels::_parallel_for(count, grain, slow, fault): how parallel_for processed each index.
#include "../common/parallel.h"

#include <ATen/ops/full.h>
#include <torch/library.h>

#include <chrono>
#include <thread>

namespace kdkernels {
namespace {

// Returns, each [count], the thread that processed an index, the first index of its range, and how
// often the index was processed. Thread `slow` first waits until the other threads have had time for
// everything else; -1: no thread waits. Index `fault` raises a ValueError; -1: none does. The
// last result is the number of states that were made.
std::tuple<at::Tensor, at::Tensor, at::Tensor, int64_t> parallel_visits(int64_t count, int64_t grain, int64_t slow, int64_t fault) {
  const at::Tensor thread = at::full({count}, -1, at::kLong), range = at::full({count}, -1, at::kLong),
                   visits = at::full({count}, 0, at::kLong);
  int64_t *threads = thread.mutable_data_ptr<int64_t>(), *ranges = range.mutable_data_ptr<int64_t>(),
          *counts = visits.mutable_data_ptr<int64_t>();
  std::atomic<int64_t> states = 0;
  std::atomic<bool> waited = false;
  auto make_state = [&] { return ++states; };
  parallel_for(0, count, grain, make_state, [&](int64_t&, int64_t begin, int64_t end) {
    if (at::get_thread_num() == slow && !waited.exchange(true)) std::this_thread::sleep_for(std::chrono::milliseconds(500));
    for (int64_t i = begin; i < end; ++i) {
      TORCH_CHECK_VALUE(i != fault, "index ", i, " is the fault");
      threads[i] = at::get_thread_num();
      ranges[i] = begin;
      ++counts[i];
    }
  });
  return {thread, range, visits, states.load()};
}

}  // namespace
}  // namespace kdkernels

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("_parallel_for(int count, int grain, int slow, int fault) -> (Tensor thread, Tensor range, Tensor visits, int states)",
        kdkernels::parallel_visits);
}
