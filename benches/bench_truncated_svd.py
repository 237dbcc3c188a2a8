"""Times and errors of truncated_svd against torch's full and randomised SVD and power iteration."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from kdkernels import feature_svd, reference, truncated_svd
from kdkernels.config import HAS_CUDA_KERNELS
from kdkernels.testing import implementation

from .feature_maps import relu_maps, trained_maps
from .suite import DEVICE, DIRECTIONS, SMOKE, Cell, Problem, compiled, for_cells


def has_testing_ops() -> bool:
    """Whether this is a test build, in which the implementation "cuda" also accepts CPU tensors."""
    try:
        import kdkernels._testing  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def features_of(kind: str, batch: int, channels: int, side: int) -> torch.Tensor:
    if kind == "relu":
        return relu_maps(batch, channels, side)
    if kind.startswith("trained"):
        return trained_maps(batch, kind.split()[1])
    noise = torch.randn(batch, channels, side, side)
    return noise.relu() if kind == "relu of noise" else noise


def svd(x, k, driver=None):
    _, s, vh = torch.linalg.svd(x, full_matrices=False, driver=driver)
    return s[..., :k], vh[..., :k, :].mT


def eigh(x, k):
    """Compute the SVD from the eigenvectors of the smaller Gram matrix."""
    tall = x.shape[-2] >= x.shape[-1]
    values, vectors = torch.linalg.eigh(x.mT @ x if tall else x @ x.mT)
    s, vectors = values[..., -k:].flip(-1).clamp_min(0).sqrt(), vectors[..., -k:].flip(-1)
    return s, vectors if tall else x.mT @ vectors / s[..., None, :]


def svd_lowrank(x, k):
    _, s, v = torch.svd_lowrank(x, q=min(k + 6, *x.shape[-2:]), niter=2)
    return s[..., :k], v[..., :k]


def power_iteration(x, k, rounds=8):
    """Compute the first singular value and vector by power iteration (k = 1 only)."""
    tall = x.shape[-2] >= x.shape[-1]
    gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
    v = gram.sum(-1, keepdim=True)
    for _ in range(rounds):
        v = torch.nn.functional.normalize(gram @ v, dim=-2)
    if tall:
        return (x @ v).norm(dim=-2), v
    w = x.mT @ v
    return w.norm(dim=-2), torch.nn.functional.normalize(w, dim=-2)


def svd_of_implementation(name, x, k):
    return implementation(name)(truncated_svd)(x, k)[1:]


def of_features(decompose, k, features):
    return decompose(features.flatten(2).mT, k)


def problem(side, channels, batch=128, k=4, kind="relu", inductor=False, implementations=False) -> Problem:
    if SMOKE:
        batch, side, channels = 2, min(side, 4), min(channels, 16)
        kind = kind if kind == "relu" else "noise"
    features = features_of(kind, batch, channels, side).to(DEVICE).requires_grad_()
    k = min(k, side * side, channels)
    matrices: dict[str, Callable] = {
        "eager": lambda x, k: reference.truncated_svd(x, k)[1:],
        "linalg.svd": svd,
        "eigh": eigh,
        "svd_lowrank": svd_lowrank,
    }
    if k == 1:
        matrices["power iteration"] = power_iteration
    if implementations:
        cuda = HAS_CUDA_KERNELS if DEVICE == "cuda" else has_testing_ops()
        available = [name for name, is_available in (("cuda", cuda), ("triton", DEVICE == "cuda"), ("torch", True)) if is_available]
        matrices |= {f"implementation {name}": partial(svd_of_implementation, name) for name in available}
        if DEVICE == "cuda":
            matrices |= {name: partial(svd, driver=name) for name in ("gesvda", "gesvdj", "gesvd")}
    functions: dict[str, Callable] = {"fused": lambda f: feature_svd(f, k)[1:]}
    functions |= {name: partial(of_features, m, k) for name, m in matrices.items()}
    if inductor:
        functions["Inductor"] = compiled(lambda f: reference.truncated_svd(f.flatten(2).mT, k)[1:])
    p, q = sorted((side * side, channels))
    n = features.nbytes
    # Operations of the direct method: half of the Gram matrix, and its tridiagonal form.
    arithmetic = batch * (p * p * q + 4 / 3 * p**3)
    return Problem(
        functions,
        (features,),
        upstream=(torch.ones(batch, k, device=DEVICE), torch.randn(batch, channels, k, device=DEVICE)),
        moved={"forward": n, "forward + backward": 3 * n},  # the forward reads the features; the backward reads them again and writes the gradient
        work={"forward": {"GEMM": arithmetic}, "forward + backward": {"GEMM": arithmetic}},
        errors=SvdErrors(features.detach()[:16], k, functions),
    )


class SvdErrors:
    """Errors of a contender against float64.

    The error of s is relative to the largest singular value; the error of v is the sine of the
    largest angle between a computed and an exact singular vector. AssertionError is raised if an
    error of the fused op is too large.
    """

    def __init__(self, features, k, functions):
        self.features, self.k, self.functions = features, k, functions
        x = features.flatten(2).mT.double()
        self.s, self.v = svd(x, k)
        squares = (torch.linalg.svdvals(x) / self.s[..., :1]) ** 2
        gaps = (squares[..., None, :] - squares[..., :k, None]).abs()
        gaps[..., torch.arange(k), torch.arange(k)] = 1
        self.gaps = torch.minimum(gaps.amin(-1), squares[..., :k])

    def __call__(self, name: str) -> dict[str, float]:
        # Inductor would be compiled again for these shapes. It calls the same decomposition as
        # eager.
        if name == "Inductor":
            return {}
        s, v = self.functions[name](self.features)
        sine = (v.double() - self.v * (v.double() * self.v).sum(-2, keepdim=True)).norm(dim=-2)
        error = ((s.double() - self.s).abs() / self.s[..., :1]).max().item()
        if name == "fused":
            assert error <= 1e-6, f"the error of s is {error:.2e}"
            assert (sine <= 2e-6 / self.gaps.clamp_min(1e-12) + 2e-6).all(), f"the sine times the gap is {(sine * self.gaps).max():.2e}"
        return {"error": error, "sine": sine.max().item()}


# (side of the feature map, channels), as in layers of common networks; the matrices are [side^2,
# channels]
SHAPES = [(32, 16), (32, 64), (16, 32), (16, 128), (8, 64), (8, 256), (7, 512), (14, 256), (28, 128), (56, 64), (7, 2048)]


def cell(side, channels, k, batch=128, kind="relu", main=False, seconds=1.5, **options) -> Cell:
    name = f"{side * side} x {channels}, k = {k}" + (f", batch {batch}" if batch != 128 else "") + (f", {kind}" if kind != "relu" else "")
    return Cell("truncated_svd", name, partial(problem, side, channels, batch, k, kind, **options), seconds, main)


MAIN = {(32, 16), (16, 128), (8, 256), (14, 256)}
CELLS = [cell(side, c, k, inductor=k == 4, main=k == 4 and (side, c) in MAIN) for k in (4, 1) for side, c in SHAPES]
CELLS += [cell(28, 512, k, batch=16) for k in (1, 4)]
TRAINING_CELLS = [cell(side, c, k, seconds=1.0) for k in (2, 8) for side, c in SHAPES]
TRAINING_CELLS += [cell(side, c, 4, kind=f"trained {block}") for block, side, c in (("block1", 16, 64), ("block2", 8, 128), ("block3", 4, 256))]
# Maps with other spectra: noise after a ReLU, which has small gaps between singular values, and
# noise.
FORWARD_CELLS = [cell(side, c, 4, kind=kind) for kind in ("relu of noise", "noise") for side, c in ((32, 64), (14, 256), (7, 512))]
IMPLEMENTATION_CELLS = [
    Cell("truncated_svd_implementations", f"{side * side} x {c}, k = {k}", partial(problem, side, c, 128, k, implementations=True), 1.0)
    for k in (1, 4)
    for side, c in SHAPES
]


@for_cells(CELLS)
def bench_truncated_svd(cell, direction, bench):
    bench(cell, direction)


@for_cells(TRAINING_CELLS, DIRECTIONS[2:])
def bench_training(cell, direction, bench):
    bench(cell, direction)


@for_cells(FORWARD_CELLS, DIRECTIONS[:1])
def bench_spectra(cell, direction, bench):
    bench(cell, direction)


@pytest.mark.skipif(DEVICE == "cpu" and not SMOKE, reason="the GPU implementations are timed only on GPUs")
@for_cells(IMPLEMENTATION_CELLS)
def bench_implementations(cell, direction, bench):
    """Time each implementation of this package, and each driver of torch.linalg.svd, on a GPU."""
    bench(cell, direction)
