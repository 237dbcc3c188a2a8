"""The whole loss of SVD-KD against the same in reference PyTorch, on the taps of the paper's students."""

from functools import partial

import torch

from kdkernels import models, reference
from kdkernels.models import TAPS, FeatureTaps
from kdkernels.nn import svd_kd_loss

from .suite import DEVICE, SMOKE, Cell, Problem, compiled, over


def problem(pair, batch, k) -> Problem:
    batch = 4 if SMOKE else batch
    nets = [getattr(models, f"sskd_{pair}_{role}")().to(DEVICE) for role in ("student", "teacher")]
    image = torch.randn(batch, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        student, teacher = (list(FeatureTaps(net, TAPS[type(net)])(image)[1].values()) for net in nets)
    student = [x.requires_grad_() for x in student]

    def of(loss):
        return lambda *maps: loss(maps[: len(maps) // 2], maps[len(maps) // 2 :], k)

    inputs = (*student, *teacher)
    functions = {"fused": of(svd_kd_loss), "eager": of(reference.svd_kd_loss), "Inductor": compiled(of(reference.svd_kd_loss))}
    few = tuple(x[:2].detach().requires_grad_(x.requires_grad) for x in inputs)
    own = sum(x.nbytes for x in student)
    moved = {"forward": 2 * own, "forward + backward": 4 * own}  # both nets' maps; the student's again, and its gradient
    # Of float32 maps' singular vectors over their gaps, which are small in networks that are not trained.
    return Problem(functions, inputs, of(reference.svd_kd_loss), few, {"value": 1e-3}, None, moved)


CELLS = [
    Cell("svd_kd", f"{pair}, batch {batch}, k = {k}", partial(problem, pair, batch, k), 15.0, main=pair == "vgg" and k == 1)
    for pair, batch, k in (("vgg", 128, 1), ("vgg", 128, 2), ("mobilenet", 32, 1), ("resnext", 32, 1))
]


@over(CELLS)
def bench_svd_kd(cell, direction, bench):
    bench(cell, direction)
