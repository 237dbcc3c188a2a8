// kdkernels::_cta_check(fault, order): kernel bodies with one fault each, with which tests check
// that the Cta (cooperative thread array, a block of threads) of host_cta.h detects the fault.
#include <torch/library.h>

#include <limits>

#include "../common/check.h"
#include "../common/cta.h"

namespace kdkernels {
namespace {

constexpr int kThreads = 256;

// A body without a fault gives the same numbers in every order of threads. With a fault, the
// numbers differ between orders or are NaN, or the body throws.
std::vector<double> run(const std::string& fault, int64_t order) {
  Cta<kThreads> cta(static_cast<uint64_t>(order));
  std::vector<float> shared(2 * kThreads), global(kThreads, 1.0f);
  poison(shared.data(), shared.size() * sizeof(float));
  float *x = shared.data(), *y = x + kThreads;
  if (fault == "a value all threads read is written") {
    cta.each(kThreads, [&](int i) { x[i] = 1; });
    const float first = cta.read(x[0]);
    cta.each(kThreads, [&](int i) { x[i] = 2 * first; });
  } else if (fault == "no barrier between neighbours") {
    cta.each(kThreads, [&](int i) { x[i] = static_cast<float>(i); });
    cta.each(kThreads - 1, [&](int i) { x[i] += x[i + 1]; });
  } else if (fault == "shared memory is read before it is written") {
    cta.each(kThreads - 1, [&](int i) { x[i] = 1; });
    cta.each(kThreads, [&](int i) { x[i] += 1; });
  } else if (fault == "a copy is read before it arrives") {
    for (int i = 0; i < kThreads; ++i) cta.copy_async(x + i, global.data() + i, true);
    cta.commit();
    cta.each(kThreads, [&](int i) { y[i] = x[i]; });
    cta.wait<0>();
    cta.each(kThreads, [&](int i) { x[i] = y[i]; });
  } else {
    TORCH_CHECK_VALUE(fault == "none", "fault must be \"none\" or one of the faults of csrc/testing/host_cta_faults.cpp, got \"", fault,
                      "\"");
    for (int i = 0; i < kThreads; ++i) cta.copy_async(x + i, global.data() + i, i % 2 == 0);
    cta.commit();
    cta.wait<0>();
    const float total = cta.sum<float>(kThreads, [&](int i) { return x[i]; });
    PerThread<float> per_thread;
    cta.threads([&](int t) { per_thread[t] = x[(t + 1) % kThreads] + total; });
    cta.threads([&](int t) { x[t] = per_thread[t]; });
    cta.warps(4, [&](const Warp& warp, int w) {
      const float largest = warp.max<float>(0.0f, 64, [&](int i) { return x[64 * w + i]; });
      warp.each(64, [&](int i) { x[64 * w + i] /= largest; });
    });
  }
  return {x, x + kThreads};
}

}  // namespace
}  // namespace kdkernels

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("_cta_check(str fault, int order) -> float[]", kdkernels::run);
}
