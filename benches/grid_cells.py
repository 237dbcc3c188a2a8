"""The inputs of the search for worst cells: small, odd and large sizes, layouts, dtypes and values.

:data:`GRIDS` contains the cells of each op. Errors are given as multiples of the error that the
tests of the op allow, so that an error of at most 1 passes the tests.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels import attention_transfer_loss, rbf_correlation_loss, reference, temperature_kl, truncated_svd

from .bench_truncated_svd import eigh, svd
from .suite import compiled, value_and_gradients

FORWARD, BOTH = "forward", "forward + backward"
DTYPES = ("float32", "float64", "bfloat16")
Errors = dict[str, float]
Function = Callable[..., Any]  # of the inputs; returns a tensor or a tuple of tensors


@dataclass
class Comparison:
    """The contenders of a cell, and the inputs on which they are compared.

    Args:
        contenders: dict from name to function of the inputs. The first is "fused"; the others are
            its peers, of which the first is the reference.
        inputs: the inputs, which do not require a gradient.
        errors: function from a contender's function and a direction to its errors.
        gradients: the number of inputs, from the first on, that get gradients.
    """

    contenders: dict[str, Function]
    inputs: tuple[Tensor, ...]
    errors: Callable[[Function, str], Errors]
    gradients: int = 0


@dataclass(frozen=True)
class GridCell:
    """One op on one input.

    Args:
        op: name of the op.
        name: description of the input, unique for the op.
        make: function that builds the comparison.
        directions: the directions that are measured.
        group: name of a set of cells that is also counted separately.
    """

    op: str
    name: str
    make: Callable[[], Comparison]
    directions: tuple[str, ...] = (FORWARD, BOTH)
    group: str | None = None


@dataclass
class Bound:
    """The expected value of a tensor, and the errors that the tests allow (tests/tolerances.py).

    Args:
        expected: exact values, in float64.
        rtol: allowed error relative to the larger of ``expected`` and ``scale``.
        scale: magnitude of the terms of which the tensor is a sum.
        atol: allowed absolute error.
    """

    expected: Tensor
    rtol: float
    scale: Tensor | float = 0.0
    atol: float = 0.0

    def error(self, actual: Tensor) -> float:
        """Return the largest error as a multiple of the allowed one, or NaN."""
        size = self.expected.abs()
        allowed = self.rtol * torch.maximum(size, torch.as_tensor(self.scale, dtype=torch.float64)) + self.atol
        if actual.dtype != torch.float64:  # the result is rounded; denormal numbers have a fixed step
            dtype = torch.finfo(actual.dtype)
            allowed = allowed + dtype.eps / 2 * size + dtype.smallest_normal * dtype.eps
        return ((actual.detach().double() - self.expected).abs() / allowed).max().item()


def rounding(dtype: torch.dtype) -> float:
    """Return the unit roundoff of dtype."""
    return torch.finfo(dtype).eps / 2


def sum_error(dtype: torch.dtype, length: int, operations: float = 24) -> float:
    """Return the relative error that the tests allow for a sum of ``length`` terms."""
    return rounding(dtype) * (operations + length**0.5 / 4)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the ops compute for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_layout(x: Tensor, layout: str) -> Tensor:
    """Return the same values with another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":  # the last two dimensions
        return x.mT.contiguous().mT
    if layout == "every other":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x.contiguous()


def draw(n: int, *choices: Iterable) -> list[tuple]:
    """Draw ``n`` different points of the product of the choices, always the same ones."""
    return random.Random(0).sample(list(itertools.product(*choices)), n)


def sizes(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def join_name(*parts: str) -> str:
    """Join the parts of a cell's name, without those that are the default."""
    return ", ".join(part for part in parts if part not in ("", "contiguous"))


def compare_losses(fused: Function, eager: Function, inputs: tuple[Tensor, ...], bounds: list[Bound]) -> Comparison:
    """Return the comparison of a loss.

    Args:
        fused, eager: functions of the inputs.
        inputs: the inputs.
        bounds: the bound of the loss, and those of the gradients of the first inputs.
    """

    def errors(function: Function, direction: str) -> Errors:
        value, *gradients = bounds
        if direction == FORWARD:
            return {"value": value.error(function(*inputs))}
        (loss,), found = value_and_gradients(function, require_gradients(inputs, len(gradients)), None)
        each = [bound.error(g) for bound, g in zip(gradients, found, strict=True)]
        return {"value": value.error(loss), "gradient": torch.tensor(each).max().item()}  # NaN if one of them is NaN

    contenders = {"fused": fused, "eager": eager, "Inductor": compiled(lambda *x: eager(*x))}
    return Comparison(contenders, inputs, errors, gradients=len(bounds) - 1)


def require_gradients(inputs: tuple[Tensor, ...], n: int) -> list[Tensor]:
    """Return the inputs as new leaves, of which the first ``n`` require a gradient."""
    return [x.detach().requires_grad_(i < n) for i, x in enumerate(inputs)]


# truncated_svd: [batch, M, N] with spectra from easy to difficult.

SVD_SHAPES = [(2, 2), (3, 40), (8, 8), (16, 16), (49, 32), (64, 64), (100, 80), (64, 256), (196, 128)]
SVD_SHAPES += [(196, 256), (784, 128), (1024, 16), (1024, 64), (256, 256), (1024, 256), (512, 512), (1024, 1024)]
SVD_BATCHES, SVD_KS = (1, 2, 8, 16, 64, 256), (1, 2, 4, 8, 16, 32, 64)
SPECTRA = ("random", "relu", "decaying", "low rank", "orthogonal")
SMALL_K = "batch >= 16 and k <= 16"


def matrices(batch: int, m: int, n: int, spectrum: str, dtype: torch.dtype) -> Tensor:
    """Return matrices [batch, M, N] with a spectrum: of random numbers, of random numbers after a
    ReLU, from 1 down to 1e-6, with a quarter of the full rank, or with equal singular values.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if spectrum in ("random", "relu"):
        x = normal(batch, m, n)
        return (x.relu() if spectrum == "relu" else x).to(dtype)
    rank = min(m, n)
    u, v = (torch.linalg.qr(normal(batch, size, rank))[0] for size in (m, n))
    j = torch.arange(rank, dtype=torch.float64)
    if spectrum == "decaying":
        s = 10 ** (-6 * j / max(1, rank - 1))
    elif spectrum == "low rank":
        s = (j < max(1, rank // 4)).double() * (1 + (rank - j) / rank)
    else:
        s = torch.ones(rank, dtype=torch.float64)
    return ((u * s) @ v.mT).to(dtype).contiguous()


def svd_comparison(batch: int, m: int, n: int, k: int, spectrum: str, dtype: torch.dtype) -> Comparison:
    """Compare the decompositions. The errors are those of the first three matrices."""
    x = matrices(batch, m, n, spectrum, dtype)
    first = x[:3].double()
    eps, length = rounding(dtype) * (1 if dtype == torch.float32 else 8), (m + n) ** 0.5
    bounds = {"s": eps * (6 + length / 2), "orthogonality": eps * (8 + length), "residual": 2 * eps * (16 + length)}
    s_exact = torch.linalg.svdvals(first)[..., :k]
    largest = s_exact[..., :1].clamp_min(torch.finfo(torch.float64).tiny)
    units = first / largest[..., None]

    def errors(function: Function, direction: str) -> Errors:
        s, v = (y.double() for y in function(x[:3]))
        found = {
            "s": ((s - s_exact) / largest).abs(),
            "orthogonality": (v.mT @ v - torch.eye(k, dtype=torch.float64)).abs(),
            "residual": (units.mT @ (units @ v) - v * (s_exact / largest)[..., None, :] ** 2).norm(dim=-2),
        }
        return {name: error.max().item() / bounds[name] for name, error in found.items()}

    contenders: dict[str, Function] = {"fused": lambda x: truncated_svd(x, k)[1:], "linalg.svd": partial(svd, k=k)}
    contenders["eigh"] = partial(eigh, k=k)
    return Comparison(contenders, (x,), errors)


def svd_cell(batch: int, m: int, n: int, k: int, spectrum: str, dtype: str) -> GridCell:
    name = join_name(sizes((batch, m, n)), f"k = {k}", spectrum, dtype)
    make = partial(svd_comparison, batch, m, n, k, spectrum, getattr(torch, dtype))
    return GridCell("truncated_svd", name, make, (FORWARD,), SMALL_K if batch >= 16 and k <= 16 else None)


def svd_cells() -> list[GridCell]:
    def is_small_enough(batch: int, m: int, n: int) -> bool:
        p, q = sorted((m, n))
        return batch * m * n <= 1 << 22 and batch * p**3 <= 1 << 29 and batch * p**2 * q <= 1 << 30

    product = itertools.product(SVD_SHAPES, SVD_BATCHES, SVD_KS, SPECTRA, ("float32", "float64"))
    points = [(b, m, n, k, spectrum, dtype) for (m, n), b, k, spectrum, dtype in product if k <= min(m, n) and is_small_enough(b, m, n)]
    return [svd_cell(*point) for point in sorted(random.Random(0).sample(points, 466))]


# temperature_kl: logits [rows, classes], or [batch, classes, height, width] with dim=1.

T = 4.0
KL_SMALL = [(1, 2), (2, 10), (7, 33), (8, 10), (1, 1000), (32, 100), (128, 10)]
KL_LARGE = [(128, 100), (4096, 10), (1024, 21), (256, 1000), (1, 50257), (16, 32000), (2048, 1000), (65536, 2)]
KL_MAPS = [(1, 2, 1, 1), (2, 19, 8, 8), (1, 1000, 7, 7), (4, 21, 64, 64), (8, 150, 32, 32), (2, 3, 256, 256)]
KL_KINDS = ("reverse", "jsd", "near the teacher")
ROW_LAYOUTS, MAP_LAYOUTS = ("contiguous", "transposed", "every other"), ("contiguous", "channels_last")


def kl_comparison(shape: tuple[int, ...], layout: str, dtype: torch.dtype, kind: str) -> Comparison:
    dim = 1 if len(shape) == 4 else -1
    noise = 0.01 if kind == "near the teacher" else 2.0
    generator = torch.Generator().manual_seed(0)
    teacher, difference = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    inputs = tuple(with_layout(x.to(dtype), layout) for x in (2 * teacher + noise * difference, 2 * teacher))
    options: dict[str, Any] = {"temperature": T, "dim": dim, "direction": kind if kind in ("reverse", "jsd") else "forward"}
    eager = partial(reference.temperature_kl, **options)
    exact = tuple(x.double() for x in inputs)
    (value,), (gradient,) = value_and_gradients(eager, require_gradients(exact, 1), None)
    compute = computed_in(dtype)
    rtol = sum_error(compute, shape[dim]) + 4 * rounding(compute) * max(x.abs().max().item() for x in exact) / T
    if dtype == torch.float64:
        rtol += 1e-11  # cancellation in the float64 reference
    weight = T * shape[dim] / inputs[0].numel()  # of a row
    scale = weight * min(1.0, noise) * torch.maximum(*(torch.softmax(x / T, dim) for x in exact))
    bounds = [Bound(value, rtol, atol=1e-13 * weight), Bound(gradient, rtol, scale, 1e-15)]
    return compare_losses(partial(temperature_kl, **options), eager, inputs, bounds)


def kl_cell(shape: tuple[int, ...], layout: str, dtype: str, kind: str = "") -> GridCell:
    name = join_name(sizes(shape), "dim=1" if len(shape) == 4 else "", layout, dtype, kind)
    return GridCell("temperature_kl", name, partial(kl_comparison, shape, layout, getattr(torch, dtype), kind))


def kl_cells() -> list[GridCell]:
    points: list[tuple] = [(shape, "contiguous", dtype, "") for shape in ((1, 2), (1, 2, 1, 1)) for dtype in DTYPES]
    points += [((256, 32000), "contiguous", dtype, "") for dtype in ("float32", "bfloat16")]
    points += draw(12, KL_SMALL, ROW_LAYOUTS, DTYPES, ("",)) + draw(14, KL_LARGE, ROW_LAYOUTS, DTYPES, ("",))
    points += draw(10, KL_MAPS, MAP_LAYOUTS, DTYPES, ("",))
    points += draw(9, KL_SMALL + KL_LARGE, ROW_LAYOUTS, DTYPES, KL_KINDS) + draw(3, KL_MAPS, MAP_LAYOUTS, DTYPES, KL_KINDS)
    return [kl_cell(*point) for point in dict.fromkeys(points)]


# attention_transfer_loss: features [B, C, H, W].

AT_SMALL = [(1, 1, 1, 1), (1, 64, 1, 1), (2, 7, 5, 3), (8, 16, 4, 4), (64, 3, 8, 8), (1, 512, 4, 4), (128, 10, 1, 1)]
AT_LARGE = [(128, 64, 8, 8), (128, 512, 2, 2), (16, 256, 14, 14), (32, 64, 32, 32), (4, 2048, 7, 7), (1, 256, 64, 64)]
AT_LARGE += [(8, 64, 56, 56), (64, 3, 32, 32), (1, 1, 512, 512)]
AT_LAYOUTS = ("contiguous", "channels_last", "transposed", "every other")
AT_POWERS = (1.0, 1.5, 4.0)


def at_comparison(shape: tuple[int, ...], layout: str, dtype: torch.dtype, p: float) -> Comparison:
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(with_layout(x.to(dtype), layout) for x in torch.randn(2, *shape, generator=generator, dtype=torch.float64))
    eager = partial(reference.attention_transfer_loss, p=p)
    exact = tuple(x.double().contiguous() for x in inputs)
    (value,), (gradient,) = value_and_gradients(eager, require_gradients(exact, 1), None)
    rtol = 2 * sum_error(computed_in(dtype), max(channels, 4), 24 + 16 * p)
    maps = reference.attention_pool(exact[0], p).flatten(1)
    student, teacher = (reference.attention_pool(x, p, normalize="l2").flatten(1) for x in exact)
    # The normalised maps have a relative error, and their difference an absolute error.
    both = student + teacher
    magnitude = (2 * (student - teacher).norm(dim=1) * both.norm(dim=1) / (height * width)).mean().item()
    size = both + student * (student * both).sum(1, keepdim=True)
    size = size / maps.norm(dim=1, keepdim=True).clamp_min(1e-12) * 2 / (height * width * batch)
    scale = size.view(batch, 1, height, width) * p * exact[0].abs() ** (p - 1) / channels
    bounds = [Bound(value, rtol, atol=rtol * magnitude + rtol**2), Bound(gradient, 4 * rtol, scale, 1e-40)]
    return compare_losses(partial(attention_transfer_loss, p=p), eager, inputs, bounds)


def at_cell(shape: tuple[int, ...], layout: str, dtype: str, p: float = 2.0) -> GridCell:
    name = join_name(sizes(shape), layout, dtype, "" if p == 2 else f"p = {p:g}")
    return GridCell("attention_pool", name, partial(at_comparison, shape, layout, getattr(torch, dtype), p))


def at_cells() -> list[GridCell]:
    points: list[tuple] = [((1, 1, 1, 1), "contiguous", dtype, 2.0) for dtype in DTYPES]
    points += [((32, 256, 28, 28), layout, "float32", 2.0) for layout in ("contiguous", "channels_last")]
    points += draw(14, AT_SMALL, AT_LAYOUTS, DTYPES, (2.0,)) + draw(18, AT_LARGE, AT_LAYOUTS, DTYPES, (2.0,))
    points += draw(12, AT_SMALL + AT_LARGE, AT_LAYOUTS, DTYPES, AT_POWERS)
    return [at_cell(*point) for point in dict.fromkeys(points)]


# rbf_correlation_loss: vectors [B, M, K] and [B, N, K].

BETA = 8.0
RBF_SMALL = [(1, 1, 1, 1), (1, 1, 300, 1), (2, 3, 5, 2), (32, 16, 16, 1), (4, 20, 25, 37), (128, 64, 32, 1)]
RBF_LARGE = [(8, 256, 128, 2), (128, 128, 64, 1), (1, 2048, 1024, 1), (16, 512, 512, 1), (1, 64, 64, 64), (128, 256, 128, 1)]
RBF_LAYOUTS = ("contiguous", "transposed", "every other")
# Columns of norm 1, as in SVD-KD, and numbers in an interval of this width.
RBF_KINDS = {"norm 1": None, "range 6": 6.0, "range 40": 40.0}


def rbf_inputs(shape: tuple[int, ...], layout: str, dtype: torch.dtype, kind: str) -> tuple[Tensor, ...]:
    """Return sx, sy, tx and ty. Student and teacher differ by about a tenth."""
    batch, m, n, columns = shape
    generator, width = torch.Generator().manual_seed(0), RBF_KINDS[kind]
    students, teachers = [], []
    for size in (m, n):
        x = torch.rand(batch, size, columns, generator=generator, dtype=torch.float64)
        x = x / x.norm(dim=1, keepdim=True) if width is None else width * (x - 0.5)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) * x.abs().mean(1, keepdim=True)
        students.append(x + 0.1 * noise)
        teachers.append(x)
    return tuple(with_layout(x.to(dtype), layout) for x in (*students, *teachers))


def exact_rbf_loss(sx: Tensor, sy: Tensor, tx: Tensor, ty: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the loss, its gradients to sx and sy, and the sums of the magnitudes of their terms.

    The difference S - T of the correlations is computed as max(S, T) expm1(-|log S - log T|),
    because a subtraction is inaccurate if S is close to T.
    """
    ds, dt = sx[:, :, None] - sy[:, None], tx[:, :, None] - ty[:, None]
    s, t = torch.exp(-ds * ds / BETA), torch.exp(-dt * dt / BETA)
    log_quotient = ((tx - sx)[:, :, None] - (ty - sy)[:, None]) * (ds + dt) / BETA  # log S - log T
    difference = log_quotient.sign() * torch.maximum(s, t) * -torch.expm1(-log_quotient.abs())
    terms = difference * s * ds * (-4 / BETA)
    return difference.square().sum(), [terms.sum(2), -terms.sum(1)], [terms.abs().sum(2), terms.abs().sum(1)]


def rbf_comparison(shape: tuple[int, ...], layout: str, dtype: torch.dtype, kind: str) -> Comparison:
    inputs = rbf_inputs(shape, layout, dtype, kind)
    sx, sy, tx, ty = (x.double() for x in inputs)
    value, gradients, magnitudes = exact_rbf_loss(sx, sy, tx, ty)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    bounds = [Bound(value, rtol, atol=1e-30), *(Bound(g, rtol, size, 1e-22) for g, size in zip(gradients, magnitudes, strict=True))]
    return compare_losses(rbf_correlation_loss, reference.rbf_correlation_loss, inputs, bounds)


def rbf_cell(shape: tuple[int, ...], layout: str, dtype: str, kind: str) -> GridCell:
    name = join_name(sizes(shape), kind, layout, dtype)
    return GridCell("rbf_correlation", name, partial(rbf_comparison, shape, layout, getattr(torch, dtype), kind))


def rbf_cells() -> list[GridCell]:
    points: list[tuple] = [((1, 1, 1, 1), "contiguous", dtype, kind) for dtype in DTYPES for kind in ("norm 1", "range 40")]
    points += [((128, 256, 256, 1), "contiguous", "float32", kind) for kind in RBF_KINDS]
    points += draw(17, RBF_SMALL, RBF_LAYOUTS, DTYPES, RBF_KINDS) + draw(22, RBF_LARGE, RBF_LAYOUTS, DTYPES, RBF_KINDS)
    return [rbf_cell(*point) for point in dict.fromkeys(points)]


GRIDS = {"temperature_kl": kl_cells, "attention_pool": at_cells, "rbf_correlation": rbf_cells, "truncated_svd": svd_cells}


def smoke_cells() -> dict[str, list[GridCell]]:
    """Return two tiny cells of each op, with which a test runs all of the code."""
    return {
        "temperature_kl": [kl_cell((1, 2), "contiguous", "float32"), kl_cell((2, 3, 2, 2), "channels_last", "bfloat16", "jsd")],
        "attention_pool": [at_cell((1, 1, 1, 1), "contiguous", "float64"), at_cell((2, 3, 4, 4), "channels_last", "float32", 1.5)],
        "rbf_correlation": [
            rbf_cell((1, 1, 1, 1), "contiguous", "float64", "range 40"),
            rbf_cell((2, 3, 4, 2), "transposed", "float32", "norm 1"),
        ],
        "truncated_svd": [svd_cell(1, 3, 4, 2, "decaying", "float64"), svd_cell(16, 2, 2, 2, "relu", "float32")],
    }


def cells_of(op: str, smoke: bool = False) -> list[GridCell]:
    """Return the cells of an op; with ``smoke``, two tiny ones."""
    return smoke_cells()[op] if smoke else GRIDS[op]()
