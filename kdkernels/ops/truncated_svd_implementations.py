"""Selects the implementation of truncated_svd and align_singular_vectors.

By default it is the fastest one for the device; ``kdkernels.testing.implementation`` selects
another. An implementation is a set of ops, such as ``kdkernels::truncated_svd_<implementation>``:

- "cuda": csrc/truncated_svd/kernels.cu. In tests with CPU tensors the bodies of its kernels run on
  the CPU (csrc/testing/truncated_svd_host.cpp);
- "triton": kdkernels/triton;
- "torch": truncated_svd_torch.py.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import HAS_CUDA_KERNELS, cuda_kernels_run_on
from ..dtypes import FLOATING, compute_dtype
from ..options import NAMES, Implementation, Sign
from . import truncated_svd_torch as plain
from .registration import DEVICES_WITHOUT_KERNELS

_OPS = ("truncated_svd", "truncated_svd_backward", "align_singular_vectors", "align_singular_vectors_backward")


class _Chosen:  # torch.compile cannot trace contextvars, and torch 2.11 ignores threading.local
    implementation: int


chosen = _Chosen()
chosen.implementation = int(Implementation.FASTEST)


def fastest(name: str, args: tuple) -> str:
    """Return the fastest implementation for these arguments of an op on a GPU.

    This is "cuda" if it was built for this GPU and the matrix fits its shared memory, else
    "triton" if it is installed and supports the size, else "torch".
    """
    if _cuda_runs(args) and (name.startswith("align") or _fits_cuda(*_problem(name, args))):
        return "cuda"
    if importlib.util.find_spec("triton") is not None and (name.startswith("align") or _fits_triton(*_problem(name, args))):
        return "triton"
    return "torch"


def check_available(implementation: Implementation) -> None:
    """Raise RuntimeError if an implementation cannot run on any device of this machine."""
    if implementation == Implementation.TRITON and importlib.util.find_spec("triton") is None:
        raise RuntimeError('the implementation "triton" needs Triton, which is not installed: pip install triton')
    if torch.compiler.is_compiling():  # which cannot trace the next call; the op raises an error too
        return
    on_host = torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels::truncated_svd_cuda", "CPU")
    if implementation == Implementation.CUDA and not HAS_CUDA_KERNELS and not on_host:
        raise RuntimeError('the implementation "cuda" was not built: kdkernels.show_config() prints the reason, and what to do')


def _cuda_runs(args: Sequence) -> bool:
    return HAS_CUDA_KERNELS and cuda_kernels_run_on(next(a.device.index for a in args if isinstance(a, Tensor)))


def _problem(name: str, args: tuple) -> tuple[Tensor, int]:
    """Return x and k of a call of truncated_svd or of its backward op."""
    return (args[3], args[5].shape[-1]) if name.endswith("backward") else (args[0], args[1])


def _fits_cuda(x: Tensor, k: int) -> bool:
    properties: Any = torch.cuda.get_device_properties(x.device)  # torch does not declare shared_memory_per_block_optin
    shared_memory = properties.shared_memory_per_block_optin
    return torch.ops.kdkernels._truncated_svd_fits_cuda(min(x.shape[-2:]), k, x.dtype == torch.float64, shared_memory)


def _fits_triton(x: Tensor, k: int) -> bool:
    from ..triton.svd_sizes import fits

    return fits(min(x.shape[-2:]), k)


def _triton_kernels(args: tuple):
    check_available(Implementation.TRITON)
    if os.environ.get("TRITON_INTERPRET") != "1" and any(isinstance(t, Tensor) and t.device.type == "cpu" for t in args):
        raise RuntimeError('the implementation "triton" on CPU tensors runs in Triton\'s interpreter: set TRITON_INTERPRET=1 in the environment')
    from ..triton import truncated_svd as kernels

    return kernels


# The Python implementations check their arguments, like the C++ implementations (csrc/<op>/<op>.h):
# an op that is called directly must not read memory outside its tensors.


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_types(device: torch.device, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in FLOATING:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        _expect(t.device == device, f"{name} must be on {device}, got {t.device}")


def _check_shape(name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    _expect(t is None or t.shape == shape, f"{name} must have shape {shape}, got {None if t is None else tuple(t.shape)}")


def _check_truncated_svd(x: Tensor, k: int, sign: int = Sign.NONE, *_options) -> None:
    _check_types(x.device, x=x)
    _expect(x.dim() >= 2 and 0 not in x.shape[-2:], f"x must be matrices [..., M, N] with M, N >= 1, got {tuple(x.shape)}")
    _expect(1 <= k <= min(x.shape[-2:]), f"k must lie in [1, min(M, N)], got {k} for {tuple(x.shape)}")
    _expect(sign in NAMES["sign"], f"sign must be one of 0 (none), 1 (max_abs), got {sign}")


def _check_truncated_svd_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps) -> None:
    k = s.shape[-1] if s.dim() > 0 else 0
    _check_truncated_svd(x, k)
    *batch, m, n = x.shape
    has_u = u.dim() == x.dim()
    _check_types(x.device, u=u, s=s, v=v, state=state, grad_u=grad_u, grad_s=grad_s, grad_v=grad_v)
    _check_shape("s", s, (*batch, k))
    for name, t, shape in (("u", u if has_u else None, (*batch, m, k)), ("v", v, (*batch, n, k))):
        _check_shape(name, t, shape)
    for name, t in (("s", s), ("v", v), *((("u", u),) if has_u else ())):
        if t.dtype != compute_dtype(x):
            raise TypeError(f"{name} must be {compute_dtype(x)}, as the forward gave it, got {t.dtype}")
    _expect(has_u or m >= n, "u is needed where M < N")
    _expect(0 < gap_eps < math.inf, f"gap_eps must be finite and > 0, got {gap_eps}")
    for name, t, shape in (
        ("grad_u", grad_u, (*batch, m, k) if has_u else (0,)),
        ("grad_s", grad_s, (*batch, k)),
        ("grad_v", grad_v, (*batch, n, k)),
    ):
        _check_shape(name, t, shape)


def _check_align_singular_vectors(student, teacher, weight, *_options) -> None:
    _check_types(student.device, student=student, teacher=teacher, weight=weight)
    _expect(
        teacher.dim() >= 2 and 0 not in teacher.shape[-2:] and student.shape[:-1] == teacher.shape[:-1] and student.shape[-1] > 0,
        f"student and teacher must be [..., N, K] and [..., N, k], got {tuple(student.shape)} and {tuple(teacher.shape)}",
    )
    _check_shape("weight", weight, (*teacher.shape[:-2], teacher.shape[-1]))


def _check_align_singular_vectors_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, flip_teacher, wanted) -> None:
    _check_align_singular_vectors(student, teacher, weight)
    _check_types(student.device, grad_student=grad_student, grad_teacher=grad_teacher)
    per_vector_shape = (*teacher.shape[:-2], teacher.shape[-1])
    for name, t, shape in (
        ("grad_student", grad_student, tuple(teacher.shape)),
        ("grad_teacher", grad_teacher, tuple(teacher.shape)),
        ("match", match, per_vector_shape),
        ("flips", flips, per_vector_shape),
    ):
        _check_shape(name, t, shape)
    if match.dtype != torch.int64 or flips.dtype != compute_dtype(student, teacher):
        raise TypeError(f"match must be int64 and flips {compute_dtype(student, teacher)}, got {match.dtype} and {flips.dtype}")
    for name, t in (("match", match), ("flips", flips)):
        _expect(t.device == student.device, f"{name} must be on {student.device}, got {t.device}")
    _expect(weight is not None or not wanted[2], "wanted[2] must be False if weight is None")
    if match.device.type == "cpu" and match.numel() > 0:  # not on a GPU, to avoid waiting for it: its kernels ignore indices out of range
        low, high = match.aminmax()
        _expect(low >= 0 and high < student.shape[-1], f"match must lie in [0, {student.shape[-1]}), got {low} to {high}")


def _register(name: str) -> None:
    check = globals()[f"_check_{name}"]

    def call_torch(*args):
        check(*args)
        return getattr(plain, name)(*args)

    def call_triton(*args):
        check(*args)
        return getattr(_triton_kernels(args), name)(*args)

    argument_count = len(getattr(torch.ops.kdkernels, name).default._schema.arguments) - 1

    def call_chosen(args, default: str):
        # The dispatcher omits arguments that have their default value.
        implementation = args[argument_count] if len(args) > argument_count else Implementation.FASTEST
        _expect(implementation in NAMES["implementation"], f"implementation must be in [0, {len(Implementation) - 1}], got {implementation}")
        suffix = NAMES["implementation"][implementation] if implementation != Implementation.FASTEST else default
        return getattr(torch.ops.kdkernels, f"{name}_{suffix}")(*args[:argument_count])

    def call_on_gpu(*args):
        return call_chosen(args, fastest(name, args))

    def call_on_other_devices(*args):
        return call_chosen(args, "torch")

    torch.library.impl(f"kdkernels::{name}_torch", "CompositeExplicitAutograd")(call_torch)
    torch.library.impl(f"kdkernels::{name}_triton", ("CPU", "CUDA"))(call_triton)
    torch.library.impl(f"kdkernels::{name}", "CUDA")(call_on_gpu)
    torch.library.impl(f"kdkernels::{name}", DEVICES_WITHOUT_KERNELS)(call_on_other_devices)


def _check_lists(count: int, **lists) -> None:
    for name, entries in lists.items():
        _expect(len(entries) == count > 0, f"{name} must have one entry for each x, got {len(entries)} for {count}")


def _group(x, k, sign, return_u, gap_eps, save_state, implementation):
    _check_lists(len(x), gap_eps=gap_eps)
    if _shares_launches(x, k, implementation):
        return torch.ops.kdkernels.truncated_svd_group_cuda(x, k, sign, return_u, gap_eps, save_state)
    results = [
        torch.ops.kdkernels.truncated_svd(matrices, k, sign, return_u, eps, save_state, implementation)
        for matrices, eps in zip(x, gap_eps, strict=True)
    ]
    return tuple(map(list, zip(*results, strict=True)))


def _group_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, implementation):
    _check_lists(len(x), grad_u=grad_u, grad_s=grad_s, grad_v=grad_v, u=u, s=s, v=v, state=state, gap_eps=gap_eps)
    if _shares_launches(x, s[0].shape[-1] if s[0].dim() > 0 else 0, implementation):
        return torch.ops.kdkernels.truncated_svd_group_backward_cuda(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps)

    def gradient_or_none(g: Tensor, like: Tensor) -> Tensor | None:
        return g if g.dim() == like.dim() else None

    return [
        torch.ops.kdkernels.truncated_svd_backward(
            gradient_or_none(gu, matrices),
            gradient_or_none(gs, s1),
            gradient_or_none(gv, matrices),
            matrices,
            u1,
            s1,
            v1,
            saved_state,
            eps,
            implementation,
        )
        for gu, gs, gv, matrices, u1, s1, v1, saved_state, eps in zip(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, strict=True)
    ]


def _shares_launches(xs: list[Tensor], k: int, implementation: int) -> bool:
    if implementation != Implementation.FASTEST:
        return implementation == Implementation.CUDA
    return xs[0].is_cuda and _cuda_runs(xs) and all(_fits_cuda(x, k) for x in xs)


for _name in _OPS:
    _register(_name)
_DEVICES = ("CPU", "CUDA", *DEVICES_WITHOUT_KERNELS)
torch.library.impl("kdkernels::truncated_svd_group", _DEVICES)(_group)
torch.library.impl("kdkernels::truncated_svd_group_backward", _DEVICES)(_group_backward)
