"""Checks the launches of the Triton kernels for GPUs that are not present, without running them.

Usage: python triton_launches.py TARGETS CALLS [OP ...]. TARGETS are some of sm_80, sm_90, sm_100
and gfx942, CALLS some of "main", "double", "shapes", "cases" and "large" (see below). Both are
separated by commas.

The launchers of kdkernels/triton/ run on fake CUDA tensors. Triton's own code binds the arguments,
specialises the kernel on them and compiles it, exactly as on a GPU: an integer equal to 1 becomes a
constant, multiples of 16 and aligned pointers are marked as such, and a size above 2^31 is a 64-bit
integer. Only the GPU's driver is replaced: the fake driver checks each launch and runs nothing. So
no result is computed here; the tests in Triton's interpreter check the numbers. A fake tensor has
no memory, so its size is not limited.

Checks:
- Every launch: a driver accepts the grid, all tensors are on the device of the launch, and Triton
  can bind and specialise the arguments.
- Triton's front end, which checks types, translates a specialisation if it contains a pair of
  switches or argument types that was not translated before. The compiler's later stages depend on
  sizes and alignment too; the front end does not.
- The calls named in COMPILED, which are "main" and "double", are compiled to machine code (with
  ptxas for NVIDIA GPUs) and must not spill registers.
With KDKERNELS_REHEARSE=all in the environment, every specialisation is compiled to machine code,
which takes many minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from functools import partial
from types import SimpleNamespace

import torch
import triton
import triton.compiler
from cases import KL_CASES, KLCase
from correlation_cases import CORRELATION_CASES, CorrelationCase
from cuda_sources import binary_tool
from feature_cases import FEATURE_CASES, FeatureCase
from matrix_cases import LAYOUTS, with_layout
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import compile as triton_compile
from triton.compiler.compiler import make_backend
from triton.runtime import driver

from kdkernels.options import VALUES, Reduction, Sign

# Bytes of stack that a kernel may use. Triton 3.6, which torch 2.10 and 2.11 use, allocates
# registers less well: it spills up to 128 bytes in two kernels that later versions compile without
# spills.
STACK = 128 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0
# Kernels that may spill more: with a limit of 80 registers, more programs share a multiprocessor,
# and on an H100 the kernel is faster than without a limit and without spills.
STACKS = {"_short_rows_kernel": 128}
# Bytes of shared memory that a program may use on each GPU.
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


def gpu_target(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


class FakeDriver:
    """Replaces the GPU's driver in Triton. It has two devices, of which one is current.

    The fake drivers of one process must not share devices, because Triton caches compiled kernels
    by device.
    """

    def __init__(self, name: str, first_device: int = 0):
        self.name, self.target = name, gpu_target(name)
        self.utils = self
        self.first_device = self.device = self.device_of_tensors = first_device
        self.all_stages = False  # whether every specialisation is compiled to machine code
        self.translated: Counter[str] = Counter()
        self.pairs: dict[str, set] = defaultdict(set)
        self.launches: Counter[str] = Counter()
        self.specialised: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.name]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int):
        """Return the module, the function, its registers, bytes of stack and largest number of
        threads, as a driver does. ptxas has written the numbers into the binary.
        """
        self.compiled[name] += 1
        if self.target.backend == "hip":
            return object(), name, 0, 0, 1024
        registers, stack = resource_usage(binary)
        if stack > max(STACK, STACKS.get(name, 0)):
            raise AssertionError(f"{name} spills: {registers} registers and {stack} bytes of stack")
        return object(), name, registers, stack, min(1024, 65536 // (registers + -registers % 8) // 32 * 32)

    def unload_module(self, module) -> None:
        pass

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.check(metadata.name, (x, y, z), arguments)

        return launch

    def compile(self, source, target: GPUTarget, options: dict, **others):
        """Replaces triton.compile."""
        name = source.fn.__name__
        self.specialised[name] += 1
        if self.all_stages:
            return triton_compile(source, target=target, options=options, **others)
        names = source.fn.arg_names
        properties = {(name,): kind for name, kind in source.signature.items()}
        properties |= {
            (names[first], *rest): front_end_property(value) for (first, *rest), value in source.constants.items()
        }  # rest: position in a tuple
        pairs = set(itertools.combinations(sorted((argument, str(value)) for argument, value in properties.items()), 2))
        kernel = UncompiledKernel(self, name)
        if not pairs <= self.pairs[name]:
            self.pairs[name] |= pairs
            self.translated[name] += 1
            kernel.translate(source, target, options)
        return kernel

    def check(self, name: str, grid: tuple[int, int, int], arguments: tuple) -> None:
        """Raise for a launch that a driver would reject, or that Triton's launcher would silently
        skip.
        """
        if not (1 <= grid[0] < 2**31 and 1 <= grid[1] <= 65535 and 1 <= grid[2] <= 65535):
            raise AssertionError(f"{name} cannot be launched over the grid {grid}")
        if grid[0] * grid[1] * grid[2] >= 2**31:
            raise AssertionError(f"{name}: Triton multiplies the grid {grid} in 32 bits, and launches nothing where that is negative")
        for tensor in flattened(arguments):
            if isinstance(tensor, Tensor) and tensor.device != torch.device("cuda", self.device):
                raise AssertionError(f"{name} is launched on device {self.device} and takes a tensor of {tensor.device}")
        self.launches[name] += 1

    @contextlib.contextmanager
    def current(self, device: torch.device):
        """Replaces torch.cuda.device."""
        before, self.device = self.device, torch.device(device).index
        try:
            yield
        finally:
            self.device = before


def flattened(arguments: tuple):
    """Yield the arguments of a launch one by one, also those within tuples."""
    for argument in arguments:
        yield from flattened(argument) if isinstance(argument, tuple) else (argument,)


def front_end_property(constant) -> str:
    """Return the property of a constant on which the front end depends.

    It depends on the value of a switch, but not on the exact value of block sizes and other
    numbers.
    """
    if isinstance(constant, int) and constant > 3:
        return "several"
    if isinstance(constant, float):
        return "zero" if constant == 0 else "not zero"
    return str(constant)


class UncompiledKernel:
    """Replaces the compiled kernel if a specialisation is only translated, or not compiled."""

    function = packed_metadata = None

    def __init__(self, fake_driver: FakeDriver, name: str):
        self.run = fake_driver.launcher_cls(None, SimpleNamespace(name=name))

    @staticmethod
    def translate(source, target: GPUTarget, options: dict) -> None:
        """Translate a kernel to Triton's first intermediate representation: types are checked and
        constants are folded.
        """
        backend = make_backend(target)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        parsed = backend.parse_options(options)
        source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of a thread.

    A kernel without local arrays uses the stack only for spilled registers.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([binary_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    assert registers, usage
    assert stack, usage
    return int(registers[1]), int(stack[1])


def _address(x: Tensor, blocks: dict = {}) -> int:  # noqa: B006  keeps one address for each storage
    storage = blocks.setdefault(x.untyped_storage()._cdata, (len(blocks) + 1) << 44)
    return storage + x.storage_offset() * x.element_size()


def _copy_(x: Tensor, other: Tensor) -> Tensor:
    return torch.ops.aten.copy_(x, other)


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else torch.clone(x, memory_format=memory_format)


@contextlib.contextmanager
def fake_gpu(target: str, first_device: int = 0):
    """Make CUDA tensors fake, and replace Triton's driver by a fake driver of the target."""
    fake_driver = FakeDriver(target, first_device)
    driver.set_active(fake_driver)
    triton.compiler.compile = fake_driver.compile
    FakeTensor.data_ptr = _address
    # These methods query the device before they check whether the tensor is fake.
    FakeTensor.contiguous, FakeTensor.copy_ = _contiguous, _copy_
    torch.cuda.device = fake_driver.current
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    torch.version.hip = "6.4" if fake_driver.target.backend == "hip" else None
    with FakeTensorMode():
        yield fake_driver


def as_fake_cuda(x: Tensor) -> Tensor:
    """Return a fake tensor of the same dtype, shape, strides and storage offset."""
    device = driver.active.device_of_tensors
    count = x.untyped_storage().nbytes() // x.element_size()
    return torch.empty(count, dtype=x.dtype, device=f"cuda:{device}").as_strided(x.shape, x.stride(), x.storage_offset())


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=f"cuda:{driver.active.device_of_tensors}")


# Calls of each op's launchers, as pairs (name, function without arguments). "cases" are the cases
# of the other tests, "shapes" are shapes of training, and "large" calls exceed 32 bits or the size
# of one dimension of a grid.


def kl_calls(kind: str):
    from kdkernels.triton import temperature_kl as kl

    def call(case: KLCase, flags):
        x = {name: None if v is None else as_fake_cuda(v) for name, v in case.make().items()}
        arguments = (
            x["student"],
            x["teacher"],
            case.temperature,
            x["temperature"],
            x["mask"],
            x["normalizer"],
            *(VALUES[name][o] if name in VALUES else o for name, o in case.options.items()),
        )
        for wanted in flags:
            if wanted in ("loss", "loss and gradient"):
                loss, grad, row_scale = kl.temperature_kl(*arguments, wanted != "loss")
            if wanted == "loss and gradient":
                for rescale in (kl.temperature_kl_rescale, kl.temperature_kl_rescale_):
                    rescale(grad, row_scale, torch.ones_like(loss), x["mask"], case.dim)
            elif wanted != "loss":
                upstream = empty(*(case.rows if case.reduction == "none" else ()), dtype=case.compute_dtype)
                kl.temperature_kl_backward(upstream, *arguments, [name in wanted for name in ("student", "teacher", "temperature")])

    everything = "student, teacher, temperature"
    if kind == "cases":
        for case in KL_CASES:
            yield case.name, partial(call, case, ["loss and gradient", everything])
        named = {case.name: case for case in KL_CASES}
        for name in ("one_by_one", "map_mask"):
            flags = ["loss", "student", "teacher", "temperature", "student, teacher", "student, temperature", "teacher, temperature"]
            yield f"{name} in parts", partial(call, named[name], flags)
    if kind == "shapes":
        bfloat16, float16, float64 = torch.bfloat16, torch.float16, torch.float64
        layouts = [
            ((128, 10), -1),
            ((128, 100), -1),
            ((256, 1000), -1),
            ((256, 4096), -1),
            ((512, 32000), -1),
            ((8, 21, 64, 64), 1),
            ((8, 1000, 8, 8), 1),
        ]
        for shape, dim in layouts:
            for dtype in (torch.float32, bfloat16):
                yield f"{shape} {dtype}", partial(call, KLCase("", shape, dim, student_dtype=dtype, teacher_dtype=dtype), ["loss and gradient"])
        for shape, dim in layouts[3:]:
            rows = dict(dim=dim, rows_temperature=True, mask=True)
            yield f"backward {shape}", partial(call, KLCase("", shape, **rows, student_dtype=bfloat16, teacher_dtype=bfloat16), [everything])
            yield f"backward with eps {shape}", partial(call, KLCase("", shape, **rows, target_eps=1e-7), [everything])
            yield f"jsd {shape}", partial(call, KLCase("", shape, **rows, direction="jsd"), ["loss and gradient"])
            jsd = KLCase("", shape, **rows, direction="jsd", student_dtype=float16, teacher_dtype=float16)
            yield f"jsd backward {shape}", partial(call, jsd, [everything])
        for shape in ((16384, 1000), (2048, 32000), (512, 128256)):
            for dtype in (torch.float32, bfloat16):
                yield (
                    f"fast {shape} {dtype}",
                    partial(call, KLCase("", shape, student_dtype=dtype, teacher_dtype=dtype), ["loss", "loss and gradient"]),
                )
        yield "fast map", partial(call, KLCase("", (32, 21, 128, 128), dim=1, mask=True, rows_temperature=True), ["loss and gradient", "student"])
        yield "fast rows", partial(call, KLCase("", (512, 32000), mask=True, rows_temperature=True), ["loss", "student"])
        yield "reverse", partial(call, KLCase("", (256, 1000), direction="reverse"), ["loss and gradient"])
        yield "cross entropy", partial(call, KLCase("", (256, 1000), include_entropy=False, rows_temperature=True, mask=True), [everything])
        yield "double", partial(call, KLCase("", (128, 100), student_dtype=float64, teacher_dtype=float64), ["loss and gradient", everything])
    if kind == "large":
        half = dict(student_dtype=torch.bfloat16, teacher_dtype=torch.bfloat16)
        yield "4e9 logits", partial(call, KLCase("", (1 << 17, 32000), **half), ["loss and gradient"])
        yield "4e9 logits of maps", partial(call, KLCase("", (256, 16, 1024, 1024), dim=1, **half), ["loss and gradient"])
        yield "3e9 rows", partial(call, KLCase("", (3 << 30, 2), **half), ["loss and gradient"])
        yield "3e9 classes", partial(call, KLCase("", (1, 3 << 30), **half), ["loss and gradient"])
        yield "one row of every thousandth", partial(call, KLCase("", (1 << 20, 2000), layout="strided", **half), ["loss and gradient"])


def attention_calls(kind: str):
    from kdkernels.triton import attention_pool as at

    def pool(case: FeatureCase, p, reduce, normalize):
        x = as_fake_cuda(case.make())
        options = (VALUES["reduce"][reduce], VALUES["normalize"][normalize], 1e-12)
        maps, norm, channel = at.attention_pool(x, p, *options)
        for grad in (torch.empty_like(maps), empty(1, dtype=maps.dtype).expand(maps.shape)):
            at.attention_pool_backward(grad, x, maps, norm, channel, p, *options)

    def transfer(case: FeatureCase, p, variant, reduce, flags):
        student = as_fake_cuda(case.make())
        teacher = as_fake_cuda(FeatureCase("", (case.shape[0], 4, *case.shape[2:]), torch.promote_types(torch.float32, case.dtype)).make())
        options = (VALUES["variant"][variant], VALUES["reduce"][reduce], 1e-12)
        for wanted in flags:
            if wanted in ("loss", "loss and gradient"):
                at.attention_transfer_loss(student, teacher, p, *options, wanted != "loss")
            else:
                upstream = empty(dtype=torch.promote_types(torch.float32, case.dtype))
                wants = [name in wanted for name in ("student", "teacher")]
                at.attention_transfer_loss_backward(upstream, student, teacher, p, *options, wants)

    option_sets = [
        (2.0, "mean", None),
        (2.0, "max", "l2"),
        (1.0, "sum", "softmax"),
        (1.5, "mean", "l2"),
        (3.0, "max", None),
        (2.7, "sum", "l2"),
        (4.0, "max", "softmax"),
    ]
    every = ["loss", "loss and gradient", "student", "teacher", "student, teacher"]
    if kind == "cases":
        for i, case in enumerate(FEATURE_CASES):
            yield f"{case.name} {option_sets[i % 7]}", partial(pool, case, *option_sets[i % 7])
            yield f"{case.name}, loss", partial(transfer, case, 2.0, ("authors", "paper")[i % 2], "mean", ["loss and gradient", "student, teacher"])
        yield "one element, all options", lambda: [pool(FEATURE_CASES[1], *setting) for setting in option_sets]
        yield "one element, loss in parts", partial(transfer, FEATURE_CASES[1], 1.5, "authors", "max", every)
        yield "plain, loss in parts", partial(transfer, FEATURE_CASES[0], 2.7, "paper", "sum", every)
    if kind == "shapes":
        for i, shape in enumerate([(128, 256, 8, 8), (128, 256, 56, 56), (128, 512, 2, 2), (128, 64, 8, 8), (128, 256, 56, 56), (128, 3, 3, 3)]):
            layout = "contiguous" if i < 3 else "channels_last"
            yield f"{shape} {layout}", partial(pool, FeatureCase("", shape, layout=layout), 2.0, "mean", "l2")
            dtype, *setting = [
                (torch.bfloat16, 2.7, "mean", "l2"),
                (torch.float16, 1.5, "max", "softmax"),
                (torch.float64, 2.7, "max", "l2"),
            ][i % 3]
            yield f"{shape} {layout} {dtype}", partial(pool, FeatureCase("", shape, dtype, layout), *setting)
        for extent, dtype in ((8, torch.float32), (56, torch.float32), (56, torch.float64)):
            for variant in ("authors", "paper"):
                case = FeatureCase("", (128, 64, extent, extent), dtype)
                yield f"loss {variant} {extent} {dtype}", partial(transfer, case, 2.0, variant, "mean", ["loss and gradient", "student, teacher"])
    if kind == "large":
        for shape, layout in (
            ((1 << 17, 3, 2, 2), ""),
            ((2, 1 << 24, 2, 2), ""),
            ((2048, 64, 256, 256), ""),
            ((2048, 64, 256, 256), "channels_last"),
        ):
            yield f"{shape} {layout}", partial(pool, FeatureCase("", shape, torch.bfloat16, layout), 2.0, "max", "l2")
        yield "a map of 3e9 numbers", partial(pool, FeatureCase("", (1, 2, 3 << 30), torch.bfloat16), 2.0, "mean", "softmax")
        yield "a large batch, loss", partial(transfer, FeatureCase("", (1 << 17, 3, 2, 2)), 2.0, "authors", "mean", every)
        yield "double, many channels", partial(pool, FeatureCase("", (2, 1 << 20, 16, 16), torch.float64), 2.0, "mean", "l2")


def rbf_calls(kind: str):
    from kdkernels.triton import rbf_correlation as rbf

    def loss(case: CorrelationCase, flags):
        inputs = [as_fake_cuda(x) for x in case.make()]
        dtype = torch.promote_types(torch.float32, case.dtype)
        for wanted in flags:
            wants = [name in wanted for name in ("sx", "sy", "tx", "ty")]
            rbf.rbf_correlation_loss(*inputs, case.beta, Reduction.BATCHMEAN, wants)
            for reduction, shape in ((Reduction.NONE, case.shape[:1]), (Reduction.SUM, ())):
                rbf.rbf_correlation_loss_backward(empty(*shape, dtype=dtype), *inputs, case.beta, reduction, wants)

    def dense(case: CorrelationCase):
        x, y = (as_fake_cuda(x) for x in case.make()[:2])
        out = rbf.rbf_correlation(x, y, case.beta)
        for grad in (torch.empty_like(out), empty(1, dtype=out.dtype).expand(out.shape)):
            rbf.rbf_correlation_backward(grad, x, y, case.beta)

    def case_of(*shape, dtype=torch.float32):
        return CorrelationCase("", shape, dtype)

    if kind == "cases":
        for case in CORRELATION_CASES:
            yield f"{case.name}, loss", partial(loss, case, ["sx, sy, tx, ty"])
            yield case.name, partial(dense, case)
        for case in CORRELATION_CASES[3:5]:
            yield f"{case.name}, loss in parts", partial(loss, case, ["", "sx", "sy", "tx", "ty", "sx, sy"])
    if kind == "shapes":
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            yield f"loss {dtype}", partial(loss, case_of(128, 256, 128, 4, dtype=dtype), ["sx, sy", "sx, sy, tx, ty"])
            for columns in (1, 4, 50):
                yield f"{columns} columns {dtype}", partial(dense, case_of(128, 64, 48, columns, dtype=dtype))
    if kind == "large":
        yield "a large batch", partial(dense, case_of(1 << 17, 3, 5, 2))
        yield "a large batch, loss", partial(loss, case_of(1 << 17, 3, 5, 2), ["sx, sy, tx, ty"])
        yield "long vectors", partial(dense, case_of(1, 2, 3 << 26, 2))
        yield "longer vectors", partial(dense, case_of(1, 2, 3 << 29, 2))
        yield "long vectors, loss", partial(loss, case_of(2, 3 << 22, 3 << 22, 1), ["sx, sy, tx, ty"])
        yield "many long vectors, loss", partial(loss, case_of(1 << 12, 1 << 23, 3, 1, dtype=torch.bfloat16), ["sx, sy, tx, ty"])
        yield "many columns", partial(dense, case_of(2, 3, 5, 1 << 18))


def svd_calls(kind: str):
    from kdkernels.triton import truncated_svd as svd

    def decompose(m, n, k, dtype=torch.float32, layout="rows", batch=3, return_u=True, state=True, gradients="u, s, v"):
        x = as_fake_cuda(with_layout(torch.randn(batch, m, n, dtype=dtype), layout))
        u, s, v, saved = svd.truncated_svd(x, k, Sign.MAX_ABS, return_u, 1e-6, state)
        given = [torch.empty_like(t) if name in gradients else None for name, t in zip("usv", (u, s, v), strict=True)]
        svd.truncated_svd_backward(*given, x, u, s, v, saved, 1e-6)

    def align(n, num_student, k, dtype=torch.float32, weighted=True, flip=True, batch=3, flags=((True, True, True),), given=(True, True)):
        student, teacher = empty(batch, n, num_student, dtype=dtype), empty(batch, n, k, dtype=dtype)
        weight = empty(batch, k, dtype=dtype) if weighted else None
        out_s, out_t, match, flips = svd.align_singular_vectors(student, teacher, weight, flip)
        upstream = [torch.empty_like(t) if present else None for t, present in zip((out_s, out_t), given, strict=True)]
        for wanted in flags:
            svd.align_singular_vectors_backward(*upstream, student, teacher, weight, match, flips, flip, list(wanted))

    if kind == "cases":
        for i, (m, n) in enumerate([(1, 1), (7, 1), (5, 3), (16, 64), (40, 97)]):
            yield f"{m} x {n}", partial(decompose, m, n, min(m, n, 1 + i % 3), layout=LAYOUTS[i % 4])
        yield "1 x 1 float64", partial(decompose, 1, 1, 1, torch.float64, batch=1)
        for g in ("u", "s", "v", "us"):
            yield f"5 x 3, gradients {g}", partial(decompose, 5, 3, 2, return_u="u" in g, state="s" in g, gradients=g)
        for dtype in (torch.float32, torch.float64):
            yield f"align {dtype}", partial(align, 9, 4, 3, dtype)
        flags = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False) if a or b or c]
        yield "align, one vector of one number", partial(align, 1, 1, 1, batch=1, flags=flags)
        yield "align without weight", partial(align, 40, 1, 1, weighted=False, flip=False, flags=[(True, True, False), (True, False, False)])
        for given in ((True, False), (False, True)):
            yield f"align, of one side {given}", partial(align, 40, 1, 1, given=given)
        yield "empty", lambda: (decompose(5, 3, 2, batch=0), align(5, 3, 2, batch=0))
    if kind == "shapes":
        for m, n, k, dtype, layout in (
            (64, 256, 8, torch.bfloat16, "columns"),
            (256, 196, 8, torch.float64, "neither"),
            (784, 512, 4, torch.float32, "columns"),
        ):
            yield f"{m} x {n} {dtype}", partial(decompose, m, n, k, dtype, layout, batch=128)
        for dtype in (torch.float32, torch.float64):
            yield f"align {dtype}", partial(align, 512, 8, 4, dtype, batch=128)
    if kind == "large":
        yield "a large batch", partial(decompose, 16, 49, 1, batch=1 << 17)
        yield "large matrices", partial(decompose, 64, 1 << 26, 2)
        yield "align, a large batch", partial(align, 49, 2, 1, batch=1 << 17)
        yield "align, long vectors", partial(align, 3 << 29, 4, 4)


# The calls of "shapes" that are compiled to machine code, by the kind of calls.
COMPILED = {
    "main": {
        "(512, 32000) torch.bfloat16",
        "fast (16384, 1000) torch.float32",
        "fast (512, 128256) torch.bfloat16",
        "(8, 21, 64, 64) torch.float32",
        "backward (512, 32000)",
        "jsd backward (8, 1000, 8, 8)",
        "(128, 256, 56, 56) contiguous",
        "(128, 256, 56, 56) channels_last torch.float16",
        "loss authors 56 torch.float32",
        "loss torch.bfloat16",
        "4 columns torch.float32",
        "64 x 256 torch.bfloat16",
        "784 x 512 torch.float32",
        "align torch.float32",
    },
    "double": {
        "double",
        "(128, 3, 3, 3) channels_last torch.float64",
        "loss paper 56 torch.float64",
        "loss torch.float64",
        "50 columns torch.float64",
    },
}
CALLS = {"temperature_kl": kl_calls, "attention_pool": attention_calls, "rbf_correlation": rbf_calls, "truncated_svd": svd_calls}


def make_calls(gpu: FakeDriver, kinds: list[str], ops: list[str]) -> dict[str, str]:
    """Make the calls, and return the tracebacks of those that failed."""
    failed = {}
    for kind, op in itertools.product(kinds, ops):
        gpu.all_stages = kind in COMPILED or os.environ.get("KDKERNELS_REHEARSE") == "all"
        compiled = COMPILED.get(kind)
        calls = [(name, call) for name, call in CALLS[op]("shapes" if compiled else kind) if compiled is None or name in compiled]
        placed = [(name, call, gpu.first_device) for name, call in calls]
        if compiled is None:
            placed.append((f"{calls[0][0]} on another device", calls[0][1], gpu.first_device + 1))
        for name, call, gpu.device_of_tensors in placed:
            try:
                call()
            except Exception:
                failed[f"{gpu.name}, {op}, {kind}: {name}"] = traceback.format_exc()
    return failed


def main() -> None:
    targets, kinds, *ops = sys.argv[1:]
    failed = {}
    for i, target in enumerate(targets.split(",")):
        with fake_gpu(target, 2 * i) as gpu:
            failed |= make_calls(gpu, kinds.split(","), ops or list(CALLS))
        for name in sorted(gpu.launches):
            counts = f"{gpu.specialised[name]} specialisations, {gpu.translated[name]} only translated, {gpu.compiled[name]} compiled to the end"
            print(f"{target} {name}: {gpu.launches[name]} launches, {counts}")
    for name, error in failed.items():
        print(f"{name}\n{error}")
    if failed:
        sys.exit(f"{len(failed)} calls cannot be launched: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
