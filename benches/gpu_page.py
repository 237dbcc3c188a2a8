"""Writes docs/gpu_model.md: the model of gpu_device.py in words, and its predictions as tables."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence

from .gpu_device import DEVICES, L2_LATENCY, MEMORY_LATENCY, SHARE_OF_BANDWIDTH, START, WARP, Device
from .gpu_inputs import CASES, Case
from .gpu_predictions import H100, MEASURED, Launch, facts, kernel_of, launches, measured_kernels
from .gpu_sass import LATENCY

_MORE_AT_1000_NS = 100 * (1000e-9 / MEMORY_LATENCY - 1)

HEAD = f"""# A model of the GPU kernels

This page predicts how long each GPU kernel takes on four GPUs. The predictions are computed from
the compiled code of the kernels and from datasheets; no prediction is a measurement. Measured
times appear only in columns named "measured". They come from one NVIDIA H100
(`benches/results/nvidia-h100-80gb-hbm3/profile.json`). The purpose of the model is to be
compared with measurements: a kernel that takes much longer than predicted has a cost that the model
does not know, and a change to a kernel can be judged before a GPU is at hand.

`python -m benches.gpu_model` generates this page from `benches/gpu_kernels.json`.
`python -m benches.gpu_model --compile` compiles the kernels, which needs `nvcc` and Triton but no
GPU, and writes this file. `make gpu` ends by printing measured times beside predicted ones.

## How a time is predicted

A kernel needs at least as long as each of the following limits. The predicted time is the longest
of these times, plus {START * 1e6:.0f} microseconds for the start and the end of the kernel. The tables name
the longest limit.

| limit | time |
|---|---|
| bytes | bytes that must be read from memory or written to it, divided by {SHARE_OF_BANDWIDTH * 100:.0f} % of the bandwidth of the datasheet |
| bytes in flight | bytes to read, divided by the rate that latency allows: bytes in flight of all multiprocessors / memory latency |
| issue | instructions of all warps, divided by four instructions per clock cycle and multiprocessor |
| FMA, ALU, MUFU, FP64 | instructions of a kind, divided by the number of lanes that execute them |
| tensor cores | products in tensor cores, divided by their rate |
| chain | time of one block if it has a multiprocessor for itself, times the number of blocks that a multiprocessor runs one after another |
| launch | the start and the end of the kernel take longer than all other limits |

FMA counts additions, multiplications and fused multiply-adds in float32, and integer
multiply-adds. ALU counts comparisons, selections, logic and integer additions. MUFU is the unit for
exponentials, reciprocals and square roots, and for conversions between some number formats.

**Bytes in flight.** By Little's law, a memory system delivers its full bandwidth only if the
requested and not yet delivered bytes are at least bandwidth times latency. The bytes in flight of a
thread are those of the loads that the compiled code issues before the first instruction that needs
one of them. For asynchronous copies to shared memory, they are the tiles that are not yet used. The
bytes in flight of a multiprocessor are those of a thread times the number of resident threads.
Registers, shared memory and the limits of the architecture determine how many blocks are resident.

**Instructions** are counted in the machine code (SASS) of each loop, and multiplied by the number
of times that the loop runs for the input. Rare branches are left out: slow paths of divisions,
other number formats, and rows with infinities.

**The chain** of a block is the time of its slowest warp alone. Instructions are issued in order,
each as soon as its operands are ready. `truncated_svd` consists of many short phases that depend on
each other and are separated by barriers; its chain is the sum over these phases.

## How to refute it

Run `make gpu`, or profile a kernel with ncu. The model is wrong in the following cases.

- A kernel is faster than predicted. Then a count or an assumption is too high.
- A kernel is slower than predicted by more than about 30 %. Then a limit is missing, or two limits
  do not overlap.
- The limit is "bytes", but ncu's `dram__throughput.avg.pct_of_peak_sustained_elapsed` is below
  80 %.
- The limit is "issue", but `smsp__issue_active.avg.pct_of_peak_sustained_active` is below 70 %.
- The limit is "bytes in flight", but the most frequent reason for stalls is not
  `long_scoreboard`, which is the wait for memory.
- `launch__registers_per_thread` or `launch__occupancy_limit_registers` differs from the tables.

## Assumptions

| assumption | value |
|---|---|
| memory latency under load | {MEMORY_LATENCY * 1e9:.0f} ns on all GPUs |
| latency of the L2 cache | {L2_LATENCY * 1e9:.0f} ns |
| share of the memory bandwidth that a kernel can reach | {SHARE_OF_BANDWIDTH * 100:.0f} %: a copy on the H100 reached 2.95 of 3.35 TB/s |
| start and end of a kernel | {START * 1e6:.1f} microseconds: two kernels that find nothing to do took 3.9 on the H100 |
| clock | the boost clock of the datasheet, without throttling |
| latencies of instructions, in cycles | {", ".join(f"{unit} {cycles}" for unit, cycles in LATENCY.items())} |

The latencies of memory and of instructions are rounded from published microbenchmarks of earlier
GPUs. The bytes in flight that a GPU needs are proportional to the memory latency: with 1000 ns
instead of {MEMORY_LATENCY * 1e9:.0f} ns, a multiprocessor needs {_MORE_AT_1000_NS:.0f} % more. The model does not include conflicts
between banks of shared memory, the bandwidth of shared memory and of the L2 cache, and partly used
memory sectors. Python, the allocation of results and the gaps between kernels are not part of a
kernel's time.
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def significant(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _devices() -> list[str]:
    rows = [
        (
            d.name, d.target, d.multiprocessors, f"{d.clock / 1e9:.3g}", f"{d.bandwidth / 1e12:.3g}", d.l2 >> 20, d.fp32_lanes, d.fp64_lanes,
            d.mufu_lanes, f"{d.shared >> 10} / {d.largest_shared >> 10}", f"{d.bytes_in_flight_needed / 1024:.1f}",
        )
        for d in DEVICES.values()
    ]  # fmt: skip
    columns = ("GPU", "compiled for", "multiprocessors", "clock, GHz", "memory, TB/s", "L2, MiB", "float32 lanes", "float64 lanes", "MUFU lanes",
               "shared memory of a multiprocessor / of a block, KiB", "bytes in flight needed by a multiprocessor, KiB")  # fmt: skip
    text = """## GPUs

The numbers are those of datasheets and of the CUDA programming guide. Lanes are those of one
multiprocessor. The last column is bandwidth times latency, with the assumptions above.
"""
    return [text, *table(columns, rows)]


def _measured() -> list[str]:
    compared = measured_kernels()
    ratios: dict[str, list[float]] = {}
    for c in compared:
        ratios.setdefault(c.binds, []).append(c.measured / c.predicted)
    by_limit = "\n".join(f'- "{limit}": {min(found):.2f} to {max(found):.2f} ({len(found)} rows).' for limit, found in ratios.items())
    rows = [
        (c.op, c.input, f"`{c.kernel}`", significant(c.measured), significant(c.predicted), f"{c.measured / c.predicted:.2f}", c.binds)
        for c in compared
    ]
    commit = json.loads(MEASURED.read_text())["commit"]

    def span(*kernels: str) -> str:
        found = [c.measured / c.predicted for c in compared if c.kernel.startswith(kernels)]
        return f"{min(found):.1f} to {max(found):.1f}"

    all_kernels = measured_kernels(rewritten=True)
    slowest = max((c for c in all_kernels if c.kernel.startswith("update_kernel")), key=lambda c: c.measured / c.predicted)
    cuda, triton = ({c.input: c.measured for c in all_kernels if c.kernel.startswith(name)} for name in ("update_kernel", "_update_kernel"))
    to_triton = [cuda[name] / triton[name] for name in cuda.keys() & triton.keys()]
    underestimated = textwrap.fill(
        f"""The model underestimates three kinds of kernels. `forward_kernel` and `solve_kernel` of `truncated_svd` take
        {span("forward_kernel", "solve_kernel")} times their predicted time. `_terms_kernel`, which uses the float64 tensor cores, takes
        {span("_terms_kernel")} times as long. `update_kernel` took up to {slowest.measured / slowest.predicted:.1f} times as long
        ({significant(slowest.measured)} us for {slowest.input}), although its bytes in flight suffice, and {min(to_triton):.1f} to
        {max(to_triton):.1f} times as long as the Triton kernel. For each tile it waited for several reads of b and its gradient, one
        after the other, which the model did not count, and maps with contiguous rows were written with conflicts between banks of shared
        memory. It now reads b and its gradient ahead, with the tiles, and neighbouring threads write neighbouring addresses; this has
        not been measured.""".replace("\n        ", " "),
        100,
    )
    text = f"""## Measured and predicted times on the H100

Times are in microseconds, by torch's profiler, in one run of `python -m benches.gpu_profile` at
commit {commit}. A kernel that an op launches several times has one row. The page predicts the code of
`benches/gpu_kernels.json`; kernels that are launched with other sizes since, or were rewritten, are
left out.

A ratio near 1 confirms the limit. A ratio above 1.3 means that a limit is missing or that two
limits do not overlap, a ratio below 0.9 that a count or an assumption is too high. By limit, the
ratios are:

{by_limit}

{underestimated}
"""
    return [text, *table(("op", "input", "kernel", "measured", "predicted", "measured / predicted", "limit"), rows)]


def _used(case: Case, device: Device) -> list[Launch]:
    """Return the launches of a case that compute something, without repetitions of a kernel."""
    found: dict[str, Launch] = {}
    for launch in launches(case, device):
        if not launch.work.idle:
            found.setdefault(launch.kernel.name, launch)
    return list(found.values())


def _predictions() -> list[str]:
    text = """## Predicted times

Times of one launch are in microseconds, with the limit in parentheses. "MB" are the bytes that the
kernel reads from memory and writes to it on the H100. "resident" are the blocks / warps that run
on a multiprocessor of the H100 at a time, and "in flight" are their bytes in flight as a share of
those that the memory system needs. A kernel that finds nothing to do for the input, and returns at
once, is not listed. The A100 has no clusters, so its times of `long_rows_kernel` are those of
`_long_rows_kernel`.
"""
    lines = [text]
    for op in dict.fromkeys(case.op for case in CASES):
        rows = []
        for case in (c for c in CASES if c.op == op):
            by_device = [_used(case, device) for device in DEVICES.values()]
            for position, launch in enumerate(_used(case, H100)):
                others = [found[position].prediction for found in by_device]
                cells = [f"{significant(p.seconds * 1e6)} ({p.binds})" for p in others]
                own = launch.prediction
                resident = f"{own.resident_warps // launch.kernel.warps} / {own.resident_warps}"
                flight = f"{own.bytes_in_flight / own.needed * 100:.0f} %" if own.needed else "-"
                first = (case.input, f"`{launch.kernel.name}`", launch.work.blocks, resident, flight)
                rows.append((*first, significant(launch.work.memory_bytes / 1e6), *cells))
        lines += [f"### {op}", "", *table(("input", "kernel", "blocks", "resident", "in flight", "MB", *DEVICES), rows)]
    return lines


def unfilled() -> list[tuple[str, str, dict[str, float]]]:
    """Return the launches that read memory and have too few bytes in flight on some GPU.

    A launch is given as input, kernel, and the share of the bytes needed on each GPU. Launches
    whose reads take less time than the start of a kernel are left out.
    """
    found = []
    for case in CASES:
        by_device = {name: _used(case, device) for name, device in DEVICES.items()}
        for position, launch in enumerate(_used(case, H100)):
            shares = {}
            for name, launches_of_device in by_device.items():
                prediction = launches_of_device[position].prediction
                shares[name] = prediction.bytes_in_flight / prediction.needed if prediction.needed else 1.0
            long_enough = launch.work.load_bytes / H100.bandwidth > START
            if long_enough and min(shares.values()) < 1:
                found.append((f"{case.op}: {case.input}", launch.kernel.name, shares))
    return found


def _bytes_in_flight() -> list[str]:
    rows = [(case, f"`{kernel}`", *(f"{share * 100:.0f} %" for share in shares.values())) for case, kernel, shares in unfilled()]
    text = """## Kernels that cannot fill the memory system

The table shows the bytes in flight of a multiprocessor as a share of the bytes that the GPU needs.
It lists the launches for which this share is below 100 % on at least one of the GPUs. Launches that
read so little memory that the H100 needs less time for it than for the start of a kernel are left
out. A kernel with a limit other than "bytes" may be listed too; more bytes in flight would then not
make it faster.
"""
    return [text, *table(("input", "kernel", *DEVICES), rows)]


def _compiled() -> list[str]:
    targets = facts()["targets"]
    compilers = facts()["compilers"]
    names = sorted({key for target in targets.values() for key in target["kernels"]}, key=lambda key: (key.startswith("_"), key))
    device_of = {"sm_80": DEVICES["A100 80GB"], "sm_90": H100, "sm_100": DEVICES["B200"]}
    rows = []
    for key in names:
        cells, widths, flight, threads = [], "-", "-", 0
        for target, device in device_of.items():
            if key not in targets[target]["kernels"]:
                cells.append("-")
                continue
            kernel = kernel_of(target, key)
            blocks = kernel.resident_blocks(device)
            cells.append(f"{kernel.registers} / {kernel.stack} / {kernel.shared} / {blocks * kernel.warps}")
            threads = kernel.threads
            if target == "sm_90" or widths == "-":
                loads: dict[int, float] = {}
                for part in kernel.parts.values():
                    for width, count in [*part.loads.items(), *part.copies.items()]:
                        loads[int(width) * 8] = loads.get(int(width) * 8, 0) + count
                widths = ", ".join(str(width) for width in sorted(loads)) or "-"
                flight = f"{max((part.bytes_in_flight for part in kernel.parts.values()), default=0):.0f}"
        rows.append((f"`{key}`", threads, widths, flight, *cells))
    text = f"""## Compiled kernels

nvcc {compilers["nvcc"]} compiled the CUDA kernels, and Triton {compilers["triton"]} the kernels whose names begin
with an underscore. The last three columns show registers of a thread / bytes of stack of a thread /
bytes of shared memory of a block / resident warps of a multiprocessor. The CUDA kernels of
truncated_svd use dynamic shared memory in addition, which depends on the matrix: `forward_kernel`
and `solve_kernel` run one block at a time on a multiprocessor if the matrix is large. "width" are
the bits of a thread's global loads and asynchronous copies, and "in flight" the bytes of loads that
a thread has in flight, both for sm_90 and without asynchronous copies. Loads of 128 bits need the
fewest instructions. Triton loads 16 or 32 bits if it cannot prove that rows are aligned, for
example rows of 1001 classes. A number in parentheses distinguishes the instances of a kernel for
different inputs.
"""
    return [text, *table(("kernel", "threads", "width", "in flight", *targets), rows)]


def _instructions() -> list[str]:
    rows = []
    for case in CASES:
        for launch in _used(case, H100):
            counts = launch.work.instructions
            bytes_moved = launch.work.memory_bytes
            if not counts or not bytes_moved:
                continue
            threads = {unit: count * WARP for unit, count in counts.items()}
            memory = sum(threads.get(u, 0) for u in ("global load", "global store", "async copy", "shared", "generic load", "generic store"))
            known = [threads.get("fma", 0), threads.get("alu", 0), threads.get("mufu", 0), threads.get("fp64", 0), memory]
            cells = [f"{n / bytes_moved:.2f}" for n in [*known, sum(threads.values()) - sum(known), sum(threads.values())]]
            rows.append((f"{case.op}: {case.input}", f"`{launch.kernel.name}`", *cells))
    balance = H100.issues * WARP * H100.multiprocessors * H100.clock / (H100.bandwidth * SHARE_OF_BANDWIDTH)
    text = f"""## Instructions per byte

The table shows the instructions of threads per byte that the kernel reads from memory or writes to
it, by kind, as compiled for the H100. A padded or masked lane counts like any other. An H100 can
issue {balance:.0f} instructions of threads in the time in which its memory moves one byte. A kernel with
more instructions per byte is limited by its instructions.
"""
    return [text, *table(("input", "kernel", "FMA", "ALU", "MUFU", "FP64", "memory", "other", "all"), rows)]


def _stages() -> list[str]:
    lines = [
        """## Stages of truncated_svd

The time of `forward_kernel` and `solve_kernel` is a chain of stages. The tables show the predicted
microseconds of each stage for one matrix on the H100, where every matrix has a multiprocessor, or a
quarter of one if its smaller side is at most 32.
"""
    ]
    for kernel in ("forward_kernel", "solve_kernel"):
        found = [(case, x) for case in CASES if case.implementation == "cuda" for x in _used(case, H100) if x.kernel.name.startswith(kernel)]
        stages = list(dict.fromkeys(stage for _, launch in found for stage in launch.work.stages))
        rows = [
            (case.input, *(significant(launch.work.stages[s] / H100.clock * 1e6) if s in launch.work.stages else "-" for s in stages))
            for case, launch in found
        ]
        lines += [f"### {kernel}", "", *table(("input", *stages), rows)]
    return lines


def page() -> str:
    parts = [_devices(), _measured(), _predictions(), _bytes_in_flight(), _instructions(), _stages(), _compiled()]
    lines = [HEAD, *(line for part in parts for line in part)]
    return "\n".join(lines).rstrip() + "\n"
