"""Which implementation of truncated_svd and align_singular_vectors runs on a device, or the one that ``kdkernels.testing.implementation`` chose.

An implementation is a set of ops, ``kdkernels::truncated_svd_<implementation>`` and so on: "cuda"
(csrc/truncated_svd/kernels.cu; on CPU tensors, in tests, its kernel bodies on the host,
csrc/testing/truncated_svd_host.cpp), "triton" (kdkernels/triton) and "torch" (the module beside this one).
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import HAS_CUDA_KERNELS, cuda_kernels_run_on
from ..dtypes import FLOATING, compute_dtype
from ..options import NAMES, Implementation, Sign
from . import truncated_svd_torch as plain
from .registration import DEVICES_WITHOUT_KERNELS

_OPS = ("truncated_svd", "truncated_svd_backward", "align_singular_vectors", "align_singular_vectors_backward")


class _Chosen(threading.local):  # torch.compile reads and guards it; it does not know contextvars
    implementation = int(Implementation.FASTEST)


chosen = _Chosen()


def fastest(name: str, args: tuple) -> str:
    """The fastest implementation for these arguments of an op on a GPU.

    CUDA if it was built for this GPU and its memory holds the matrix, else Triton, else plain torch.
    """
    if _cuda_runs(args) and (name.startswith("align") or _fits_cuda(*_problem(name, args))):
        return "cuda"
    if importlib.util.find_spec("triton") is not None and (name.startswith("align") or _fits_triton(*_problem(name, args))):
        return "triton"
    return "torch"


def check_available(implementation: Implementation) -> None:
    """Raises RuntimeError with the cure if an implementation cannot run on any device of this machine."""
    if implementation == Implementation.TRITON and importlib.util.find_spec("triton") is None:
        raise RuntimeError('the implementation "triton" needs Triton, which is not installed: pip install triton')
    on_host = torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels::truncated_svd_cuda", "CPU")
    if implementation == Implementation.CUDA and not HAS_CUDA_KERNELS and not on_host:
        raise RuntimeError('the implementation "cuda" was not built: kdkernels.show_config() says why, and what to do')


def _cuda_runs(args: Sequence) -> bool:
    return HAS_CUDA_KERNELS and cuda_kernels_run_on(next(a.device.index for a in args if isinstance(a, Tensor)))


def _problem(name: str, args: tuple) -> tuple[Tensor, int]:
    return (args[3], args[5].shape[-1]) if name.endswith("backward") else (args[0], args[1])


def _fits_cuda(x: Tensor, k: int) -> bool:
    memory = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return torch.ops.kdkernels._truncated_svd_fits_cuda(min(x.shape[-2:]), k, x.dtype == torch.float64, memory)


def _fits_triton(x: Tensor, k: int) -> bool:
    from ..triton.svd_sizes import fits

    return fits(min(x.shape[-2:]), k)


def _triton_kernels(args: tuple):
    check_available(Implementation.TRITON)
    if os.environ.get("TRITON_INTERPRET") != "1" and any(isinstance(t, Tensor) and t.device.type == "cpu" for t in args):
        raise RuntimeError('the implementation "triton" on CPU tensors runs in Triton\'s interpreter: set TRITON_INTERPRET=1 in the environment')
    from ..triton import truncated_svd as kernels

    return kernels


# The implementations in Python check their arguments as those in C++ do (csrc/<op>/<op>.h): an op that
# is called past its public function must not read memory outside of its tensors.


def _expect(fine: bool, message: str) -> None:
    if not fine:
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
    small = (*teacher.shape[:-2], teacher.shape[-1])
    for name, t, shape in (
        ("grad_student", grad_student, tuple(teacher.shape)),
        ("grad_teacher", grad_teacher, tuple(teacher.shape)),
        ("match", match, small),
        ("flips", flips, small),
    ):
        _check_shape(name, t, shape)
    if match.dtype != torch.int64 or flips.dtype != compute_dtype(student, teacher):
        raise TypeError("match must be int64 and flips of the computing type")
    for name, t in (("match", match), ("flips", flips)):
        _expect(t.device == student.device, f"{name} must be on {student.device}, got {t.device}")
    _expect(weight is not None or not wanted[2], "weight is not there to have a gradient")
    if match.device.type == "cpu" and match.numel() > 0:  # nothing waits for a GPU, whose kernels take nothing of a vector that is not there
        low, high = match.aminmax()
        _expect(low >= 0 and high < student.shape[-1], f"match must lie in [0, {student.shape[-1]}), got {low} to {high}")


def _register(name: str) -> None:
    check = globals()[f"_check_{name}"]

    def in_torch(*args):
        check(*args)
        return getattr(plain, name)(*args)

    def in_triton(*args):
        check(*args)
        return getattr(_triton_kernels(args), name)(*args)

    arguments = len(getattr(torch.ops.kdkernels, name).default._schema.arguments) - 1

    def by_choice(args, default: str):
        # The dispatcher leaves out an argument that has its default value.
        implementation = args[arguments] if len(args) > arguments else Implementation.FASTEST
        _expect(implementation in NAMES["implementation"], f"implementation must be in [0, {len(Implementation) - 1}], got {implementation}")
        suffix = NAMES["implementation"][implementation] if implementation != Implementation.FASTEST else default
        return getattr(torch.ops.kdkernels, f"{name}_{suffix}")(*args[:arguments])

    def on_gpu(*args):
        return by_choice(args, fastest(name, args))

    def elsewhere(*args):
        return by_choice(args, "torch")

    torch.library.impl(f"kdkernels::{name}_torch", "CompositeExplicitAutograd")(in_torch)
    torch.library.impl(f"kdkernels::{name}_triton", ("CPU", "CUDA"))(in_triton)
    torch.library.impl(f"kdkernels::{name}", "CUDA")(on_gpu)
    torch.library.impl(f"kdkernels::{name}", DEVICES_WITHOUT_KERNELS)(elsewhere)


def _check_lists(count: int, **lists) -> None:
    for name, given in lists.items():
        _expect(len(given) == count > 0, f"{name} must have one entry for each x, got {len(given)} for {count}")


def _group(x, k, sign, return_u, gap_eps, save_state, implementation):
    _check_lists(len(x), gap_eps=gap_eps)
    if _shares_launches(x, k, implementation):
        return torch.ops.kdkernels.truncated_svd_group_cuda(x, k, sign, return_u, gap_eps, save_state)
    each = [torch.ops.kdkernels.truncated_svd(m, k, sign, return_u, noise, save_state, implementation) for m, noise in zip(x, gap_eps, strict=True)]
    return tuple(map(list, zip(*each, strict=True)))


def _group_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, implementation):
    _check_lists(len(x), grad_u=grad_u, grad_s=grad_s, grad_v=grad_v, u=u, s=s, v=v, state=state, gap_eps=gap_eps)
    if _shares_launches(x, s[0].shape[-1] if s[0].dim() > 0 else 0, implementation):
        return torch.ops.kdkernels.truncated_svd_group_backward_cuda(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps)

    def given(g: Tensor, like: Tensor) -> Tensor | None:
        return g if g.dim() == like.dim() else None

    return [
        torch.ops.kdkernels.truncated_svd_backward(given(gu, m), given(gs, s1), given(gv, m), m, u1, s1, v1, t, noise, implementation)
        for gu, gs, gv, m, u1, s1, v1, t, noise in zip(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, strict=True)
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
