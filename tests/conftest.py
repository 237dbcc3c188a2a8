import gc
import os
import re
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported

import pytest
from hypothesis import HealthCheck, settings

# Fill every uninitialized tensor with NaN, also in C++, to detect outputs that a kernel does not
# write.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
# Workers of pytest -n share the cores, so each uses one thread: several threads per core would be
# slower.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

settings.register_profile("kdkernels", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kdkernels")

# The tests that `make test` leaves out: a line is the beginning of a test's name, with * for any
# text.
SLOW_TESTS = {
    line: re.compile(re.escape(line).replace(r"\*", ".*"))
    for line in (Path(__file__).parent / "slow_tests.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` is applied
def pytest_collection_modifyitems(config, items):
    found = set()
    for item in items:
        test = f"{item.path.name}{item.nodeid[item.nodeid.index('::') :]}"
        lines = {line for line, pattern in SLOW_TESTS.items() if pattern.match(test)}
        if lines:
            item.add_marker("slow")
            found |= lines
    files = {item.path.name for item in items}
    unknown = [line for line in SLOW_TESTS if line not in found and line.partition("::")[0] in files]
    if unknown and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/slow_tests.txt: there is no test {unknown[0]!r}")


def pytest_collection_finish():
    # Otherwise each collection by gc would visit a million objects of imported modules.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# Implementations of truncated_svd: device and name. On the CPU the bodies of the CUDA kernels run
# on the host. The Triton kernels have separate tests, because the interpreter is slow.
SVD_BACKENDS = [("cpu", "fastest"), ("cpu", "cuda")]
if torch.cuda.is_available():
    # "torch" is not in the list: its float32 results are those of torch.linalg, and exceed the
    # error bounds of the kernels. test_implementation_in_plain_torch checks it.
    SVD_BACKENDS += [("cuda", name) for name in ("fastest", "cuda", "triton")]


class SVD:
    """truncated_svd and its related functions with one implementation."""

    def __init__(self, device: str, implementation: str):
        import kdkernels
        from kdkernels.testing import implementation as use_implementation

        self.device, self.implementation = device, implementation
        self.features = use_implementation(implementation)(kdkernels.feature_svd)
        self.align = use_implementation(implementation)(kdkernels.align_singular_vectors)
        self.decompose = use_implementation(implementation)(kdkernels.truncated_svd)
        self.decompose_all = use_implementation(implementation)(kdkernels.truncated_svds)

    def __call__(self, *args, **options):
        return self.decompose(*args, **options)

    def supports(self, m: int, n: int, k: int) -> bool:
        """Return whether this implementation supports matrices of this size. "torch" and "fastest"
        support all sizes.
        """
        if self.implementation != "triton":
            return True
        from kdkernels.triton.svd_sizes import fits

        return fits(min(m, n), k)


def make_svd(device: str, implementation: str) -> SVD:
    from kdkernels.config import HAS_CUDA_KERNELS

    if (device, implementation) == ("cuda", "cuda") and not HAS_CUDA_KERNELS:
        pytest.skip("the CUDA kernels were not built")
    if (device, implementation) == ("cpu", "cuda"):
        import testing_ops  # noqa: F401  registers the CUDA kernels on CPU tensors
    return SVD(device, implementation)


@pytest.fixture(params=SVD_BACKENDS, ids=lambda p: f"{p[0]}-{p[1]}")
def svd(request):
    return make_svd(*request.param)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
