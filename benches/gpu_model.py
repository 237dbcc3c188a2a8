"""Predicts the times of the GPU kernels from their compiled code, and writes docs/gpu_model.md.

python -m benches.gpu_model                  writes docs/gpu_model.md
python -m benches.gpu_model --check          fails if the page is not up to date
python -m benches.gpu_model --compile        compiles the kernels and writes gpu_kernels.json, from
                                             which the page is made; needs nvcc, g++ and Triton
python -m benches.gpu_model --measured FILE  prints the times in a bench.json of the benchmark
                                             suite beside the predictions

gpu_device.py has the model: devices, kernels, and the limits of a kernel's time. gpu_work.py says
how often each part of a kernel runs. gpu_compile.py compiles the kernels, and gpu_sass.py counts
instructions in the compiled code. gpu_predictions.py puts them together, and gpu_page.py writes the
page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from .gpu_page import page
from .gpu_predictions import FACTS, facts, measured_beside_predicted
from .tables import load

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu_model.md"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="fail if docs/gpu_model.md is not up to date")
    group.add_argument("--compile", action="store_true", help="compile the kernels, and write benches/gpu_kernels.json")
    group.add_argument("--measured", metavar="FILE", help="print the times of a bench.json beside the predictions")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.measured:
        try:
            result = load(options.measured)
        except (OSError, ValueError) as error:
            sys.exit(f"{options.measured} cannot be read: {error}")
        print(measured_beside_predicted(result))
        return
    if options.compile:
        from .gpu_compile import compiled_kernels

        FACTS.write_text(json.dumps(compiled_kernels(), indent=1) + "\n")
        facts.cache_clear()
    if options.check:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == page() else f"{PAGE} is not up to date: run python -m benches.gpu_model")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
