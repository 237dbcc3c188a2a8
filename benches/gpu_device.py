"""GPUs, compiled kernels, and the prediction of a kernel's time from what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WARP = 32
# Assumptions of the model, which docs/gpu_model.md explains.
SHARE_OF_BANDWIDTH = 0.88  # of the memory bandwidth in the datasheet: a copy on an H100 reached 2.95 of 3.35 TB/s
MEMORY_LATENCY = 700e-9  # seconds from a load to its data, if the memory system is busy
L2_LATENCY = 150e-9
# Seconds from the start of a kernel to its end, if it does nothing: two such kernels took 3.9
# microseconds on an H100.
START = 2.0e-6


@dataclass(frozen=True)
class Device:
    """Numbers of a GPU's datasheet and of the CUDA programming guide. Rates are per clock cycle."""

    name: str
    target: str  # the architecture for which its kernels are compiled
    multiprocessors: int
    clock: float  # Hz, the boost clock
    bandwidth: float  # bytes per second of the memory
    l2: int  # bytes
    fp32_lanes: int  # float32 operations that a multiprocessor starts
    fp64_lanes: int
    tf32_products: int  # products in its tensor cores
    fp64_products: int
    shared: int  # bytes of shared memory of a multiprocessor
    largest_shared: int  # of a block
    alu_lanes: int = 64  # comparisons, logic and integer additions
    mufu_lanes: int = 16  # exponentials, reciprocals, square roots
    issues: int = 4  # instructions of warps
    warps: int = 64
    blocks: int = 32
    registers: int = 65536

    @property
    def bytes_in_flight_needed(self) -> float:
        """Bytes that a multiprocessor must have requested at any time, by Little's law."""
        return self.bandwidth * SHARE_OF_BANDWIDTH * MEMORY_LATENCY / self.multiprocessors


DEVICES = {
    "A100 80GB": Device("A100 80GB", "sm_80", 108, 1.41e9, 2.039e12, 40 << 20, 64, 32, 512, 64, 164 << 10, 163 << 10),
    "H100 SXM": Device("H100 SXM", "sm_90", 132, 1.98e9, 3.35e12, 50 << 20, 128, 64, 945, 128, 228 << 10, 227 << 10),
    "H200": Device("H200", "sm_90", 132, 1.98e9, 4.8e12, 50 << 20, 128, 64, 945, 128, 228 << 10, 227 << 10),
    "B200": Device("B200", "sm_100", 148, 1.965e9, 8.0e12, 126 << 20, 128, 64, 1890, 64, 228 << 10, 227 << 10),
}


@dataclass(frozen=True)
class PartFacts:
    """Counts for one thread of a part of a kernel, see Segment in gpu_sass.py."""

    instructions: Mapping[str, float] = field(default_factory=dict)
    loads: Mapping[str, float] = field(default_factory=dict)  # by width in bytes
    stores: Mapping[str, float] = field(default_factory=dict)
    copies: Mapping[str, float] = field(default_factory=dict)
    exponentials: float = 0
    shared_bytes: float = 0
    bytes_in_flight: float = 0
    chain_cycles: float = 0
    load_rounds: float = 0

    @property
    def total(self) -> float:
        return sum(self.instructions.values())

    @property
    def load_bytes(self) -> float:
        return sum(int(width) * count for width, count in self.loads.items())

    @property
    def copy_bytes(self) -> float:
        return sum(int(width) * count for width, count in self.copies.items())

    def cycles(self, device: Device, latency: float = L2_LATENCY) -> float:
        """Return the cycles of a single warp, if global loads take `latency` seconds."""
        return self.chain_cycles + self.load_rounds * latency * device.clock


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel."""

    name: str
    threads: int  # of a block
    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes of a block that Triton or the kernel itself reserves
    parts: Mapping[str, PartFacts]

    @property
    def warps(self) -> int:
        return self.threads // WARP

    def resident_blocks(self, device: Device, dynamic_shared: int = 0) -> int:
        """Return how many blocks a multiprocessor runs at a time; 0 if a block does not fit."""
        registers_of_warp = -(-self.registers * WARP // 256) * 256
        shared = self.shared + dynamic_shared
        if shared > device.largest_shared:
            return 0
        limits = [
            device.blocks,
            device.warps // self.warps,
            device.registers // registers_of_warp // self.warps,
            device.shared // (-(-(shared + 1024) // 128) * 128),  # the system reserves 1 KiB of each block
        ]
        return min(limits)


@dataclass(frozen=True)
class Work:
    """What a launch of a kernel does."""

    blocks: int
    memory_bytes: float = 0  # read from and written to the memory of the GPU
    load_bytes: float = 0  # the part of them that is read
    instructions: Mapping[str, float] = field(default_factory=dict)  # of warps, by unit, in all blocks
    tf32_products: float = 0
    fp64_products: float = 0
    block_cycles: float = 0  # the serial chain of a block, without waiting for memory
    block_waits: float = 0  # how often the chain waits for the memory
    bytes_in_flight: float = 0  # of a block
    dynamic_shared: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)  # cycles of the chain by stage
    idle: bool = False  # the kernel has nothing to do for this input


@dataclass(frozen=True)
class Prediction:
    """Seconds that each limit allows at least, and the predicted time."""

    limits: Mapping[str, float]
    resident_blocks: int
    resident_warps: int
    bytes_in_flight: float  # of a multiprocessor
    needed: float  # bytes in flight that the memory system needs

    @property
    def seconds(self) -> float:
        return START + max(self.limits.values(), default=0.0)

    @property
    def binds(self) -> str:
        """Return the limit that decides, or "launch" if all are shorter than the start."""
        name = max(self.limits, key=lambda limit: self.limits[limit], default="launch")
        return name if self.limits and self.limits[name] > START else "launch"

    @property
    def fills_memory(self) -> bool:
        return self.bytes_in_flight >= self.needed


def predict(kernel: Kernel, work: Work, device: Device) -> Prediction:
    """Predict the time of a launch: the longest of the times that its limits allow."""
    resident = kernel.resident_blocks(device, work.dynamic_shared)
    # Blocks of a launch that does not fill the GPU are spread over the multiprocessors.
    concurrent = min(resident, -(-work.blocks // device.multiprocessors)) if work.blocks else 0
    in_flight = concurrent * work.bytes_in_flight
    limits: dict[str, float] = {}
    if not work.idle and resident:
        busy = min(device.multiprocessors, work.blocks)
        per_second = busy * device.clock

        def unit(name: str, *units: str, lanes: int) -> None:
            threads = WARP * sum(work.instructions.get(u, 0.0) for u in units)
            limits[name] = threads / (lanes * per_second)

        limits["bytes"] = work.memory_bytes / (device.bandwidth * SHARE_OF_BANDWIDTH)
        if in_flight:
            limits["bytes in flight"] = work.load_bytes * MEMORY_LATENCY / (in_flight * busy)
        limits["issue"] = sum(work.instructions.values()) / (device.issues * per_second)
        unit("FMA", "fma", lanes=device.fp32_lanes)
        unit("ALU", "alu", lanes=device.alu_lanes)
        unit("MUFU", "mufu", "convert", lanes=device.mufu_lanes)
        unit("FP64", "fp64", lanes=device.fp64_lanes)
        tensor_cycles = work.tf32_products / device.tf32_products + work.fp64_products / device.fp64_products
        limits["tensor cores"] = tensor_cycles / per_second
        waves = max(1.0, work.blocks / (device.multiprocessors * resident))
        limits["chain"] = waves * (work.block_cycles / device.clock + work.block_waits * MEMORY_LATENCY)
    return Prediction(limits, resident, concurrent * kernel.warps, in_flight, device.bytes_in_flight_needed if work.load_bytes else 0.0)
