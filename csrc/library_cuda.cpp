// The extension module with the CUDA kernels. Importing it registers the kernels.
#include "common/module.h"

KDKERNELS_MODULE(TORCH_EXTENSION_NAME, "CUDA kernels of kdkernels", nullptr)
