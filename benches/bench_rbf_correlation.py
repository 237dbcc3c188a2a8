"""rbf_correlation_loss and rbf_correlation against eager PyTorch, Inductor, and the linear form in plain torch."""

from functools import partial

import torch
from torch.nn.functional import normalize

from kdkernels import rbf_correlation, rbf_correlation_loss, reference

from .suite import DEVICE, Cell, Problem, at_most, compiled, over

BETA = 8.0
RANK = 6  # terms that unit columns take


def linear_in_torch(sx, sy, tx, ty):
    """The loss in linear time as plain torch has it: terms and their products in double, without the care for digits."""
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
    """Student's and teacher's, apart by a tenth: unit columns, or numbers over a range of `spread`."""
    teacher = unit((batch, n, k)) if spread is None else spread * (torch.rand(batch, n, k, device=DEVICE) - 0.5)
    return teacher + 0.1 * teacher.abs().mean() * torch.randn_like(teacher), teacher


def loss_problem(shape, spread=None) -> Problem:
    batch, m, n, k = at_most(shape, 20)
    (sx, tx), (sy, ty) = columns(batch, m, k, spread), columns(batch, n, k, spread)
    inputs = (sx.requires_grad_(), sy.requires_grad_(), tx, ty)
    eager = reference.rbf_correlation_loss
    functions = {"fused": rbf_correlation_loss, "eager": eager, "Inductor": compiled(lambda *x: eager(*x))}
    if spread is None:
        functions |= {"linear in torch": linear_in_torch, "Inductor linear": compiled(lambda *x: linear_in_torch(*x))}
    whole = batch * m * n * k <= 1 << 22
    few = inputs if whole else tuple(x[:1].detach().requires_grad_(x.requires_grad) for x in inputs)
    work = {}
    if spread is None:  # in double: terms, and their products with one another
        operations = batch * k * (m + n) * (60 + 2 * (2 * RANK) ** 2 / 2)
        work = {"forward": {"GEMM float64": operations}, "forward + backward": {"GEMM float64": 2 * operations}}
    moved = {"forward": 2 * (sx.nbytes + sy.nbytes), "forward + backward": 3 * (sx.nbytes + sy.nbytes)}
    return Problem(functions, inputs, eager, few, {"value": 1e-6, "gradient": 1e-5}, None, moved, work)


def correlation_problem(shape) -> Problem:
    batch, m, n, k = at_most(shape, 20)
    inputs = unit((batch, m, k)).requires_grad_(), unit((batch, n, k)).requires_grad_()
    eager = reference.rbf_correlation
    functions = {"fused": rbf_correlation, "eager": eager, "Inductor": compiled(lambda *x: eager(*x))}
    few = tuple(x[:1].detach().requires_grad_() for x in inputs) if batch * m * n * k > 1 << 22 else inputs
    out = batch * m * n * k
    moved = {"forward": 4 * out, "forward + backward": 8 * out}  # written; its upstream gradient read
    work = {"forward": {"exp": out}, "forward + backward": {"exp": 2 * out}}
    upstream = (torch.randn(batch, m, n, k, device=DEVICE),)
    return Problem(functions, inputs, eager, few, {"value": 5e-7, "gradient": 1e-5}, upstream, moved, work)


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


@over(CELLS)
def bench_rbf_correlation(cell, direction, bench):
    bench(cell, direction)
