"""attention_transfer_loss and attention_pool, forward and backward, against eager PyTorch, Inductor and the copy bandwidth."""

import pytest
import torch
from conftest import DEVICE, SMOKE, copy_seconds
from tolerances import of_sum

from kdkernels import attention_pool, attention_transfer_loss, reference
from kdkernels.timing import forward_backward, time_interleaved

# name, shape, p, dtype, channels_last, options, seconds
LOSSES = [
    ("128 x 64 x 32 x 32", (128, 64, 32, 32), 2.0, torch.float32, False, {}, 6),
    ("128 x 64 x 32 x 32 channels_last", (128, 64, 32, 32), 2.0, torch.float32, True, {}, 6),
    ("64 x 256 x 56 x 56", (64, 256, 56, 56), 2.0, torch.float32, False, {}, 15),
    ("64 x 256 x 56 x 56 channels_last", (64, 256, 56, 56), 2.0, torch.float32, True, {}, 15),
    ("128 x 256 x 8 x 8", (128, 256, 8, 8), 2.0, torch.float32, False, {}, 4),
    ("128 x 256 x 8 x 8 channels_last", (128, 256, 8, 8), 2.0, torch.float32, True, {}, 4),
    ("128 x 64 x 32 x 32 bf16", (128, 64, 32, 32), 2.0, torch.bfloat16, False, {}, 6),
    ("128 x 64 x 32 x 32, p = 1.5", (128, 64, 32, 32), 1.5, torch.float32, False, {}, 6),
    ("128 x 64 x 32 x 32, p = 2.7", (128, 64, 32, 32), 2.7, torch.float32, False, {}, 6),
    ("128 x 64 x 32 x 32, maximum", (128, 64, 32, 32), 2.0, torch.float32, False, {"reduce": "max"}, 6),
    ("1 x 256 x 128 x 128", (1, 256, 128, 128), 2.0, torch.float32, False, {}, 4),
    ("128 x 512 x 2 x 2", (128, 512, 2, 2), 2.0, torch.float32, False, {}, 3),
]
POOLS = [
    ("pool 128 x 64 x 32 x 32", (128, 64, 32, 32), 2.0, torch.float32, False, {"normalize": "l2"}, 6),
    ("pool 64 x 256 x 56 x 56", (64, 256, 56, 56), 2.0, torch.float32, False, {}, 10),
]


@pytest.mark.parametrize(("name", "shape", "p", "dtype", "last", "options", "seconds"), LOSSES + POOLS, ids=lambda v: v if isinstance(v, str) else "")
def bench_attention_pool(name, shape, p, dtype, last, options, seconds, report):
    if SMOKE:
        shape, seconds = tuple(min(n, 9) for n in shape), 0.01
    layout = torch.channels_last if last else torch.contiguous_format
    student, teacher = (torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=layout) for _ in range(2))
    student.requires_grad_()
    pool = name.startswith("pool")
    fused, eager = (attention_pool, reference.attention_pool) if pool else (attention_transfer_loss, reference.attention_transfer_loss)
    inputs = (student,) if pool else (student, teacher)
    ramp = torch.linspace(-1, 1, student[0, 0].numel())

    def loss_of(function):
        # A map is what another loss goes on with: here its product with a ramp.
        if pool:
            return lambda s: (function(s, p, **options).flatten(1) * ramp.to(s.device)).sum()
        return lambda s, t: function(s, t, p, **options)

    error = gate(loss_of(fused), loss_of(eager), inputs, p)
    losses = {"fused": loss_of(fused), "eager": loss_of(eager)}
    losses["Inductor"] = torch.compile(losses["eager"], dynamic=False)
    calls = {k: forward_backward(f, *inputs) for k, f in losses.items()}
    times = time_interleaved(calls, seconds=seconds)
    passes = 3 if pool else 4  # read student, (teacher,) student again, write the gradient; a copy is two
    limit = passes / 2 * copy_seconds(student.nbytes)
    report(name, calls["fused"], times, **{"of copy limit": limit / sorted(times["fused"])[len(times["fused"]) // 2], "error": error})


def gate(fused, eager, inputs, p) -> float:
    """No speed without a right answer: loss and gradient against float64 on the first samples of the inputs. Returns the relative error."""
    few = [x.detach()[:2].clone() for x in inputs]
    exact = [x.double() for x in few]
    few[0].requires_grad_()
    exact[0].requires_grad_()
    got, want = fused(*few), eager(*exact)
    (gradient,), (expected,) = torch.autograd.grad(got, few[0]), torch.autograd.grad(want, exact[0])
    rtol = 4 * of_sum(torch.float32, few[0].shape[1], 24 + 16 * p)
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)
    own = 2.0**-8 if few[0].dtype == torch.bfloat16 else 0.0  # the gradient is rounded to the features' dtype
    assert (gradient.double() - expected).abs().max() <= (rtol + own) * expected.abs().max()
    return abs(got.item() / want.item() - 1)
