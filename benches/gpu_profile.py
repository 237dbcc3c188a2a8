"""Measures the kernels of the inputs of gpu_inputs.py on a GPU, beside their predicted times.

python -m benches.gpu_profile --out FILE

For each input: the time of each kernel, from torch's profiler; the time of a replayed CUDA graph of
the forward and the backward pass, which is without Python; and the time of the same calls from
Python, between two events, from an idle GPU. All are medians.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.files import replaced_atomically
from kdkernels.testing import implementation

from .gpu_inputs import CASES, Case
from .gpu_page import significant
from .gpu_predictions import device_named, total
from .machine import commit
from .suite import captured
from .timing import time_interleaved

CALLS = 10  # profiled calls of each input
COPY_BYTES = 1 << 30


def call_of(case: Case, device: str = "cuda") -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that computes the gradients of a case on random inputs."""
    dtype = getattr(torch, case.dtype)

    def leaf(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)

    def features(grad: bool) -> Tensor:
        x = torch.randn(case.shape, device=device).relu().to(dtype)
        return (x.to(memory_format=torch.channels_last) if case.option("channels_last") else x).requires_grad_(grad)

    loss: Callable[[], Tensor]
    if case.kind == "kl":
        student, teacher = leaf(*case.shape), leaf(*case.shape, grad=False)
        leaves, dim = [student], 1 if len(case.shape) > 2 else -1
        direction = case.option("direction", "forward")
        loss = lambda: kdkernels.temperature_kl(student, teacher, 4.0, dim=dim, direction=direction)  # noqa: E731
    elif case.kind == "transfer":
        student, teacher = features(True), features(False)
        leaves = [student]
        loss = lambda: kdkernels.attention_transfer_loss(student, teacher, p=case.option("p", 2.0))  # noqa: E731
    elif case.kind == "pool":
        x = features(True)
        leaves = [x]
        loss = lambda: kdkernels.attention_pool(x, normalize="l2").sum()  # noqa: E731
    elif case.kind in ("rbf loss", "correlation"):
        batch, m, n, columns = case.shape
        # Singular vectors, which trainers correlate, have unit length.
        vectors = (torch.nn.functional.normalize(torch.randn(batch, length, columns, device=device), dim=1) for length in (m, n, m, n))
        sx, sy, tx, ty = (x.requires_grad_(i < 2) for i, x in enumerate(vectors))
        leaves = [sx, sy]
        if case.kind == "rbf loss":
            loss = lambda: kdkernels.rbf_correlation_loss(sx, sy, tx, ty)  # noqa: E731
        else:
            loss = lambda: kdkernels.rbf_correlation(sx, sy).sum()  # noqa: E731
    elif case.kind == "svd":
        batch, rows, columns, k = case.shape
        x = torch.randn(batch, columns, rows, device=device).relu().mT.detach().requires_grad_()
        leaves, decompose = [x], implementation(case.implementation)(kdkernels.truncated_svd)
        weights = torch.randn(batch, columns, k, device=device), torch.randn(batch, k, device=device)

        def loss() -> Tensor:
            _, s, v = decompose(x, k)
            return (v * weights[0]).sum() + (s * weights[1]).sum()

    else:
        batch, n, student_count, k = case.shape
        student, teacher, weight = leaf(batch, n, student_count), leaf(batch, n, k, grad=False), torch.rand(batch, k, device=device)
        leaves, align = [student], implementation(case.implementation)(kdkernels.align_singular_vectors)
        loss = lambda: align(student, teacher, weight)[0].sum()  # noqa: E731

    return lambda: torch.autograd.grad(loss(), leaves)


def kernel_times(run: Callable[[], object], calls: int = CALLS) -> dict[str, float]:
    """Return the median microseconds of each kernel in a call; a kernel that runs n times counts n
    times.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.profiler.DeviceType.CUDA:
            found[_short(event.name)].append(event.device_time_total)
    return {name: statistics.median(times) * round(len(times) / calls, 2) for name, times in found.items() if len(times) >= calls // 2}


def _short(name: str) -> str:
    """Return the name of a kernel without namespaces and arguments."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").partition("(")[0]
    base, bracket, arguments = name.partition("<")
    return (base.rpartition("::")[2] + bracket + re.sub(r"\w+::", "", arguments))[:60]


def elapsed(run: Callable[[], object]) -> float:
    """Return the median microseconds of a call, between two events, from an idle GPU."""
    return statistics.median(time_interleaved({"call": run}, rounds=20, device="cuda")["call"]) * 1e6


def measure(case: Case) -> dict[str, Any]:
    run = call_of(case)
    for _ in range(3):  # compiles the kernels
        run()
    row: dict[str, Any] = {"name": case.name, "kernels": kernel_times(run), "eager": elapsed(run)}
    try:
        row["replayed"] = elapsed(captured(run, 1))
    except RuntimeError as error:
        row["error"] = str(error)[:200]
    return row


def copy_rate() -> float:
    """Return the bytes per second, read and written, of a copy of COPY_BYTES."""
    x = torch.empty(COPY_BYTES // 4, device="cuda")
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * COPY_BYTES / elapsed(lambda: y.copy_(x)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FILE", help="a file for the results, JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="only inputs whose names contain TEXT")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benches.gpu_profile needs a GPU, and torch finds none")
    if not any(options.only in case.name for case in CASES):
        raise SystemExit(f"--only: no input contains {options.only!r}")
    device = device_named(torch.cuda.get_device_name())
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit(), "copy": copy_rate(), "rows": []}
    print(f"{result['gpu']}, copy {result['copy'] / 1e12:.2f} TB/s; microseconds: kernels, replayed, eager, predicted")
    for case in CASES:
        if options.only not in case.name:
            continue
        try:
            row = measure(case)
        except Exception as error:  # a failure of one input must not lose the others
            row = {"name": case.name, "error": f"{type(error).__name__}: {error}"[:300], "kernels": {}}
        result["rows"].append(row)
        predicted = significant(total(case, device) * 1e6) if device else "-"
        kernels = ", ".join(f"{name} {significant(time)}" for name, time in sorted(row["kernels"].items(), key=lambda x: -x[1])[:6])
        numbers = [significant(x) if x else "-" for x in (sum(row["kernels"].values()), row.get("replayed"), row.get("eager"))]
        print(f"{case.name}: {' '.join(map(str, numbers))} {predicted} | {kernels} {row.get('error', '')}", flush=True)
        torch.cuda.empty_cache()
        with replaced_atomically(options.out) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
