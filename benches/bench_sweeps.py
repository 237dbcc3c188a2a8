"""Sweeps: time and memory of each op against one size of its inputs, with the other sizes fixed."""

from functools import partial

from . import bench_attention_pool as attention
from . import bench_rbf_correlation as rbf
from . import bench_temperature_kl as kl
from . import bench_truncated_svd as svd
from .suite import SMOKE, Cell, for_cells

BOTH = ("forward + backward",)


def points(op, sweep, make, values) -> list[Cell]:
    """Return the cells of a sweep: for each value, the problem ``make(value)``."""
    values = values[:2] if SMOKE else values
    return [Cell(op, f"{sweep}: {v}", partial(make, v), 0.8, sweep=sweep, at=v) for v in values]


CELLS = [
    *points("temperature_kl", "rows of 1000 classes", lambda n: kl.problem((n, 1000)), (32, 128, 512, 2048, 8192)),
    *points("temperature_kl", "classes, 512 rows", lambda n: kl.problem((512, n)), (10, 100, 1000, 10000, 50000)),
    *points("attention_pool", "batch of 64 x 32 x 32", lambda n: attention.problem((n, 64, 32, 32)), (1, 4, 16, 64, 256)),
    *points("attention_pool", "channels, 32 of 16 x 16", lambda n: attention.problem((32, n, 16, 16)), (8, 32, 128, 512, 2048)),
    *points(
        "attention_pool",
        "pixels, 16 of 64 channels",
        lambda n: attention.problem((16, 64, round(n**0.5), round(n**0.5))),
        (16, 64, 256, 1024, 4096, 16384),
    ),
    *points("rbf_correlation", "M = N, 32 samples", lambda n: rbf.loss_problem((32, n, n, 1)), (64, 128, 256, 512, 1024, 2048)),
    *points("rbf_correlation", "batch of 256 x 256", lambda n: rbf.loss_problem((n, 256, 256, 1)), (1, 4, 16, 64, 256)),
    *points("rbf_correlation", "columns, 32 of 256 x 256", lambda n: rbf.loss_problem((32, 256, 256, n)), (1, 2, 4, 8)),
    *points("truncated_svd", "batch of 256 x 64, k = 4", lambda n: svd.problem(16, 64, n), (1, 4, 16, 64, 256)),
    *points("truncated_svd", "channels, 32 of 256 places, k = 4", lambda n: svd.problem(16, n, 32), (16, 32, 64, 128, 256, 512)),
    *points("truncated_svd", "places, 32 of 64 channels, k = 4", lambda n: svd.problem(round(n**0.5), 64, 32), (16, 64, 256, 1024, 4096)),
    *points("truncated_svd", "k, 64 of 256 x 128", lambda n: svd.problem(16, 128, 64, n), (1, 2, 4, 8, 16, 32)),
]


@for_cells(CELLS, BOTH)
def bench_sweeps(cell, direction, bench):
    bench(cell, direction)
