// Functions of kernel bodies, which nvcc compiles for the GPU and any other compiler for tests on the
// CPU.
#pragma once

#ifdef __CUDACC__
// For functions of the host and the GPU.
#define KDKERNELS_HOST_DEVICE __host__ __device__ constexpr
// For those that are not constexpr because they take square roots.
#define KDKERNELS_HOST_DEVICE_INLINE __host__ __device__ inline
#define KDKERNELS_GPU __device__ __forceinline__
#define KDKERNELS_STAGE __device__ __noinline__  // a separate function, so that the caller needs few registers
// Tells the compiler that a pointer points to shared memory, which it cannot deduce across the call
// of a stage.
#define KDKERNELS_SHARED(pointer) __builtin_assume(__isShared(pointer))
#define KDKERNELS_UNROLL _Pragma("unroll")
#else
#define KDKERNELS_HOST_DEVICE constexpr
#define KDKERNELS_HOST_DEVICE_INLINE inline
#define KDKERNELS_GPU inline
#define KDKERNELS_STAGE inline
#define KDKERNELS_SHARED(pointer) static_cast<void>(pointer)
#define KDKERNELS_UNROLL
#endif
