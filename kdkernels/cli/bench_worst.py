"""``kdkernels bench --worst``: find the inputs on which an op is slowest relative to its peers."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .arguments import Parser, make_folder

OPS = ("temperature_kl", "attention_pool", "rbf_correlation", "truncated_svd")


def check_options(parser: Parser, options: argparse.Namespace) -> None:
    """Raise an error for options that cannot be combined with --worst, or that need it."""
    if not options.worst:
        if options.threads is not None:
            parser.error("--threads needs --worst; other runs use all cores")
        return
    for name in ("report", "compare", "results"):
        if getattr(options, name):
            parser.error(f"--worst cannot be combined with --{name}; run the two commands separately")
    if options.device == "cuda":
        parser.error("--worst measures on the CPU, got --device cuda; leave --device out")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    for op in options.op or ():
        if op not in OPS:
            parser.error(f"--worst has no grid of inputs for {op}; the ops with a grid are {', '.join(OPS)}")


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Measure the grids of the ops, and print the worst rows of each."""
    from ..benches import grid

    out = options.out or Path("runs") / "bench_worst"
    make_folder(parser, out)
    path, texts, threads = out / "grid.json", options.select or (), options.threads or 1
    smoke = os.environ.get("KDKERNELS_BENCH") == "smoke"  # for tests
    rows = _load_earlier(parser, path, grid.environment(threads, smoke))
    numbers = {op: len(grid.selected(op, texts, smoke)) for op in options.op or OPS}
    if not any(numbers.values()):
        print("kdkernels bench: no row was measured; no row's name matches --select and --op", file=sys.stderr)
        return 1
    try:
        for op, number in numbers.items():
            if number:
                print(f"\n{op}: measuring {number} cells", flush=True)
                rows = grid.measure_grid(op, path, rows, select=texts, threads=threads, smoke=smoke)
                _print_worst([row for row in rows if row["op"] == op])
    except KeyboardInterrupt:
        print("kdkernels bench: interrupted; the rows that were measured are saved", file=sys.stderr)
        return 130
    print(f"\nA time in parentheses is that of a peer that is less accurate and does not count.\nwrote {path}")
    return 0


def _print_worst(rows: list[dict]) -> None:
    from ..benches.grid_results import summary, worst_table
    from ..benches.tables import aligned

    print("\n".join([*summary(rows), *aligned(worst_table(rows))]), flush=True)


def _load_earlier(parser: Parser, path: Path, environment: dict) -> list[dict]:
    """Return the rows that the file contains already, to which the new rows are added."""
    from ..benches.grid_results import load

    if not path.exists():
        return []
    try:
        earlier = load(path)
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}; remove the file, or give another folder")
    for name in ("machine", "mode", "threads", "torch"):
        old, new = earlier["environment"][name], environment[name]
        if old != new:
            parser.error(f"--out: the results in {path} have {name} {old}, but this run has {name} {new}: give another folder")
    return earlier["rows"]
