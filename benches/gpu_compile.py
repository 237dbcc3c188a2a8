"""Compiles the GPU kernels without a GPU, and extracts the facts for the model of gpu_model.py.

`python -m benches.gpu_model --compile` calls `compiled_kernels`. It needs a checkout of the
repository with tests/ (whose fake driver for Triton it uses), nvcc, g++ and Triton.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .gpu_inputs import CASES, PARTS, Case, Part, cuda_shapes, long_row_shapes
from .gpu_sass import Function, Segment, parse, segments_of

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = ROOT / "csrc"


def _import_tests() -> Any:
    """Import cuda_sources and triton_launches, the modules of tests/ that compile kernels."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import cuda_sources  # type: ignore[import-not-found]
    import triton_launches  # type: ignore[import-not-found]

    return cuda_sources, triton_launches


def compiled_kernels() -> dict:
    """Compile all kernels for all targets, and return the contents of gpu_kernels.json."""
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("--compile compiles the Triton kernels: unset TRITON_INTERPRET")
    cuda_sources, launches = _import_tests()
    import triton

    nvcc = cuda_sources.nvcc()
    if nvcc is None:
        raise SystemExit("--compile needs nvcc: install a CUDA toolkit, or set CUDA_HOME to one")
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    disassemble = functools.partial(_disassemble, cuda_sources.binary_tool("nvdisasm"))
    targets = {}
    for position, target in enumerate(cuda_sources.TARGETS):
        print(f"compiling for {target}", flush=True)
        found = _Kernels()
        _compile_triton(target, 2 * position, found, launches, disassemble)
        _compile_cuda(target, found, cuda_sources, nvcc, disassemble)
        targets[target] = {"kernels": found.facts, "launches": found.launches}
    return {
        "compilers": {"nvcc": release.group(1) if release else "unknown", "triton": triton.__version__, "torch": torch.__version__.partition("+")[0]},
        "plans": _plans(),
        "targets": targets,
    }


class _Kernels:
    """The facts of the kernels of a target, and which of them each case launches."""

    def __init__(self) -> None:
        self.facts: dict[str, dict] = {}
        self.launches: dict[str, list[dict]] = {}

    def add(self, name: str, facts: dict) -> str:
        """Store the facts of a kernel and return its key. Kernels with equal facts share a key."""
        versions = 0
        for key, other in self.facts.items():
            if other["name"] == name:
                versions += 1
                if other == {"name": name, **facts}:
                    return key
        key = name if versions == 0 else f"{name} ({versions + 1})"
        self.facts[key] = {"name": name, **facts}
        return key


def _disassemble(nvdisasm: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, "-c", "-g", file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes, cuobjdump: str) -> dict[str, dict[str, int]]:
    """Return registers and bytes of stack of each kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {}
    for name, registers, stack in re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", usage):
        found[name] = {"registers": int(registers), "stack": int(stack)}
    return found


# ------------------------------------------------------------------------------------- Triton


def _compile_triton(target: str, first_device: int, found: _Kernels, launches: Any, disassemble: Any) -> None:
    """Make the calls of all cases on a fake GPU, and record the compiled kernels and launches."""
    launches.STACK = 1 << 20  # the model also takes kernels that spill
    compiled: dict[str, Any] = {}
    original_compile = launches.triton_compile

    def recording_compile(source: Any, **arguments: Any) -> Any:
        kernel = original_compile(source, **arguments)
        compiled[kernel.metadata.hash] = kernel
        return kernel

    made: list[tuple[str, int]] = []

    def launcher_cls(self: Any, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            made.append((metadata.hash, x * y * z))

        return launch

    launches.triton_compile, launches.FakeDriver.launcher_cls = recording_compile, launcher_cls
    cuobjdump = launches.binary_tool("cuobjdump")
    try:
        with launches.fake_gpu(target, first_device) as gpu:
            gpu.all_stages = True
            for case in CASES:
                if case.implementation != "triton":
                    continue
                made.clear()
                _call(case, launches)
                keys = []
                for identity, blocks in made:
                    kernel = compiled[identity]
                    keys.append({"kernel": _add_triton(kernel, found, disassemble, cuobjdump), "blocks": blocks})
                found.launches[case.name] = keys
    finally:
        launches.triton_compile = original_compile


def _add_triton(kernel: Any, found: _Kernels, disassemble: Any, cuobjdump: str) -> str:
    cubin, name = kernel.asm["cubin"], kernel.metadata.name
    (functions,) = parse(disassemble(cubin)).values()
    segments = [segment for function in functions for segment in segments_of(function)]
    (resources,) = _resources(cubin, cuobjdump).values()
    facts = {
        "threads": kernel.metadata.num_warps * 32,
        **resources,
        "shared": kernel.metadata.shared,
        "parts": _parts(name, [(_python_function(segment.line), segment) for segment in segments]),
    }
    return found.add(name, facts)


@functools.cache
def _functions_of(path: str) -> list[tuple[int, int, str]]:
    tree = ast.parse(Path(path).read_text())
    return [(node.lineno, node.end_lineno or 0, node.name) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _python_function(line: str) -> str:
    """Return the function that contains a line such as "/path/file.py:12"."""
    path, _, number = line.rpartition(":")
    if not path.endswith(".py") or not os.path.exists(path):
        return ""
    return next((name for first, last, name in _functions_of(path) if first <= int(number) <= last), "")


def _call(case: Case, launches: Any) -> None:
    """Call the launcher of a case with fake tensors."""
    from kdkernels.options import VALUES, Normalize, Reduce, Reduction, Sign, Variant
    from kdkernels.triton import attention_pool, rbf_correlation, temperature_kl, truncated_svd

    dtype = getattr(torch, case.dtype)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return launches.as_fake_cuda(torch.empty(shape, dtype=dtype))

    def features(shape: tuple[int, ...]) -> torch.Tensor:
        return launches.as_fake_cuda(
            torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last if case.option("channels_last") else torch.contiguous_format)
        )

    if case.kind == "kl":
        student, teacher = tensor(*case.shape), tensor(*case.shape)
        direction = VALUES["direction"][case.option("direction", "forward")]
        dim = 1 if len(case.shape) > 2 else -1
        options = (4.0, None, None, None, dim, direction, 0.5, Reduction.BATCHMEAN, True, True, 0.0)
        loss, gradient, row_scale = temperature_kl.temperature_kl(student, teacher, *options, True)
        temperature_kl.temperature_kl_rescale_(gradient, row_scale, torch.ones_like(loss), None, dim)
    elif case.kind == "transfer":
        student, teacher = features(case.shape), features(case.shape)
        attention_pool.attention_transfer_loss(student, teacher, case.option("p", 2.0), Variant.AUTHORS, Reduce.MEAN, 1e-12, True)
    elif case.kind == "pool":
        x = features(case.shape)
        setting = (2.0, Reduce.MEAN, Normalize.L2)
        maps, norm, channel = attention_pool.attention_pool(x, *setting, 1e-12)
        attention_pool.attention_pool_backward(torch.empty_like(maps), x, maps, norm, channel, *setting, 1e-12)
    elif case.kind == "rbf loss":
        batch, m, n, columns = case.shape
        sx, sy, tx, ty = (tensor(batch, length, columns) for length in (m, n, m, n))
        rbf_correlation.rbf_correlation_loss(sx, sy, tx, ty, 8.0, Reduction.BATCHMEAN, [True, True, False, False])
    elif case.kind == "correlation":
        batch, m, n, columns = case.shape
        x, y = tensor(batch, m, columns), tensor(batch, n, columns)
        rbf_correlation.rbf_correlation_backward(rbf_correlation.rbf_correlation(x, y, 8.0), x, y, 8.0)
    elif case.kind == "svd":
        batch, rows, columns, k = case.shape
        x = launches.as_fake_cuda(torch.empty(batch, columns, rows, dtype=dtype).mT)
        u, s, v, state = truncated_svd.truncated_svd(x, k, Sign.MAX_ABS, False, 1e-6, True)
        truncated_svd.truncated_svd_backward(None, torch.empty_like(s), torch.empty_like(v), x, u, s, v, state, 1e-6)
    elif case.kind == "align":
        batch, n, student_count, k = case.shape
        student, teacher = tensor(batch, n, student_count), tensor(batch, n, k)
        weight = tensor(batch, k)
        out_s, out_t, match, flips = truncated_svd.align_singular_vectors(student, teacher, weight, True)
        upstream = torch.empty_like(out_s), torch.empty_like(out_t)
        truncated_svd.align_singular_vectors_backward(*upstream, student, teacher, weight, match, flips, True, [True, False, False])
    else:
        raise AssertionError(case.kind)


# --------------------------------------------------------------------------------------- CUDA


def _compile_cuda(target: str, found: _Kernels, cuda_sources: Any, nvcc: str, disassemble: Any) -> None:
    """Compile csrc/*/kernels.cu with the flags of setup.py."""
    cuobjdump = cuda_sources.binary_tool("cuobjdump")
    number = target.removeprefix("sm_")
    for source in sorted(CUDA_SOURCES.glob("*/kernels.cu")):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "kernels.cubin"
            command = [nvcc, "-std=c++17", "-O3", "-lineinfo", f"-gencode=arch=compute_{number},code={target}", "-cubin", str(source), "-o"]
            subprocess.run([*command, str(output)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            cubin = output.read_bytes()
        resources = _resources(cubin, cuobjdump)
        for mangled, functions in parse(disassemble(cubin)).items():
            name = cuda_sources.kernel_name(mangled)
            segments = []
            for function in functions:
                stage = "" if function is functions[0] else stage_of(function)
                segments += [(stage, segment) for segment in segments_of(function, stage)]
            arguments = re.findall(r"(?<![A-Za-z\d])\d+", name)  # not the number of BFloat16
            threads = 128 if name.startswith("align") or arguments == ["32"] else int(arguments[0]) if arguments else 256
            found.add(name, {"threads": threads, **resources[mangled], "shared": 0, "parts": _parts(name, segments)})


def stage_of(function: Function) -> str:
    """Return the name of a function that is not inlined into a kernel, from its mangled name."""
    mangled = function.name.rpartition("$")[2]
    names, position = [], 0
    while match := re.compile(r"(?<!Li)(?<!\d)\d+").search(mangled, position):
        length = int(match.group())
        name = mangled[match.end() : match.end() + length]
        if re.fullmatch(r"[A-Za-z_]\w*", name) and len(name) == length:
            names.append(name)
            position = match.end() + length
        else:
            position = match.end()
    known = [name for name in names if name not in ("kdkernels", "truncated_svd", "align_singular_vectors", "gpu", "Forward", "Solve", "Cta")]
    return known[0] if known else mangled


def _plans() -> dict[str, dict[str, int]]:
    """Return how the CUDA kernels are launched for each shape, as their plan.h files compute it."""
    program = r"""
#include "truncated_svd/cta/plan.h"
#include <cstdio>
using namespace kdkernels::truncated_svd::gpu;
int main() {
  int p, k; long limit;
  while (std::scanf("%d %d %ld", &p, &k, &limit) == 3) {
    const int64_t matrix_limit = limit_per_matrix(p, 4, limit);
    const Plan forward = forward_plan<float>(p, k, matrix_limit), backward = backward_plan<float>(p, k, matrix_limit);
    std::printf("%d %ld %d %ld %d %ld %d %d %d %d %d %d\n", threads_for(p, 4), (long)forward.shared(), forward.matrix_shared,
                (long)backward.shared(), backward.matrix_shared, (long)update_shared<float>(p, k), update_columns(p, 4),
                update_tile_columns(p, 4), kUpdateTilesInFlight, tile_columns(p), kTilesInFlight, matrices_per_block(threads_for(p, 4)));
  }
}
"""
    names = ("threads", "forward_shared", "forward_matrix_shared", "solve_shared", "solve_matrix_shared", "update_shared", "update_columns",
             "update_tile_columns", "update_tiles_in_flight", "tile_columns", "tiles_in_flight", "matrices_per_block")  # fmt: skip
    asked = [(p, k, limit) for p, k in sorted(cuda_shapes()) for limit in (163 << 10, 227 << 10)]
    found = {f"p {p}, k {k}, limit {limit}": plan for (p, k, limit), plan in zip(asked, _run(program, names, asked), strict=True)}
    program = r"""
#include "temperature_kl/long_rows_plan.h"
#include <cstdio>
using namespace kdkernels::temperature_kl::gpu;
int main() {
  long classes, size, limit;
  while (std::scanf("%ld %ld %ld", &classes, &size, &limit) == 3) {
    const LongRowsPlan p = plan(classes, size, limit);
    const int vectors = vectors_of_block(classes, size, p.ranks);
    std::printf("%d %d %d %ld\n", p.threads, p.ranks, vectors, (long)shared_bytes(p.threads, vectors, p.ranks));
  }
}
"""
    long_names = ("threads", "ranks", "vectors", "shared")
    rows = [(classes, size, 227 << 10) for classes, size in sorted(long_row_shapes())]
    found |= {f"rows of {c} classes of {size} bytes": plan for (c, size, _), plan in zip(rows, _run(program, long_names, rows), strict=True)}
    return found


def _run(program: str, names: tuple[str, ...], asked: Sequence[tuple[int, ...]]) -> list[dict[str, int]]:
    """Compile a program, and return the numbers that it prints for each line of input."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "plan.cpp", Path(folder) / "plan"
        source.write_text(program)
        subprocess.run([os.environ.get("CXX", "g++"), "-std=c++17", f"-I{CUDA_SOURCES}", str(source), "-o", str(binary)], check=True)
        text = "".join(" ".join(map(str, line)) + "\n" for line in asked)
        lines = subprocess.run([str(binary)], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    return [dict(zip(names, map(int, line.split()), strict=True)) for line in lines]


# -------------------------------------------------------------------------------------- parts


def _parts(kernel: str, segments: list[tuple[str, Segment]]) -> dict[str, dict]:
    """Return the parts of a kernel's code that the model uses, by name.

    "once" is the code outside of loops, "loops" the sum of all loops. PARTS names further parts of
    kernels with loops of different lengths.
    """
    found = {
        "once": _merged([segment for stage, segment in segments if segment.depth == 0 and segment.function == ""]),
        "loops": _merged([segment for stage, segment in segments if segment.depth > 0]),
    }
    if not kernel.startswith("_"):
        del found["loops"]  # the CUDA kernels have loops of many lengths
    for part in PARTS.get(kernel.partition("<")[0], ()):
        selected = _select(part, segments, kernel)
        if selected is not None:
            found[part.name] = selected
    return {name: _as_json(segment) for name, segment in found.items()}


def _select(part: Part, segments: list[tuple[str, Segment]], kernel: str) -> Segment | None:
    """Return the segment with the most of what the part looks for, for one unit of its work."""

    def amount(segment: Segment, what: str) -> int:
        special = {"total": segment.total, "load_bytes": segment.load_bytes, "store_bytes": segment.store_bytes}
        if what == "wide copy":  # asynchronous copies of 16 bytes
            return segment.copies.get(16, 0)
        return special.get(what, segment.instructions.get(what, 0))

    candidates = [
        segment
        for stage, segment in segments
        if (not part.function or stage == part.function)
        and segment.depth >= part.depth
        and segment.innermost == part.innermost
        and amount(segment, part.most) > 0
        and (not part.unit or amount(segment, part.unit) > 0)
        and not any(amount(segment, what) for what in part.without)
        and all(amount(segment, what) for what in part.has)
        and all(amount(segment, what) == count for what, count in part.exactly)
    ]
    candidates.sort(key=lambda segment: amount(segment, part.most), reverse=True)
    if len(candidates) <= part.rank:
        if "double" in kernel:  # the model has no case in float64
            return None
        raise SystemExit(
            f"{kernel} has no loop for the part {part.name!r} in {part.function or 'any function'}: "
            f"adapt PARTS in benches/gpu_inputs.py to the compiled code. Its loops are\n"
            + "\n".join(f"{stage}: {segment}" for stage, segment in segments if segment.depth > 0 and part.function in ("", stage))
            + f"\n{part}"
        )
    best = candidates[part.rank]
    count = amount(best, part.unit) / part.per_unit if part.unit else 1
    return _scaled(best, 1 / count)


def _merged(segments: list[Segment]) -> Segment:
    first = segments[0] if segments else Segment("", "", 0, False, {}, {}, {}, {}, 0, 0, 0, 0.0, 0.0)

    def total(name: str) -> dict:
        return dict(sorted(sum((Counter(getattr(segment, name)) for segment in segments), Counter()).items()))

    return replace(
        first, instructions=total("instructions"), loads=total("loads"), stores=total("stores"), copies=total("copies"),
        exponentials=sum(s.exponentials for s in segments), shared_bytes=sum(s.shared_bytes for s in segments),
        bytes_in_flight=max((s.bytes_in_flight for s in segments), default=0), chain_cycles=sum(s.chain_cycles for s in segments),
        load_rounds=round(sum(s.load_rounds for s in segments), 2),
    )  # fmt: skip


def _scaled(segment: Segment, factor: float) -> Segment:
    def times(counts: dict) -> dict:
        return {key: round(value * factor, 3) for key, value in counts.items()}

    return replace(
        segment, instructions=times(segment.instructions), loads=times(segment.loads), stores=times(segment.stores),
        copies=times(segment.copies), exponentials=segment.exponentials * factor,  # type: ignore[arg-type]
        shared_bytes=round(segment.shared_bytes * factor, 3), chain_cycles=round(segment.chain_cycles * factor, 2),  # type: ignore[arg-type]
        load_rounds=round(segment.load_rounds * factor, 3),
    )  # fmt: skip


def _as_json(segment: Segment) -> dict:
    kept = {name: value for name, value in asdict(segment).items() if name not in ("line", "function", "depth", "innermost") and value}
    return kept
