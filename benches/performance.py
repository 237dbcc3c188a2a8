"""Write docs/performance.md from the results in benches/results/.

Usage: python -m benches.performance [--check]. Each number of the page comes from a file there.
"""

import json
import sys
import textwrap
from pathlib import Path

from . import grid_results
from .pictures import sweeps_of
from .tables import EMPTY, Entry, Table, about, load, markdown, rows_of, tables

ROOT = Path(__file__).resolve().parent.parent
DISPATCH, BYTES = 0.4, 0.6  # shares of the time of a call from which these are said to bind
PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Performance

`python -m benches.performance` generates this page from the files in `benches/results/`, which
`make bench` and `make gpu` write. No number of the suite is typed by hand.
[benchmarks.md](benchmarks.md) describes how to run the benchmarks.

**Contenders.** The fused op is compared with other implementations, here called contenders or
peers. *eager* is the reference of the op in plain PyTorch, *Inductor* is this reference compiled
with `torch.compile`. *textbook form* is the KL divergence as most distillation scripts write it,
and *linear form in torch* computes rbf_correlation_loss from a series in plain PyTorch
([rbf_correlation.md](rbf_correlation.md)). The others are the functions of torch with these names.

**Directions.** *forward* is the public function without an autograd graph, as in validation.
*backward* is the computation of the gradients alone; the forward pass before it is not timed.
*forward + backward* is both, as in a training step: it computes new gradients, and the time
includes Python and dispatch. It is not the sum of the other two. If only the student requires a
gradient, temperature_kl, the attention losses and rbf_correlation_loss compute this gradient
already during the forward pass, and their backward pass only scales it. The time of *backward* is
then short.

**Times and ratios.** Before a row is timed, the op is checked against the reference in float64 on
the inputs of the row. All contenders run in one process, once per round, in random order. The
column "ms" is the time of the fused op. The columns of the contenders are ratios: the time of the
contender divided by the time of the fused op in the same round. A ratio of 2 means that the
contender takes twice as long. The tables show the median of the ratios over the rounds and, in
parentheses, the 95 % bootstrap interval of this median. `torch.compile` compiles before the timing.
On a GPU, the time between two CUDA events is measured, and the calls use several copies of the
inputs in turn, which together exceed the L2 cache. The columns "replayed" show the replay of a CUDA
graph of the calls. GPU clocks are not changed.

**Inputs.** In the rows "both gradients" of temperature_kl, the teacher requires a gradient too. The
matrices of truncated_svd are feature maps of a random network after a ReLU. In the rows "trained"
they are feature maps of a trained TinyCNN, in the rows "noise" and "relu of noise" random numbers
without and with a ReLU. The row "far apart" of rbf_correlation_loss has inputs that need too many
terms of the series, so the op sums over all pairs instead.

**Share of the limit.** The limit is the longest of the times below, at rates that are measured in
the same run. The share is the limit divided by the time of the fused op: at 100 %, the op takes no
longer than the limit. The tables name the limit.

- *copy* is the time in which `Tensor.copy_` moves as many bytes as the op must move (column "bytes
  moved"). temperature_kl reads both logits and writes the gradient. attention_transfer_loss reads
  the student's features twice and the teacher's once, and writes the gradient. rbf_correlation
  writes the correlation and reads its gradient. truncated_svd reads the feature map, reads it again
  in the backward pass, and writes the gradient.
- *GEMM* is the time of the arithmetic at the rate of a large matrix product. For truncated_svd this
  is the arithmetic of one half of the symmetric Gram matrix and of its reduction to tridiagonal
  form. For rbf_correlation_loss it is the arithmetic of the terms of the series and of their
  products, in float64.
- *exp* is the time of the exponentials at the rate of `torch.exp`.

If the inputs of an op fit into a cache, the copy with which it is compared also stays in the cache.
The share can exceed 100 % for two reasons: data that the op reads a second time are still in a
cache, or truncated_svd finds a few singular vectors without computing the Gram matrix.

**Errors** are measured against float64: of the loss (forward), of the gradient (backward), or the
larger of the two (forward + backward). They are relative to the largest entry. "smallest error of a
peer" is the error of the most accurate other contender. For truncated_svd, "error" is the error of
the singular values relative to the largest one, and "sine" is the sine of the largest angle between
a computed and an exact singular vector.

**Memory** is the peak memory during the call, including the results, minus the memory in use before
the call. On a CPU, the resident memory of the process is measured, after freed memory is returned
to the system; on a GPU, the memory of torch's allocator.

**Training steps.** Two tables time whole training steps. In the table of the cache, "ms" is the
time of a KD step that reads the teacher's outputs from the cache on disk, and "with the teacher
computed" is the time of the same step with the teacher computed, divided by "ms". In the table of
parts, each step is timed with the fused ops and with the references in their place, and "ratio with
references" is the time with the references divided by the time with the fused ops.
"""
WORST_CELLS = """`kdkernels bench --worst` measures a grid of small, odd and large inputs of each op, here called
cells, and sorts them by a ratio: the time of the fastest peer divided by the time of the fused op.
Only peers that are as accurate count: all their errors against float64 are within the bounds of the
op's tests, or all are at most three times those of the fused op. The time of a peer that does not
count is in parentheses. If no peer counts, the ratio is that of the first peer, also in
parentheses. A row is a cell in one direction. It is lost if its ratio is below 1 / 1.1. Each table
shows the ten rows with the smallest ratios. [benchmarks.md](benchmarks.md#worst-cells) explains the
names of the cells."""
WHAT_BINDS = """`python -m benches.cpu_profile` measures forward + backward on all threads and on one. "dispatch" is the
time of the same call on at most 4 numbers of each dimension: Python, torch's dispatcher and autograd. "copy" is the
time in which `Tensor.copy_` moves the bytes that the op must move. The last column names what takes the largest part:
dispatch, if it is at least 40 % of the time; else the bytes, if their copy takes at least 60 %; else arithmetic, with
the start of the threads. The calls of a row are timed in random order, each right after another one."""


def section(file: Path) -> str:
    """Return the section of a machine: its tables and pictures."""
    result = load(file)
    lines = [f"## {file.parent.name}", "", f"{about(result)}."]
    for table in tables(rows_of(result)):
        lines += ["", f"### {table.title}", "", *markdown(table)]
    sweeps = sweeps_of(result)
    if sweeps:
        lines += ["", "### Time and memory against the size of the inputs", ""]
        lines += [
            f"![Time and memory of {op} against the size of its inputs](../benches/results/{file.parent.name}/{op}_sweeps.svg)" for op in sweeps
        ]
    return "\n".join(lines) + "\n"


def page() -> str:
    results = ROOT / "benches" / "results"
    makers = {"bench.json": section, "cpu_profile.json": what_binds, "grid.json": worst_cells, "kernels.json": kernels}
    return "\n".join([HEAD, *(make(file) for name, make in makers.items() for file in sorted(results.glob(f"*/{name}")))])


def binds(row: dict) -> str:
    """Say what takes the largest part of the time of a row."""
    seconds, copy = row["seconds"], row["copy"] or 0.0
    if seconds["few numbers"] >= DISPATCH * seconds["all threads"]:
        return "dispatch"
    return "bytes" if copy >= BYTES * seconds["all threads"] else "arithmetic"


def what_binds(path: Path) -> str:
    """Return the section of a file cpu_profile.json: the parts of the time of each row."""
    result = json.loads(path.read_text())
    environment, starts = result["environment"], result["thread start"]
    about_run = f"torch {environment['torch']}, {environment['threads']} threads, commit `{environment['commit']}`."
    about_starts = ", ".join("not measured" if seconds is None else f"{1e6 * seconds:.0f} us {when}" for when, seconds in starts.items())
    lines = [f"## {path.parent.name}: what binds", "", textwrap.fill(WHAT_BINDS, 100), ""]
    lines += [textwrap.fill(f"Measured with {about_run} Start of the threads: {about_starts}.", 100), ""]
    table = Table("", ["op", "input", "ms", "one thread, ms", "dispatch, ms", "copy, ms", "binds"], [])
    for row in result["rows"]:
        seconds = row["seconds"]
        times = [seconds["all threads"], seconds["one thread"], seconds["few numbers"], row["copy"]]
        numbers = [EMPTY if t is None else Entry(f"{1e3 * t:.3g}", 1e3 * t) for t in times]
        table.rows.append([Entry(row["op"]), Entry(row["cell"]), *numbers, Entry(binds(row))])
    lines += markdown(table)
    return "\n".join(lines) + "\n"


def worst_cells(path: Path) -> str:
    """Return the section of a file grid.json: for each op the inputs on which it is slowest."""
    result = grid_results.load(path)
    lines = [f"## {path.parent.name}: worst cells", "", textwrap.fill(WORST_CELLS, 100), "", f"{grid_results.about(result)}."]
    for op in grid_results.ops_of(result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op]
        lines += ["", f"### Worst cells of {grid_results.FUNCTIONS.get(op, op)}", "", textwrap.fill(" ".join(grid_results.summary(rows)), 100), ""]
        lines += markdown(grid_results.worst_table(rows))
    return "\n".join(lines) + "\n"


def kernels(path: Path) -> str:
    """Return the section of a file kernels.json, whose tables were measured outside the suite."""
    measured = json.loads(path.read_text())
    lines = [
        f"## {measured['gpu']}: kernels",
        "",
        f"torch {measured['torch']}, Triton {measured['triton']}, CUDA {measured['cuda']}. The suite has not been run on this GPU yet.",
        "These tables come from shorter measurements, whose output was copied to",
        f"`benches/results/{path.parent.name}/kernels.json`.",
        "",
    ]
    for table in measured["tables"]:
        columns = list(table["rows"][0])
        note = textwrap.fill(table["note"], 100)
        lines += [f"### {table['title']}", "", f"Commit {table['commit']}.", "", note, "", "| " + " | ".join(columns) + " |"]
        lines += ["|" + "---|" * len(columns)]
        lines += ["| " + " | ".join("-" if row[c] is None else str(row[c]) for c in columns) + " |" for row in table["rows"]]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == page() else f"{PAGE} does not match the results: run python -m benches.performance")
    PAGE.write_text(page())
