// The modules that contain the ops for tests; importing one registers its ops. kdkernels._testing
// has the CUDA kernels on the host, kdkernels._testing_<isa> has the stages of the CPU kernels for
// one instruction set.
#include "../common/module.h"

KDKERNELS_MODULE(TORCH_EXTENSION_NAME, "ops of kdkernels for its tests", nullptr)
