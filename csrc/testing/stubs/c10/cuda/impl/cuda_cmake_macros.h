// Made by the build of a CUDA torch, and missing from a CPU build's headers: for `make lint`, which checks *_cuda.cpp where there is no
// CUDA torch.
#pragma once
