"""Runs every CUDA kernel with various shapes, for compute-sanitizer and ncu.

Usage: python exercise_cuda.py [--device cpu] [--large]. With --device cpu the same calls run the
bodies of the kernels on the host, to test this script.
"""

import argparse
import itertools

import torch
from long_rows import run_long_rows
from matrix_cases import named_matrices, with_layout

from kdkernels import align_singular_vectors, truncated_svd
from kdkernels.testing import implementation

# One warp, several warps and the widest blocks; tall and wide matrices; k larger than the number of
# vectors that the kernels keep together.
SHAPES = [(1, 1, 1), (20, 12, 3), (12, 40, 9), (40, 33, 4), (66, 70, 12), (130, 150, 2)]


def exercise(device: str, large: bool) -> int:
    if device == "cpu":
        import testing_ops  # noqa: F401  registers the implementation "cuda" on CPU tensors
    calls = 0
    for m, n, k in [(1024, 64, 4), (784, 128, 4), (64, 256, 4)] if large else SHAPES:
        named = {"relu": torch.randn(128, m, n).relu()} if large else named_matrices(m, n)
        for name in ("relu", "graded", "low rank", "zero", "1e30"):
            if name not in named:
                continue
            for dtype in (torch.float32,) if large else (torch.float32, torch.float64, torch.bfloat16):
                for layout in ("rows", "columns"):
                    x = with_layout(named[name].to(dtype).to(device), layout).detach().requires_grad_()
                    u, s, v = implementation("cuda")(truncated_svd)(x, k, return_u=True)
                    student, teacher = implementation("cuda")(align_singular_vectors)(v, v.detach().roll(1, -1), s.detach())
                    (student * teacher.cos()).sum().add(s.sum()).add((u * u.detach().cos()).sum()).backward()
                    calls += 1
    if not large and (device == "cpu" or torch.cuda.get_device_capability() >= (9, 0)):  # the kernel needs clusters
        calls += exercise_temperature_kl(device)
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


def exercise_temperature_kl(device: str) -> int:
    """Run the kernel for long rows with clusters of several sizes, unaligned rows, and a mask."""
    shapes = [(5, 4100), (3, 17001), (2, 32000), (2, 128256)]
    for (rows, classes), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        student, teacher = (torch.randn(rows, classes, device=device).to(dtype) for _ in range(2))
        computed, *_ = run_long_rows(teacher, student, mask=torch.arange(rows, device=device) != 1)
        assert computed
    return 2 * len(shapes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--large", action="store_true", help="a few large batches: for the bandwidth of the backward")
    arguments = parser.parse_args()
    print(f"{exercise(arguments.device, arguments.large)} calls on {arguments.device}")
