"""Measure the speed and the memory of select_samples on a million images of 32x32 pixels.

Usage: python benches/selection.py [--images 1000000] [--count 100000] [--out FILE.json]

The teacher is a TinyCNN of width 32. The pool consists of 20,000 images of WildDigits, each at 50
circular shifts, and needs no other memory. The memory is the resident set of the process after each
tenth of the pool.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from kdkernels import __version__
from kdkernels.data import ClutterDigits, WildDigits, select_samples
from kdkernels.models import TinyCNN

SOURCES = 20000


class ShiftedImages(torch.utils.data.Dataset):
    """Image i is source ``i % 20000``, shifted by ``i // 20000`` rows and columns."""

    def __init__(self, size: int):
        self.size = size
        wild = WildDigits(SOURCES)
        self.sources = torch.stack([image for first in range(0, SOURCES, 500) for image in wild.__getitems__(list(range(first, first + 500)))])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Tensor:
        shift = i // SOURCES
        return self.sources[i % SOURCES].roll((shift, shift % 7), (1, 2))


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("runs/selection.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher, pool = TinyCNN(32), ShiftedImages(options.images)
    cast(Any, teacher).to(memory_format=torch.channels_last)
    memory: dict[str, float] = {}
    start = time.perf_counter()

    def watch(done: int, total: int) -> None:
        part = f"{10 * done // total * 10} %"
        if part not in memory:
            memory[part] = round(resident_mib())
            print(f"{part:>6} after {time.perf_counter() - start:6.1f} s: {memory[part]} MiB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.pt"
        select_samples(teacher, pool, options.count, path, mean=ClutterDigits.mean, std=ClutterDigits.std, on_progress=watch)
        seconds = time.perf_counter() - start
        size = path.stat().st_size / 2**20
    result = {
        "version": __version__,
        "images": options.images,
        "count": options.count,
        "threads": torch.get_num_threads(),
        "images_per_second": round(options.images / seconds),
        "resident_mib": memory,
        "index_file_mib": round(size, 1),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['images_per_second']} images per second")


if __name__ == "__main__":
    main()
