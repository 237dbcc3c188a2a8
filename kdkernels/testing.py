"""Choose which kernels compute an op, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .ops import checks
from .ops.truncated_svd_implementations import check_available, chosen
from .options import Implementation

__all__ = ["implementation"]


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Select one implementation of the ops that have several, instead of the fastest one for the
    device. For tests and benchmarks.

    The selection affects ``truncated_svd``, ``truncated_svds``, ``feature_svd`` and
    ``align_singular_vectors``, and no other op. Call it anew for each block. It applies to calls
    inside the ``with`` block (or the decorated function), and to the backward passes of these
    calls, even if they run later. As long as the block runs, it also applies to calls in other
    threads. ``torch.func`` transforms and second derivatives always use the reference.

    Args:
        name: "cuda" (CUDA C++ kernels), "triton", "torch" (plain PyTorch), or "fastest", the
            default. On CPU tensors, "cuda" and "triton" run the code of the GPU kernels one thread
            after another, which is slow. Triton's interpreter requires TRITON_INTERPRET=1 in the
            environment.

    Raises:
        ValueError: ``name`` is unknown.
        RuntimeError: the implementation was not built, or Triton is not installed.
    """
    value = checks.option("implementation", name)
    check_available(Implementation(value))
    previous = chosen.implementation
    chosen.implementation = value
    try:
        yield
    finally:
        chosen.implementation = previous
