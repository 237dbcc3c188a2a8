// Functions of kernel bodies, which nvcc compiles for the GPU and any other compiler for tests on the
// CPU.
#pragma once

#ifdef __CUDACC__
#define KDKERNELS_GPU __device__ __forceinline__
#define KDKERNELS_ANYWHERE __host__ __device__ __forceinline__  // on the host and the GPU
#define KDKERNELS_STAGE __device__ __noinline__                 // a separate function, so that the caller needs few registers
// Tells the compiler that a pointer points to shared memory, which it cannot deduce across the call
// of a stage.
#define KDKERNELS_SHARED(pointer) __builtin_assume(__isShared(pointer))
#define KDKERNELS_UNROLL _Pragma("unroll")
#else
#define KDKERNELS_GPU inline
#define KDKERNELS_ANYWHERE inline
#define KDKERNELS_STAGE inline
#define KDKERNELS_SHARED(pointer) static_cast<void>(pointer)
#define KDKERNELS_UNROLL
#endif
