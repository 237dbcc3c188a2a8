"""For tests and benches: chooses the kernels that compute an op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .ops import checks
from .ops.truncated_svd_implementations import check_available, chosen
from .options import Implementation

__all__ = ["implementation"]


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Computes the ops that have several implementations with one of them, instead of the fastest
    that the device has. For tests and benches.

    The ops are ``truncated_svd``, ``truncated_svds``, ``feature_svd`` and
    ``align_singular_vectors``; others are not affected. The choice holds for calls of the current
    thread inside of the ``with`` block (or of the decorated function), and for the backwards of
    these calls wherever they run. Transforms of ``torch.func`` and second derivatives go through
    the reference as ever.

    Args:
        name: "cuda" (C++ kernels), "triton", "torch" (plain PyTorch), or "fastest", which is the
            default. On CPU tensors the first two run the bodies of the GPU kernels one thread after
            another, slowly; Triton's interpreter needs TRITON_INTERPRET=1 in the environment.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the implementation was not built, or Triton is not installed.
    """
    value = checks.option("implementation", name)
    check_available(Implementation(value))
    before = chosen.implementation
    chosen.implementation = value
    try:
        yield
    finally:
        chosen.implementation = before
