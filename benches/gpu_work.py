"""What each kernel does for an input: bytes, instructions, and the serial chain of a block.

Counts of instructions come from the compiled code (the parts of a kernel, see gpu_inputs.py).
This module adds how often each part runs, which the source code of the kernels determines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import ceil, log2

from .gpu_device import L2_LATENCY, WARP, Device, Kernel, PartFacts, Work
from .gpu_inputs import Case
from .gpu_sass import LATENCY

Plan = Mapping[str, int]  # of the CUDA kernels, see _plans in gpu_compile.py


def repeat(*parts: tuple[PartFacts, float]) -> dict[str, float]:
    """Return the instructions by unit if warps run each part the given number of times in total."""
    total: Counter[str] = Counter()
    for part, times in parts:
        for unit, count in part.instructions.items():
            total[unit] += count * times  # type: ignore[assignment]
    return dict(total)


def _power_of_two(n: float) -> int:
    return 1 << max(0, ceil(log2(n)))


def _streaming(kernel: Kernel, blocks: int, read: float, written: float, trips: float, device: Device, cached: bool = False) -> Work:
    """Return the work of a kernel that runs its code outside of loops once, and all loops `trips`
    times. With `cached`, its data are in the L2 cache, and in the L1 cache after the first loop.
    """
    once, loops = kernel.parts["once"], kernel.parts["loops"]
    warps = blocks * kernel.warps
    waits = once.load_rounds + trips * (min(2, loops.load_rounds) if cached else loops.load_rounds)
    chain = once.chain_cycles + trips * loops.chain_cycles
    return Work(
        blocks=blocks,
        memory_bytes=0 if cached else read + written,
        load_bytes=0 if cached else read,
        instructions=repeat((once, warps), (loops, warps * trips)),
        block_cycles=chain + (waits * L2_LATENCY * device.clock if cached else 0),
        block_waits=0 if cached else waits,
        bytes_in_flight=0 if cached else max(once.bytes_in_flight, loops.bytes_in_flight) * kernel.threads,
    )


# ------------------------------------------------------------------------------ temperature_kl


def _kl_shape(case: Case) -> tuple[int, int]:
    classes = case.shape[1] if len(case.shape) > 2 else case.shape[-1]
    return case.numbers // classes, classes


def short_rows(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    n = case.numbers * case.number_size
    return _streaming(kernel, blocks, 2 * n, n, 0, device)


def long_rows(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """Each group of 8 tiles of 512 classes is read twice: for the statistics and the gradient. The
    second read needs the memory unless what is read and written between the two fits the L2 cache.
    """
    rows, classes = _kl_shape(case)
    groups = ceil(classes / 4096)
    programs = 25 * device.multiprocessors
    lag = min(rows, ceil(programs / groups) + 1)
    row_bytes = classes * case.number_size
    reads = 2 if lag * 3 * row_bytes < device.l2 else 4
    tiles = rows * groups * 8
    statistics, gradient = kernel.parts["statistics"], kernel.parts["gradient"]
    per_program = tiles / min(programs, 2 * rows * groups)
    return Work(
        blocks=programs,
        memory_bytes=(reads + 1) * rows * row_bytes,
        load_bytes=reads * rows * row_bytes,
        instructions=repeat((statistics, tiles), (gradient, tiles)),
        block_cycles=per_program * (statistics.chain_cycles + gradient.chain_cycles),
        block_waits=per_program * (statistics.load_rounds + gradient.load_rounds),
        bytes_in_flight=min(statistics.bytes_in_flight, gradient.bytes_in_flight) * kernel.threads,
    )


def long_rows_cuda(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """A cluster reads each of its rows once. A thread computes vectors of 16 bytes.

    In float32 the gradient is a pass of its own. The loop for the sums contains the code for the
    first and the last vector of a row, which the others skip.
    """
    rows, classes = _kl_shape(case)
    ranks = plan["ranks"]
    vectors, clusters = ceil(classes * case.number_size / 16), blocks // ranks
    parts = [kernel.parts[name] for name in ("request", "sums", "terms", *(("gradient",) if case.dtype == "float32" else ()))]
    row = kernel.parts["row"]
    per_thread = ceil(plan["vectors"] / kernel.threads)
    n = case.numbers * case.number_size
    return Work(
        blocks=blocks,
        memory_bytes=3 * n,
        load_bytes=2 * n,
        instructions=repeat((row, rows * ranks * kernel.warps), *((part, rows * vectors / WARP) for part in parts)),
        block_cycles=ceil(rows / clusters) * (row.chain_cycles + per_thread * sum(part.chain_cycles for part in parts)),
        block_waits=ceil(rows / clusters),
        bytes_in_flight=plan["shared"],
        dynamic_shared=plan["shared"],
    )


def any_rows(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    _, classes = _kl_shape(case)
    if case.numbers >= 1 << 23:  # the kernels for ordinary rows have computed them
        return Work(blocks, idle=True)
    n = case.numbers * case.number_size
    tile = 512
    trips = 1.0 if _power_of_two(classes) <= 2048 else ceil(classes / tile)
    return _streaming(kernel, blocks, 2 * n, n, trips, device)


# ------------------------------------------------------------------------------ attention_pool


def pool(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    batch, channels = case.shape[:2]
    positions = case.numbers // batch // channels
    loops = kernel.parts["loops"]
    tile = kernel.threads * loops.load_bytes / case.number_size
    block_positions = _power_of_two(positions / (blocks / batch))
    return _streaming(kernel, blocks, case.numbers * case.number_size, batch * positions * 4, ceil(channels * block_positions / tile), device)


def map_rows(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """Kernels that process the map of a sample, which is in the L2 cache."""
    positions = case.numbers // case.shape[0] // case.shape[1]
    block = min(1024, max(32, _power_of_two(positions)))
    return _streaming(kernel, blocks, 0, 0, ceil(positions / block), device, cached=True)


def scatter(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    n = case.numbers * case.number_size
    return _streaming(kernel, blocks, n, n, 0, device)


# ----------------------------------------------------------------------------- rbf_correlation


def mark(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    batch, m, n, columns = case.shape
    part, trips = kernel.parts["range"], ceil(m / 256) + ceil(n / 256)
    warps = blocks * kernel.warps
    return Work(
        blocks=blocks,
        memory_bytes=2 * batch * (m + n) * columns * case.number_size,
        load_bytes=2 * batch * (m + n) * columns * case.number_size,
        instructions=repeat((kernel.parts["once"], warps), (part, warps * trips)),
        block_cycles=kernel.parts["once"].chain_cycles + trips * part.chain_cycles,
        block_waits=trips * part.load_rounds,
        bytes_in_flight=part.bytes_in_flight * kernel.threads,
    )


def terms(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """The kernel with 8 terms; columns of random features of norm 1 need no more.

    The kernel with 16 terms, which has more threads, finds nothing to do.
    """
    if kernel.threads > 128:
        return Work(blocks, idle=True)
    batch, m, n, columns = case.shape
    products, differentiate, term = (kernel.parts[name] for name in ("products", "differentiate", "term"))
    trips = ceil(m / 64) + ceil(n / 64)
    warps = blocks * kernel.warps
    read = 2 * batch * (m + n) * columns * case.number_size
    return Work(
        blocks=blocks,
        memory_bytes=2 * read + read / 2,
        load_bytes=2 * read,
        instructions=repeat((products, warps * trips), (differentiate, warps * trips), (term, warps * trips * 2 * 8)),
        fp64_products=2 * batch * columns * (m + n) * 16 * 16,
        block_cycles=trips * (products.chain_cycles + differentiate.chain_cycles + 2 * 8 * term.chain_cycles),
        block_waits=trips * (products.load_rounds + differentiate.load_rounds),
        bytes_in_flight=products.bytes_in_flight * kernel.threads,
    )


def correlation(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    batch, m, n, columns = case.shape
    size = case.number_size
    work = _streaming(kernel, blocks, batch * (m + n) * columns * size, batch * m * n * columns * size, 0, device)
    # Nearly all bytes are written. Loads are of x and y, which are in the L2 cache.
    return Work(blocks, work.memory_bytes, 0, work.instructions, block_cycles=kernel.parts["once"].cycles(device))


def correlation_backward(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    batch, m, n, columns = case.shape
    block_k = min(_power_of_two(columns), 128)
    block_n = 1024 // (8 * block_k)
    full = batch * m * n * columns * case.number_size
    return _streaming(kernel, blocks, full, full / 8, ceil(n / block_n), device)


# ------------------------------------------------------------------------ truncated_svd, CUDA

_LOAD = LATENCY["generic load"]
_PHASE = 2 * _LOAD + LATENCY["barrier"] + 6 * LATENCY["alu"]  # read and write shared memory, addresses, barrier
_SHUFFLES = 5 * (LATENCY["shuffle"] + LATENCY["fma"])
_ROOT_AND_QUOTIENT = 150  # a square root and a division in float32, one after the other
_DOUBLE_DIVISION = 150


def _reduction(warps: int, double: bool = False) -> float:
    """Cycles of a sum over a block: shuffles, a barrier, and the sums of the warps."""
    shuffles = _SHUFFLES * (2 if double else 1)
    return _PHASE + shuffles + (0 if warps == 1 else LATENCY["shared"] + LATENCY["barrier"] + warps * LATENCY["fma"] * (2 if double else 1))


def _orthonormalization(count: int, n: int, threads: int) -> float:
    """Cycles of orthonormalize() for vectors of length n, with two passes for all but the first."""
    warps, steps = threads // WARP, ceil(n / threads)
    each = _PHASE + (steps - 1) * _LOAD
    one = each + _reduction(warps, True) + (steps - 1) * 2 * LATENCY["fp64"] + _DOUBLE_DIVISION
    return sum(
        one if j == 0 else 2 * (one + each + _reduction(1, True) + ceil(n / WARP) * 2 * LATENCY["fp64"] * ceil(j / warps)) for j in range(count)
    )


def _reflections(p: int, global_loads: float) -> float:
    """Cycles of apply_q(): p dependent steps of one warp for each vector."""
    step = 2 * _LOAD + global_loads + _SHUFFLES + 4 * LATENCY["fma"] + _PHASE - LATENCY["barrier"]
    return sum(step + (ceil(i / WARP) - 1) * (2 * LATENCY["fma"] + 8) for i in range(2, p))


class _Matrix:
    """Sizes of a case of truncated_svd: M is p x q with p <= q."""

    def __init__(self, case: Case, plan: Plan):
        self.batch, rows, columns, self.k = case.shape
        self.tall = rows >= columns
        self.p, self.q = min(rows, columns), max(rows, columns)
        self.threads = plan.get("threads", 256)
        self.columns = plan.get("tile_columns", 16)
        self.tiles = ceil(self.q / self.columns)
        self.bytes = self.batch * self.p * self.q * case.number_size
        self.tile_bytes = self.columns * self.p * case.number_size


def _copy_cycles(m: _Matrix, copy: PartFacts, warps: int, multiprocessor_warps: float) -> float:
    """Cycles to issue the copies of a tile: of one warp, or of all warps of the multiprocessor."""
    per_lane = ceil(m.p / WARP) * ceil(m.columns / warps)
    return max(per_lane * copy.chain_cycles, per_lane * copy.total * multiprocessor_warps / 4)


def svd_forward_stages(case: Case, kernel: Kernel, device: Device, plan: Plan, resident: int) -> dict[str, float]:
    """Return the cycles of each stage of the forward kernel for one matrix."""
    m, parts = _Matrix(case, plan), kernel.parts
    p, k, threads = m.p, m.k, m.threads
    warps = threads // WARP
    multiprocessor_warps = resident * kernel.warps
    block = 8
    side = ceil(p / block)
    blocks = side * (side + 1) // 2
    rounds = ceil(blocks / threads)
    at_once = min(blocks, threads)
    groups = min(threads // at_once, m.columns)
    gram = parts["gram"]
    columns_per_thread = ceil(m.columns / groups)
    busy_warps = multiprocessor_warps * min(1.0, at_once * groups / threads)
    multiply = columns_per_thread * max(gram.chain_cycles, gram.total * busy_warps / 4)
    copy = _copy_cycles(m, parts["copy"], warps, multiprocessor_warps)
    stages = {
        "load M": rounds * m.tiles * copy,
        "Gram matrix": rounds * m.tiles * (multiply + 2 * LATENCY["barrier"]),
        "add the groups": rounds * groups * parts["gram store"].chain_cycles,
        "scaling": 2 * _reduction(warps) + ceil(p / warps) * ceil(p / WARP) * 3 * _LOAD,
    }
    sweeps = 0.0
    for i in range(2, p):
        rows = 4 if i >= 128 else 1
        part = parts["sweep of 4 rows" if rows == 4 else "sweep of 1 row"]
        distance = ceil(i / rows)
        shares = min(8, max(1, threads // distance))
        active = max(1.0, min(threads, distance * shares) / WARP) * multiprocessor_warps / warps
        sweeps += ceil(i / shares) * max(part.chain_cycles, part.total * active / 4)
    stages["tridiagonal form, sweeps"] = sweeps
    stages["tridiagonal form, reductions"] = p * (2 * _reduction(warps) + 2 * _PHASE + _ROOT_AND_QUOTIENT)
    points = min(31, max(1, threads // k))
    searches = ceil(26 / log2(points + 1))
    tasks_per_thread = ceil(k * points / threads)
    stages["eigenvalues"] = searches * (tasks_per_thread * p * parts["sturm"].chain_cycles + 2 * _PHASE)
    solve = sum(parts[name].chain_cycles for name in ("forward substitution", "back substitution", "scaling"))
    passes = ceil(k / 8)
    stages["eigenvectors, elimination"] = passes * p * (parts["factor"].chain_cycles + 3 * solve)
    stages["eigenvectors, orthonormal"] = 3 * _orthonormalization(k, p, threads)
    stages["reflections"] = ceil(k / warps) * _reflections(p, 0)
    if not m.tall:
        dots = ceil(m.columns * k / threads) * (p / 4) * 30
        stages["larger side"] = m.tiles * (copy + dots) + ceil(k / warps) * ceil(m.q / WARP) * (20 + _DOUBLE_DIVISION)
    stages["signs"] = 6 * _PHASE + 2 * _SHUFFLES + ceil((p if m.tall else m.q) / WARP) * 20
    return stages


def svd_forward(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    m = _Matrix(case, plan)
    shared = plan["forward_shared"] * plan["matrices_per_block"]
    resident = min(kernel.resident_blocks(device, shared), ceil(blocks / device.multiprocessors))
    stages = svd_forward_stages(case, kernel, device, plan, resident)
    reads = 1 if m.tall else 2
    return Work(
        blocks=blocks,
        memory_bytes=reads * m.bytes,
        load_bytes=reads * m.bytes,
        block_cycles=sum(stages.values()),
        block_waits=reads,
        bytes_in_flight=(plan["tiles_in_flight"] - 1) * m.tile_bytes * plan["matrices_per_block"],
        dynamic_shared=shared,
        stages=stages,
    )


def svd_solve(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """The solve with the saved form. M is read only if the larger side has a gradient."""
    m, parts = _Matrix(case, plan), kernel.parts
    p, k, warps = m.p, m.k, m.threads // WARP
    shared = plan["solve_shared"] * plan["matrices_per_block"]
    l2 = L2_LATENCY * device.clock
    passes = ceil(k / 8)
    resident = min(kernel.resident_blocks(device, shared), ceil(blocks / device.multiprocessors))
    stages = {
        "scale of the gradients": 3 * (_reduction(warps) + l2),
        "projections": 2 * k * (_reduction(1) + _LOAD) + 12 * _PHASE + 2 * l2,
        "reflections": 2 * ceil(k / warps) * _reflections(p, l2 + LATENCY["global load"]),
        "elimination": passes * p * (parts["elimination"].chain_cycles + parts["substitution"].chain_cycles),
    }
    if not m.tall:
        copy = _copy_cycles(m, parts["copy"], warps, resident * kernel.warps)
        products = ceil(k * p / m.threads) * m.columns * 20
        stages["right sides"] = m.tiles * (copy + products + LATENCY["barrier"])
        stages["differences"] = ceil(k * k / warps) * ceil(m.q / WARP) * 40
    return Work(
        blocks=blocks,
        memory_bytes=0 if m.tall else m.bytes,
        load_bytes=0 if m.tall else m.bytes,
        block_cycles=sum(stages.values()),
        block_waits=1,
        bytes_in_flight=0 if m.tall else (plan["tiles_in_flight"] - 1) * m.tile_bytes * plan["matrices_per_block"],
        dynamic_shared=shared,
        stages=stages,
    )


def svd_update(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    m, parts = _Matrix(case, plan), kernel.parts
    elements = m.batch * m.p * m.q
    columns = plan["update_tile_columns"]
    tiles = ceil(min(m.q, plan["update_columns"]) / columns)
    per_tile = ceil(m.p / WARP) * ceil(columns / kernel.warps)  # numbers that a lane copies and writes
    is_wide = not m.tall and m.p % 4 == 0  # a copy is 16 bytes long
    copy, per_copy = (parts["wide copy"], 4) if is_wide else (parts["copy"], 1)
    shares = kernel.threads // columns
    projections = ceil(ceil(m.p / 4) / shares)
    sums = ceil(columns * 4 / kernel.threads) * shares
    chain = per_tile * (copy.chain_cycles / per_copy + parts["write"].chain_cycles / 2) + projections * parts["projections"].chain_cycles
    chain += sums * 8 + 4 * _PHASE
    copies = repeat((copy, elements / WARP / per_copy), (parts["write"], elements / WARP), (parts["projections"], elements / 4 / WARP))
    return Work(
        blocks=blocks,
        memory_bytes=2 * m.bytes,
        load_bytes=m.bytes,
        instructions=copies,
        block_cycles=tiles * chain + parts["once"].chain_cycles,
        block_waits=2,
        bytes_in_flight=min(tiles, plan["update_tiles_in_flight"] - 1) * columns * m.p * case.number_size,
        dynamic_shared=plan["update_shared"],
    )


def align_cuda(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """One warp for each vector: a cosine with each of the student's vectors, twice for ties."""
    batch, n, students, k = case.shape
    size = case.number_size
    l2 = L2_LATENCY * device.clock
    forward = "forward" in kernel.name
    cosine = l2 + ceil(n / WARP) * (LATENCY["fp64"] + 4) + 2 * _SHUFFLES
    chain = 2 * students * cosine + 2 * l2 if forward else 3 * l2 + k * l2
    read = batch * (students + k) * n * size
    written = batch * (2 * k if forward else students) * n * size
    return Work(
        blocks, read + written, read, block_cycles=chain, block_waits=1, bytes_in_flight=kernel.parts["once"].bytes_in_flight * kernel.threads
    )


# ---------------------------------------------------------------------- truncated_svd, Triton


def svd_gram_triton(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    m = _Matrix(case, plan)
    side = min(max(16, _power_of_two(m.p)), 64)
    blocks_of_matrix = blocks // m.batch
    part = kernel.parts["products"]
    trips = ceil(m.q / 32)
    warps = blocks * kernel.warps
    return Work(
        blocks=blocks,
        memory_bytes=m.bytes + m.batch * m.p * m.p * 4,
        load_bytes=m.bytes,
        instructions=repeat((kernel.parts["once"], warps), (part, warps * trips)),
        tf32_products=3 * m.batch * blocks_of_matrix * side * side * m.q,
        block_cycles=kernel.parts["once"].chain_cycles + trips * part.chain_cycles,
        block_waits=trips * part.load_rounds,
        bytes_in_flight=max(part.bytes_in_flight, 2 * part.copy_bytes) * kernel.threads,  # Triton copies two steps ahead
    )


def svd_decompose_triton(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """One program per matrix; the matrix and the vectors are in global memory (L2 cache)."""
    m, parts = _Matrix(case, plan), kernel.parts
    p, k = m.p, m.k
    rows = max(1, 2048 // max(16, _power_of_two(p)))
    cycles = {name: part.cycles(device) for name, part in parts.items()}
    solve = cycles["forward substitution"] + cycles["back substitution"]
    stages = {
        "tridiagonal form": p * cycles["tridiagonal step"] + sum(ceil(i / rows) for i in range(p)) * cycles["tridiagonal block"],
        "eigenvalues": 6 * p * cycles["sturm"],
        "eigenvectors, elimination": p * (cycles["factor"] + 3 * solve),
        "eigenvectors, orthonormal": 4 * (k * cycles["orthonormalization"] + 3 * k * (k - 1) / 2 * cycles["projection"]),
        "reflections": p * cycles["reflection"],
    }
    return Work(blocks, block_cycles=sum(stages.values()) + cycles["once"], stages=stages)


def svd_solve_triton(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    m, parts = _Matrix(case, plan), kernel.parts
    p, k = m.p, m.k
    cycles = {name: part.cycles(device) for name, part in parts.items()}
    stages = {
        "reflections": 2 * p * cycles["reflection"],
        "elimination": p * (cycles["elimination"] + cycles["substitution"]),
        "projections": 4 * k * cycles["projection"],
    }
    return Work(blocks, block_cycles=sum(stages.values()) + cycles["once"], stages=stages)


def svd_update_triton(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    m = _Matrix(case, plan)
    return _streaming(kernel, blocks, m.bytes, m.bytes, m.k, device)


def svd_project_triton(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    m = _Matrix(case, plan)
    return _streaming(kernel, blocks, m.bytes, m.batch * m.k * m.q * 4, m.k, device)


def svd_product_triton(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    m = _Matrix(case, plan)
    return _streaming(kernel, blocks, m.bytes, 0, m.k * ceil(m.q / 64), device)


def svd_finish_triton(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """The vectors of the larger side: norms, divisions and signs, for each of the k vectors."""
    m = _Matrix(case, plan)
    return _streaming(kernel, blocks, 0, 0, m.k * ceil(m.q / 1024) / 2, device, cached=True)


def align_triton(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    batch, n, students, k = case.shape
    block = min(1024, max(128, _power_of_two(n)))
    trips = (2 * students if kernel.name == "_align_kernel" else k) * ceil(n / block)
    work = _streaming(kernel, blocks, 0, 0, trips, device, cached=True)
    return Work(blocks, batch * (2 * k + students) * n * case.number_size, 0, work.instructions, block_cycles=work.block_cycles)


def idle(case: Case, kernel: Kernel, blocks: int, device: Device, plan: Plan) -> Work:
    """A kernel that returns at once: it rescales by 1, or its method is not used for the input."""
    return Work(blocks, idle=True)


WORK: dict[str, Callable[[Case, Kernel, int, Device, Plan], Work]] = {
    "_short_rows_kernel": short_rows,
    "_long_rows_kernel": long_rows,
    "long_rows_kernel": long_rows_cuda,
    "_kl_kernel": any_rows,
    "_rescale_kernel": idle,
    "_rescale_rows_kernel": idle,
    "_pool_kernel": pool,
    "_transfer_kernel": map_rows,
    "_normalize_kernel": map_rows,
    "_weight_kernel": map_rows,
    "_scatter_kernel": scatter,
    "_mark_kernel": mark,
    "_terms_kernel": terms,
    "_pairs_kernel": idle,
    "_correlation_kernel": correlation,
    "_correlation_backward_kernel": correlation_backward,
    "_gram_kernel": svd_gram_triton,
    "_decompose_kernel": svd_decompose_triton,
    "_project_kernel": svd_project_triton,
    "_finish_kernel": svd_finish_triton,
    "_product_kernel": svd_product_triton,
    "_solve_kernel": svd_solve_triton,
    "_update_kernel": svd_update_triton,
    "_align_kernel": align_triton,
    "_align_backward_kernel": align_triton,
    "forward_kernel": svd_forward,
    "solve_kernel": svd_solve,
    "update_kernel": svd_update,
    "align_kernel": align_cuda,
}
