"""Prints how wide the global loads and stores of temperature_kl's kernels are.

Usage: python triton_loads.py TARGET [NAME ...]. The names select calls of LAYOUTS. Every line has
the name of a call, the name of the first kernel that it launches, and the widest load and the
widest store of this kernel in bits. No GPU is needed: triton_launches.py compiles the kernels.
"""

import re
import sys

import torch
import triton_launches

from kdkernels.options import Direction, Reduction
from kdkernels.triton import temperature_kl as kl

# Rows, the distance between them, classes, and the elements before the first row.
LAYOUTS = {
    "rows of 1000 classes": (16384, 1000, 1000, 0),
    "few rows of 1000 classes": (256, 1000, 1000, 0),
    "rows of 1000 classes behind one element": (16384, 1000, 1000, 1),
    "rows of 1000 classes, 1001 apart": (16384, 1001, 1000, 0),
    "rows of 1002 classes": (16384, 1002, 1002, 0),
    "rows of 10004 classes": (2048, 10004, 10004, 0),
}


def widest(ptx: str, access: str) -> int:
    """Return the bits of the widest global access, "ld" or "st", of a thread."""
    found = re.findall(rf"\b{access}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return max(int(count or 1) * int(bits) for count, bits in found)


def main() -> None:
    kernels = []
    original = triton_launches.triton_compile

    def compile_and_keep(*arguments, **options):
        kernels.append(original(*arguments, **options))
        return kernels[-1]

    triton_launches.triton_compile = compile_and_keep
    triton_launches.STACK = 128  # only widths are checked here
    with triton_launches.fake_gpu(sys.argv[1]) as gpu:
        gpu.all_stages = True
        for name in sys.argv[2:] or LAYOUTS:
            rows, stride, classes, offset = LAYOUTS[name]
            for dtype in (torch.float32, torch.bfloat16):
                memory = triton_launches.as_fake_cuda(torch.empty(offset + rows * stride, dtype=dtype))
                logits = memory.as_strided((rows, classes), (stride, 1), offset)
                options = (4.0, None, None, None, -1, Direction.FORWARD, 0.5, Reduction.BATCHMEAN, True, True, 0.0)
                kl.temperature_kl(logits, logits, *options, True)
                kernel = kernels[0]
                loads, stores = (widest(kernel.asm["ptx"], access) for access in ("ld", "st"))
                print(f"{name} {dtype}: {kernel.metadata.name} {loads} {stores}")
                kernels.clear()


if __name__ == "__main__":
    main()
