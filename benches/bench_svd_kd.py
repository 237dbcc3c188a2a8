"""The whole loss of SVD-KD, forward and backward, against the same in reference PyTorch, and its share of a training step of the paper's students."""

import statistics

import pytest
import torch
from conftest import DEVICE, SMOKE
from torch.nn.functional import cross_entropy

from kdkernels import models, reference
from kdkernels.distill import clip_transfer
from kdkernels.models import TAPS, FeatureTaps
from kdkernels.nn import svd_kd_loss
from kdkernels.timing import ratio, time_interleaved

# pair of networks, batch, k, seconds
CASES = [
    ("vgg", 128, 1, 40),
    ("vgg", 128, 2, 40),
    ("mobilenet", 32, 1, 40),
    ("resnext", 32, 1, 40),
]


@pytest.mark.parametrize(("pair", "batch", "k", "seconds"), CASES, ids=str)
def bench_svd_kd(pair, batch, k, seconds, report):
    if SMOKE:
        batch, seconds = 4, 0.01
    nets = [getattr(models, f"sskd_{pair}_{role}")().to(DEVICE) for role in ("student", "teacher")]
    taps = [FeatureTaps(net, TAPS[type(net)]) for net in nets]
    image, label = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randint(100, (batch,), device=DEVICE)
    with torch.no_grad():
        student, teacher = (list(tap(image)[1].values()) for tap in taps)
    leaves = [x.requires_grad_() for x in student]

    def both(loss):
        return lambda: torch.autograd.grad(loss(leaves, teacher, k), leaves)

    exact = [x[:2].detach().double() for x in leaves], [x[:2].double() for x in teacher]
    error = abs(svd_kd_loss([x[:2] for x in leaves], [x[:2] for x in teacher], k).item() / reference.svd_kd_loss(*exact, k).item() - 1)
    assert error < 1e-3  # that of float32 maps' singular vectors, over their gaps
    calls = {"fused": both(svd_kd_loss), "eager": both(reference.svd_kd_loss)}
    calls["Inductor"] = both(torch.compile(reference.svd_kd_loss, dynamic=False))

    parameters = list(nets[0].parameters())

    def step(with_loss: bool):
        """Forward, the gradient of the labels, the gradient of the transfer, and both together."""

        def run():
            logits, features = taps[0](image)
            main = torch.autograd.grad(cross_entropy(logits, label), parameters, retain_graph=with_loss)
            if with_loss:
                transfer = torch.autograd.grad(svd_kd_loss(list(features.values()), teacher, k), parameters, allow_unused=True)
                pairs = [(m, t) for m, t in zip(main, transfer, strict=True) if t is not None]
                clip_transfer(*zip(*pairs, strict=True), 0)

        return run

    times = time_interleaved(calls, seconds=seconds, warmup=1)
    steps = time_interleaved({"fused": calls["fused"], "plain": step(False), "whole": step(True)}, seconds=seconds / 4)
    median = {name: statistics.median(values) for name, values in steps.items()}
    share = {"share of the step": median["fused"] / median["whole"], "step over plain": ratio(steps, "whole", "plain")}
    report(f"{pair}, batch {batch}, k = {k}", calls["fused"], times, **share, error=error)
