"""temperature_kl, forward and backward, against eager PyTorch, Inductor and the copy bandwidth."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, SMOKE, copy_seconds
from tolerances import assert_close, of_sum

from kdkernels import reference, temperature_kl
from kdkernels.timing import forward_backward, time_interleaved

T = 4.0
# name, shape, dim, dtype, options, seconds
SHAPES = [
    ("128 x 100", (128, 100), 1, torch.float32, {}, 2),
    ("1024 x 1000", (1024, 1000), 1, torch.float32, {}, 4),
    ("2048 x 32000", (2048, 32000), 1, torch.float32, {}, 30),
    ("2048 x 32000 bf16", (2048, 32000), 1, torch.bfloat16, {}, 20),
    ("32 x 21 x 128 x 128, dim=1", (32, 21, 128, 128), 1, torch.float32, {}, 12),
    ("1024 x 1000 reverse", (1024, 1000), 1, torch.float32, {"direction": "reverse"}, 4),
    ("1024 x 1000 jsd", (1024, 1000), 1, torch.float32, {"direction": "jsd"}, 4),
    ("1024 x 1000 cross-entropy", (1024, 1000), 1, torch.float32, {"include_entropy": False}, 4),
    ("1024 x 1000 both gradients", (1024, 1000), 1, torch.float32, {"both": True}, 4),
]
GPU_SHAPES = [
    ("8192 x 32000 bf16", (8192, 32000), 1, torch.bfloat16, {}, 5),
    ("4096 x 128256 bf16", (4096, 128256), 1, torch.bfloat16, {}, 5),
    ("65536 x 1000", (65536, 1000), 1, torch.float32, {}, 5),
]


def textbook(student, teacher, dim):
    """What is written by hand in every distillation script."""
    rows = student.numel() // student.shape[dim]
    return F.kl_div(F.log_softmax(student / T, dim), F.softmax(teacher / T, dim), reduction="sum") * T**2 / rows


@pytest.mark.parametrize(
    ("name", "shape", "dim", "dtype", "options", "seconds"),
    SHAPES + (GPU_SHAPES if DEVICE == "cuda" else []),
    ids=lambda v: v if isinstance(v, str) else "",
)
def bench_temperature_kl(name, shape, dim, dtype, options, seconds, report):
    if SMOKE:
        shape, seconds = tuple(min(n, 16) for n in shape), 0.01
    options = dict(options)
    both = options.pop("both", False)
    teacher = torch.randn(shape, device=DEVICE)
    student = (teacher + 0.5 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    teacher = teacher.to(dtype).requires_grad_(both)
    error = gate(student, teacher, dim, options)

    losses = {
        "fused": lambda s, t: temperature_kl(s, t, T, dim=dim, **options),
        "eager": lambda s, t: reference.temperature_kl(s, t, T, dim=dim, **options),
    }
    losses["Inductor"] = torch.compile(losses["eager"], dynamic=False)
    if not options and not both:
        losses["textbook"] = lambda s, t: textbook(s, t, dim)
        losses["Inductor textbook"] = torch.compile(losses["textbook"], dynamic=False)
    calls = {k: forward_backward(f, student, teacher) for k, f in losses.items()}
    times = time_interleaved(calls, seconds=seconds)
    passes = 4 if both else 3  # read both, write the gradients; a copy is two
    limit = passes / 2 * copy_seconds(student.nbytes)
    report(name, calls["fused"], times, **{"of copy limit": limit / sorted(times["fused"])[len(times["fused"]) // 2], "error": error})


def gate(student, teacher, dim, options) -> float:
    """No speed without a right answer: the op against float64 on (the first rows of) the very inputs. Returns the relative error of the loss."""
    rows = 1 - dim if student.dim() == 2 else 0
    s, t = (x.detach().narrow(rows, 0, min(4, x.shape[0])) for x in (student, teacher))
    exact_s = s.double().requires_grad_()
    exact = reference.temperature_kl(exact_s, t.double(), T, dim=dim, **options)
    s = s.requires_grad_()
    loss = temperature_kl(s, t, T, dim=dim, **options)
    (got,), (want,) = torch.autograd.grad(loss, s), torch.autograd.grad(exact, exact_s)
    rtol = of_sum(torch.float32, s.shape[dim])
    assert_close("loss", loss, exact, rtol=rtol)
    assert_close("gradient", got, want, rtol=4 * rtol, scale=want.abs().max().item())
    return abs(loss.item() / exact.item() - 1)
