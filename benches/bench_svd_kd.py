"""Times of the whole SVD-KD loss against reference PyTorch, on the taps of the paper's networks."""

from functools import partial

import torch

from kdkernels import models, reference
from kdkernels.models import TAPS, FeatureTaps
from kdkernels.nn import svd_kd_loss

from .suite import DEVICE, SMOKE, Cell, Problem, compiled, for_cells


def problem(pair, batch, k) -> Problem:
    batch = 4 if SMOKE else batch
    nets = [getattr(models, f"sskd_{pair}_{role}")().to(DEVICE) for role in ("student", "teacher")]
    image = torch.randn(batch, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        student, teacher = (list(FeatureTaps(net, TAPS[type(net)])(image)[1].values()) for net in nets)
    student = [x.requires_grad_() for x in student]

    def on_maps(loss):
        return lambda *maps: loss(maps[: len(maps) // 2], maps[len(maps) // 2 :], k)

    inputs = (*student, *teacher)
    functions = {"fused": on_maps(svd_kd_loss), "eager": on_maps(reference.svd_kd_loss), "Inductor": compiled(on_maps(reference.svd_kd_loss))}
    error_inputs = tuple(x[:2].detach().requires_grad_(x.requires_grad) for x in inputs)
    # The forward reads the maps of both networks. The backward reads the student's again and writes
    # their gradient.
    student_bytes = sum(x.nbytes for x in student)
    moved = {"forward": 2 * student_bytes, "forward + backward": 4 * student_bytes}
    # The tolerance is wide because errors of singular vectors grow with the inverse of the gaps
    # between singular values, and these are small in untrained networks.
    return Problem(functions, inputs, on_maps(reference.svd_kd_loss), error_inputs, {"value": 1e-3}, None, moved)


CELLS = [
    Cell("svd_kd", f"{pair}, batch {batch}, k = {k}", partial(problem, pair, batch, k), 15.0, main=pair == "vgg" and k == 1)
    for pair, batch, k in (("vgg", 128, 1), ("vgg", 128, 2), ("mobilenet", 32, 1), ("resnext", 32, 1))
]


@for_cells(CELLS)
def bench_svd_kd(cell, direction, bench):
    bench(cell, direction)
