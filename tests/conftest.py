import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported

import pytest
from hypothesis import HealthCheck, settings

# Fills every torch.empty with NaN, those made in C++ too: an output that a kernel does not write is found.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
# Workers that share the machine (pytest -n) have a core each: threads that wait for one another's turn take longer than one alone.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

settings.register_profile("kdkernels", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kdkernels")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# Implementations of truncated_svd: device and name. On the CPU the CUDA kernels' bodies run on the host; Triton's, which the interpreter is slow
# with, have tests of their own.
SVD_BACKENDS = [("cpu", "fastest"), ("cpu", "cuda")]
if torch.cuda.is_available():
    # Not "torch": its float32 is torch's own, which does not keep the bounds of the kernels; test_the_route_in_plain_torch has what it must hold.
    SVD_BACKENDS += [("cuda", name) for name in ("fastest", "cuda", "triton")]


class SVD:
    """truncated_svd and its relatives by one implementation."""

    def __init__(self, device: str, implementation: str):
        import kdkernels
        from kdkernels.testing import implementation as by

        self.device, self.implementation = device, implementation
        self.features = by(implementation)(kdkernels.feature_svd)
        self.align = by(implementation)(kdkernels.align_singular_vectors)
        self.decompose = by(implementation)(kdkernels.truncated_svd)
        self.decompose_all = by(implementation)(kdkernels.truncated_svds)

    def __call__(self, *args, **options):
        return self.decompose(*args, **options)

    def takes(self, m: int, n: int, k: int) -> bool:
        """Whether this implementation has room for such matrices; "torch" and "fastest" have for all."""
        if self.implementation != "triton":
            return True
        from kdkernels.triton.svd_sizes import fits

        return fits(min(m, n), k)


def svd_backend(device: str, implementation: str) -> SVD:
    from kdkernels.config import HAS_CUDA_KERNELS

    if (device, implementation) == ("cuda", "cuda") and not HAS_CUDA_KERNELS:
        pytest.skip("the CUDA kernels were not built")
    if (device, implementation) == ("cpu", "cuda"):
        import testing_ops  # noqa: F401  registers the CUDA kernels on CPU tensors
    return SVD(device, implementation)


@pytest.fixture(params=SVD_BACKENDS, ids=lambda p: f"{p[0]}-{p[1]}")
def svd(request):
    return svd_backend(*request.param)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
