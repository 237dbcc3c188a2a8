"""Hardware limits, measured in the same run as the rows, and the peak memory of a call."""

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
SECONDS = 0.01 if os.environ.get("KDKERNELS_BENCH") == "smoke" else 0.3  # time for the measurement of a rate


def seconds_for(rate: str, amount: float, device: str) -> float:
    """Return the seconds that ``amount`` takes at a rate of the machine.

    The amount is the number of bytes read and written ("copy"), of operations ("GEMM", "GEMM
    float64") or of float32 exponentials ("exp").
    """
    if rate == "copy":
        return copy_seconds(max(4, int(amount) // 2), device)
    return amount / (exp_rate(device) if rate == "exp" else gemm_rate(device, torch.float64 if rate.endswith("64") else torch.float32))


def _median(call: Callable[[], object], device: str) -> float:
    return statistics.median(time_interleaved({"": call}, seconds=SECONDS, device=device)[""])


@functools.lru_cache(maxsize=64)
def copy_seconds(nbytes: int, device: str) -> float:
    """Measure the median time to copy ``nbytes`` bytes, which moves twice as many bytes."""
    source = torch.ones(max(1, nbytes // 4), device=device)
    target = torch.empty_like(source)
    return _median(lambda: target.copy_(source), device)


@functools.cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the operations per second of a product of 1024 x 1024 matrices (on a GPU 8192 x
    8192).

    The product has torch's default precision.
    """
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    return 2 * n**3 / _median(lambda: torch.mm(a, b), device)


@functools.cache
def exp_rate(device: str) -> float:
    """Measure the float32 exponentials per second of torch.exp, on a CPU with data in a cache."""
    x = torch.rand(1 << (26 if device == "cuda" else 17), device=device)
    out = torch.empty_like(x)
    return x.numel() / _median(lambda: torch.exp(x, out=out), device)


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Measure the peak memory of a call above the memory in use before it, with its results.

    The call must have run before. On a GPU, the memory of torch's allocator is measured. On a CPU,
    all resident pages are measured; memory left behind by freed tensors is first returned to the
    system, so that the call takes new pages for all that it uses. As pages have 4 KiB and threads
    update the count in batches, less than a megabyte cannot be distinguished from zero. On a CPU
    the result is ``None`` if the system is not Linux or does not report the peak.
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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # a function of glibc
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
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
