"""Times of rbf_correlation_loss and rbf_correlation against PyTorch, Inductor and a linear form."""

from functools import partial

import torch
from torch.nn.functional import normalize

from kdkernels import rbf_correlation, rbf_correlation_loss, reference

from .suite import DEVICE, Cell, Problem, compiled, for_cells, limit_shape

BETA = 8.0
RANK = 6  # number of terms of the series that columns of norm 1 need


def linear_in_torch(sx, sy, tx, ty):
    """Compute the loss in linear time in plain torch.

    The terms of the series and their products are float64. Unlike the fused op, this function takes
    no further measures for accuracy.
    """
    r = torch.arange(RANK, dtype=torch.float64, device=sx.device)
    scale = ((2 / BETA) ** r / torch.exp(torch.lgamma(r + 1))).sqrt()

    def terms(x):  # [B, K, M, R]
        x = x.mT.double()[..., None]
        return torch.exp(-x.square() / BETA) * x**r * scale

    a, b, c, d = (terms(x) for x in (sx, sy, tx, ty))
    da, db = a - c, b - d
    first = (da.mT @ da) * (b.mT @ b)
    second = (c.mT @ c) * (db.mT @ db)
    cross = (da.mT @ c) * (b.mT @ db)
    return (first + second + 2 * cross).sum().float()


def unit(shape):
    return normalize(torch.rand(shape, device=DEVICE), dim=1)


def columns(batch, n, k, spread=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return student and teacher columns [B, N, K] that differ by about a tenth of their size.

    The teacher's columns have norm 1 or, if ``spread`` is given, entries in a range of this width.
    """
    teacher = unit((batch, n, k)) if spread is None else spread * (torch.rand(batch, n, k, device=DEVICE) - 0.5)
    return teacher + 0.1 * teacher.abs().mean() * torch.randn_like(teacher), teacher


def loss_problem(shape, spread=None) -> Problem:
    batch, m, n, k = limit_shape(shape, 20)
    (sx, tx), (sy, ty) = columns(batch, m, k, spread), columns(batch, n, k, spread)
    inputs = (sx.requires_grad_(), sy.requires_grad_(), tx, ty)
    eager = reference.rbf_correlation_loss
    functions = {"fused": rbf_correlation_loss, "eager": eager, "Inductor": compiled(lambda *x: eager(*x))}
    if spread is None:
        functions |= {"linear in torch": linear_in_torch, "Inductor linear": compiled(lambda *x: linear_in_torch(*x))}
    error_inputs = inputs if batch * m * n * k <= 1 << 22 else tuple(x[:1].detach().requires_grad_(x.requires_grad) for x in inputs)
    work = {}
    if spread is None:  # float64 operations of the terms and of the products of terms
        operations = batch * k * (m + n) * (60 + 2 * (2 * RANK) ** 2 / 2)
        work = {"forward": {"GEMM float64": operations}, "forward + backward": {"GEMM float64": 2 * operations}}
    moved = {"forward": 2 * (sx.nbytes + sy.nbytes), "forward + backward": 3 * (sx.nbytes + sy.nbytes)}
    return Problem(functions, inputs, eager, error_inputs, {"value": 1e-6, "gradient": 1e-5}, None, moved, work)


def correlation_problem(shape) -> Problem:
    batch, m, n, k = limit_shape(shape, 20)
    inputs = unit((batch, m, k)).requires_grad_(), unit((batch, n, k)).requires_grad_()
    eager = reference.rbf_correlation
    functions = {"fused": rbf_correlation, "eager": eager, "Inductor": compiled(lambda *x: eager(*x))}
    error_inputs = tuple(x[:1].detach().requires_grad_() for x in inputs) if batch * m * n * k > 1 << 22 else inputs
    out = batch * m * n * k
    moved = {"forward": 4 * out, "forward + backward": 8 * out}  # the forward writes the output, the backward reads its gradient
    work = {"forward": {"exp": out}, "forward + backward": {"exp": 2 * out}}
    upstream = (torch.randn(batch, m, n, k, device=DEVICE),)
    return Problem(functions, inputs, eager, error_inputs, {"value": 5e-7, "gradient": 1e-5}, upstream, moved, work)


def cell(name, make, seconds=3.0, main=False) -> Cell:
    return Cell("rbf_correlation", name, make, seconds, main)


CELLS = [
    cell("128 x 512 x 512 x 2", partial(loss_problem, (128, 512, 512, 2)), 15.0, main=True),
    cell("128 x 128 x 64 x 1", partial(loss_problem, (128, 128, 64, 1)), 2.0, main=True),
    cell("8 x 2048 x 2048 x 4", partial(loss_problem, (8, 2048, 2048, 4)), 20.0, main=True),
    cell("128 x 256 x 128 x 1", partial(loss_problem, (128, 256, 128, 1))),
    cell("128 x 256 x 512 x 1", partial(loss_problem, (128, 256, 512, 1))),
    cell("32 x 16 x 16 x 1, few pairs", partial(loss_problem, (32, 16, 16, 1)), 1.0),
    cell("16 x 512 x 512 x 2, far apart: pair by pair", partial(loss_problem, (16, 512, 512, 2), spread=40.0)),
]
CELLS += [
    cell(f"correlation {' x '.join(map(str, shape))}", partial(correlation_problem, shape))
    for shape in ((128, 128, 64, 1), (32, 512, 512, 2), (8, 1024, 1024, 3))
]


@for_cells(CELLS)
def bench_rbf_correlation(cell, direction, bench):
    bench(cell, direction)
