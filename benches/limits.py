"""What the machine can do, measured in the run whose rows are held against it, and how much memory a call takes."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import kdkernels

from .timing import time_interleaved

RATES = ("copy", "GEMM", "GEMM float64", "exp")
SECONDS = 0.01 if os.environ.get("KDKERNELS_BENCH") == "smoke" else 0.3  # for each rate


def seconds_for(rate: str, amount: float, device: str) -> float:
    """Seconds for so many bytes ("copy": read and written, together), operations ("GEMM") or exponentials of float32 ("exp")."""
    if rate == "copy":
        return copy_seconds(max(4, int(amount) // 2), device)
    return amount / (exp_rate(device) if rate == "exp" else gemm_rate(device, torch.float64 if rate.endswith("64") else torch.float32))


def _median(call: Callable[[], object], device: str) -> float:
    return statistics.median(time_interleaved({"": call}, seconds=SECONDS, device=device)[""])


@functools.lru_cache(maxsize=64)
def copy_seconds(nbytes: int, device: str) -> float:
    """Median time of Tensor.copy_ of a tensor of nbytes; twice as many move."""
    source = torch.ones(max(1, nbytes // 4), device=device)
    target = torch.empty_like(source)
    return _median(lambda: target.copy_(source), device)


@functools.cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a product of matrices of 1024 x 1024 (on a GPU 8192 x 8192), in the precision that torch uses by default."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    return 2 * n**3 / _median(lambda: torch.mm(a, b), device)


@functools.cache
def exp_rate(device: str) -> float:
    """Exponentials a second of torch.exp on float32, in a cache on a CPU."""
    x = torch.rand(1 << (26 if device == "cuda" else 17), device=device)
    out = torch.empty_like(x)
    return x.numel() / _median(lambda: torch.exp(x, out=out), device)


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call, which has run before, takes at its peak over what was in use, its results with them; None where no system tells.

    On a GPU what torch's allocator has given out. On a CPU resident pages, whoever asked for them: what freed tensors left behind is given
    back to the system first, so that the call has to take pages for all it uses. A page is 4 KiB, and threads count in batches: what is below a
    megabyte is not told from nothing.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    kdkernels.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)
