"""Which implementation of truncated_svd and align_singular_vectors runs on a GPU, or where one is asked for by name.

An implementation is a set of ops, ``kdkernels::truncated_svd_<driver>`` and so on: "cuda" (csrc/truncated_svd.cu; on CPU tensors its bodies on
the host, csrc/truncated_svd_host.cpp), "triton" and "torch" (the modules beside this one).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import HAS_CUDA_KERNELS, cuda_kernels_run_on
from . import truncated_svd_torch as plain

_OPS = ("truncated_svd", "truncated_svd_backward", "align_singular_vectors", "align_singular_vectors_backward")


def default_driver(name: str, args: tuple) -> str:
    """The fastest there is for these arguments of an op on a GPU: CUDA where it was built for this GPU and its memory holds the matrix, else
    Triton, else plain torch."""
    if _cuda_runs(args) and (name.startswith("align") or _fits_cuda(*_problem(name, args))):
        return "cuda"
    if importlib.util.find_spec("triton") is not None and (name.startswith("align") or _fits_triton(*_problem(name, args))):
        return "triton"
    return "torch"


def _cuda_runs(args: Sequence) -> bool:
    return HAS_CUDA_KERNELS and cuda_kernels_run_on(next(a.device.index for a in args if isinstance(a, Tensor)))


def _problem(name: str, args: tuple) -> tuple[Tensor, int]:
    return (args[3], args[5].shape[-1]) if name.endswith("backward") else (args[0], args[1])


def _fits_cuda(x: Tensor, k: int) -> bool:
    memory = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return torch.ops.kdkernels._svd_fits(min(x.shape[-2:]), k, x.dtype == torch.float64, memory)


def _fits_triton(x: Tensor, k: int) -> bool:
    from ..triton.svd_sizes import fits

    return fits(min(x.shape[-2:]), k)


def _triton_kernels(args: tuple):
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError('driver="triton" needs Triton, which is not installed: pip install triton')
    if os.environ.get("TRITON_INTERPRET") != "1" and any(isinstance(t, Tensor) and t.device.type == "cpu" for t in args):
        raise RuntimeError('driver="triton" on CPU tensors runs in Triton\'s interpreter: set TRITON_INTERPRET=1 in the environment')
    from ..triton import truncated_svd as kernels

    return kernels


def _register(name: str) -> None:
    torch.library.impl(f"kdkernels::{name}_torch", "CompositeExplicitAutograd")(getattr(plain, name))

    def in_triton(*args):
        return getattr(_triton_kernels(args), name)(*args)

    def on_gpu(*args):
        *args, driver = args
        return getattr(torch.ops.kdkernels, f"{name}_{driver or default_driver(name, args)}")(*args)

    torch.library.impl(f"kdkernels::{name}_triton", "CPU")(in_triton)
    torch.library.impl(f"kdkernels::{name}_triton", "CUDA")(in_triton)
    torch.library.impl(f"kdkernels::{name}", "CUDA")(on_gpu)


def _group(x, k, sign, return_u, gap_eps, save_state, driver):
    if _shares_launches(x, k, driver):
        return torch.ops.kdkernels.truncated_svd_group_cuda(x, k, sign, return_u, gap_eps, save_state)
    each = [torch.ops.kdkernels.truncated_svd(m, k, sign, return_u, noise, save_state, driver) for m, noise in zip(x, gap_eps, strict=True)]
    return tuple(map(list, zip(*each, strict=True)))


def _group_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, driver):
    if _shares_launches(x, s[0].shape[-1], driver):
        return torch.ops.kdkernels.truncated_svd_group_backward_cuda(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps)

    def given(g: Tensor, like: Tensor) -> Tensor | None:
        return g if g.dim() == like.dim() else None

    return [
        torch.ops.kdkernels.truncated_svd_backward(given(gu, m), given(gs, s1), given(gv, m), m, u1, s1, v1, t, noise, driver)
        for gu, gs, gv, m, u1, s1, v1, t, noise in zip(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, strict=True)
    ]


def _shares_launches(xs: list[Tensor], k: int, driver: str) -> bool:
    return driver == "cuda" or (not driver and xs[0].is_cuda and _cuda_runs(xs) and all(_fits_cuda(x, k) for x in xs))


for _name in _OPS:
    _register(_name)
for _key in ("CPU", "CUDA"):
    torch.library.impl("kdkernels::truncated_svd_group", _key)(_group)
    torch.library.impl("kdkernels::truncated_svd_group_backward", _key)(_group_backward)
