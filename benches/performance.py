"""Write docs/performance.md from the results in benches/results/.

Usage: python -m benches.performance [--check]. Each number of the page comes from a file there.
"""

import json
import sys
from pathlib import Path

from .pictures import sweeps_of
from .tables import about, load, markdown, rows_of, tables

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Performance

`python -m benches.performance` generates this page from the files in `benches/results/`, which
`make bench` and `make gpu` write. No number on it is typed by hand.

**Directions.** *forward* is the public function without an autograd graph, as in validation.
*backward* is the computation of the gradients alone; the forward pass before it is not timed.
*forward + backward* is both, as in a training step: it computes new gradients, and the time
includes Python and dispatch. It is not the sum of the other two. temperature_kl, the attention
losses and rbf_correlation_loss compute the gradient during the forward pass if it will be needed,
and their backward pass only scales it.

**Times and ratios.** Before a row is timed, the op is checked against the reference in float64 on
the inputs of the row. All contenders run in one process, once per round, in random order. A ratio
is the time of a contender divided by the time of the fused op in the same round: 2 means that the
contender takes twice as long. The tables show the median over the rounds and, in parentheses, the
interval that contains 95 % of its bootstrap resamples. `torch.compile` compiles before the timing.
On a GPU, events on the stream are timed, and the inputs rotate through copies that exceed the L2
cache; the columns "replayed" show the replay of a CUDA graph of the calls. GPU clocks are not
changed.

**Share of the limit.** The limit is the longest of the times below, at rates that are measured in
the same run. The share is the limit divided by the time of the fused op; the tables name the limit.

- *copy* is the time in which `Tensor.copy_` moves as many bytes as the op must move (column "bytes
  moved"). temperature_kl reads both logits and writes the gradient. attention_transfer_loss reads
  the student's features twice and the teacher's once, and writes the gradient. rbf_correlation
  writes D and reads its gradient. truncated_svd reads the feature map, reads it again in the
  backward pass, and writes the gradient.
- *GEMM* is the time of the arithmetic at the rate of a large matrix product. For truncated_svd this
  is half of the Gram matrix and its tridiagonal form; for rbf_correlation_loss, the terms and their
  products in float64.
- *exp* is the time of the exponentials at the rate of `torch.exp`.

If the data fit into a cache, the data of the copy do too. The share can exceed 100 % if data that
are read a second time are still in a cache, or if an op finds a few singular vectors without
computing the Gram matrix.

**Errors** are measured against float64: of the loss (forward), of the gradient (backward), or the
larger of the two (forward + backward). They are relative to the largest entry. "smallest error of a
peer" is that of the best other contender. For truncated_svd, "error" is that of the singular values
relative to the largest one, and "sine" is the sine of the largest angle between a computed and an
exact singular vector.

**Memory** is the peak memory during the call, above the memory in use before it, with the results.
On a CPU, resident pages are measured, after freed memory is returned to the system; on a GPU, the
memory of torch's allocator.
"""


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
    files = sorted((ROOT / "benches" / "results").glob("*/bench.json"))
    parts = [HEAD, *(section(f) for f in files)]
    if not any(json.loads(f.read_text())["benchmarks"][0]["extra_info"].get("device") == "cuda" for f in files):
        parts.append("## GPU\n\nNot measured yet.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == page() else f"{PAGE} does not match the results: run python -m benches.performance")
    PAGE.write_text(page())
