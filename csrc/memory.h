// Allocation of large results.
#pragma once

#include <ATen/ops/empty_like.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdkernels {

// A fresh result of many megabytes costs a page fault per 4 KiB, more time than the arithmetic of a memory-bound kernel. Where the system
// lets programs ask (transparent huge pages set to `madvise`, the default of most distributions), 2 MiB pages make that 512 times rarer.
inline at::Tensor empty_like_on_huge_pages(const at::Tensor& x) {
  at::Tensor out = at::empty_like(x);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + out.nbytes()) / huge * huge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
  return out;
}

}  // namespace kdkernels
