"""Times of a whole training step of each method, in four parts: teacher, student, loss, optimizer.

Each step is timed with the fused ops and with the references in their place.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
import kdkernels
from kdkernels import models, reference
from kdkernels.distill import FSP, KD, SVDKD, AttentionTransfer, GradientAttentionTransfer, at, clip_transfer
from kdkernels.distill.base import Distiller

from .suite import DEVICE, MODE, SMOKE, row_of

PARTS = ("teacher", "student", "loss", "optimizer")
LAYERS = ["layer1", "layer2", "layer3"]
POOLS = [f"pool{i}" for i in range(4)]
REPLACEMENTS = {
    "temperature_kl": reference.temperature_kl,
    "attention_transfer_loss": reference.attention_transfer_loss,
    "align_singular_vectors": reference.align_singular_vectors,
    "rbf_correlation_loss": reference.rbf_correlation_loss,
    "truncated_svds": lambda xs, k, **options: [reference.truncated_svd(x, k, **options) for x in xs],
}
# name, function that creates the method from a student and a teacher, networks, batch size, seconds
STEPS = [
    ("KD", lambda s, t: KD(s, t), ("resnet20", "resnet56"), 64, 12),
    ("AT", lambda s, t: AttentionTransfer(s, t, LAYERS, LAYERS), ("resnet20", "resnet56"), 64, 12),
    ("AT + KD", lambda s, t: AttentionTransfer(s, t, LAYERS, LAYERS, gamma=0.1, alpha=0.9), ("resnet20", "resnet56"), 64, 12),
    ("gradient AT", lambda s, t: GradientAttentionTransfer(s, t), ("resnet20", "resnet56"), 64, 12),
    ("FSP, one stage", lambda s, t: FSP(s, t, LAYERS, LAYERS), ("resnet20", "resnet56"), 64, 12),
    ("SVD-KD", lambda s, t: SVDKD(s, t, POOLS, POOLS), ("sskd_vgg_student", "sskd_vgg_teacher"), 128, 20),
]


@contextlib.contextmanager
def references():
    """Replace the fused ops by the references in losses and methods, and restore them on exit."""
    modules = [m for name, m in sys.modules.items() if name.startswith("kdkernels.") and not name.startswith(("kdkernels.ops", "kdkernels.benches"))]
    imported_ops = [(m, name) for m in modules for name in REPLACEMENTS if getattr(m, name, None) is getattr(kdkernels, name)]
    for module, name in imported_ops:
        setattr(module, name, REPLACEMENTS[name])
    try:
        yield
    finally:
        for module, name in imported_ops:
            setattr(module, name, getattr(kdkernels, name))


class Clock:
    """Stopwatch that sums up the seconds of each part."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = 0.0
        self.start()

    def start(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.last = time.perf_counter()

    def add(self, part: str) -> None:
        before = self.last
        self.start()
        self.seconds[part] += self.last - before


class Step:
    """A training step on one batch, as in :meth:`Distiller.training_step`, timed in parts."""

    def __init__(self, method: Distiller, batch: dict):
        self.method, self.batch = method, batch
        self.optimizer = method.make_optimizer(method.student.parameters())
        self.parameters = list(method.student.parameters())

    def __call__(self) -> dict[str, float]:
        clock = Clock()
        if isinstance(self.method, GradientAttentionTransfer):
            self._differentiate_inputs(clock)
        else:
            self._differentiate_features(clock)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.add("optimizer")
        return clock.seconds

    def _differentiate_features(self, clock: Clock) -> None:
        """Run forward and backward of a method whose losses depend on logits and features.

        The losses are computed from detached copies of logits and features. The gradients of the
        copies are then propagated through the student.
        """
        teacher = self.method.teacher_outputs(self.batch)
        clock.add("teacher")
        logits, features = self.method.student_outputs(self.batch)
        clock.add("student")
        outputs = [logits, *features.values()]
        leaves = [x.detach().requires_grad_() for x in outputs]
        with _outputs(self.method, teacher, (leaves[0], dict(zip(features, leaves[1:], strict=True)))):
            losses = self._losses()
        transfer = losses.pop("svd", None) if isinstance(self.method, SVDKD) else None
        main_gradients = torch.autograd.grad(cast(Tensor, sum(losses.values())), leaves, allow_unused=True)
        transfer_gradients = torch.autograd.grad(transfer, leaves, allow_unused=True) if transfer is not None else None
        clock.add("loss")
        second = _backpropagate(outputs, transfer_gradients, self.parameters, retain_graph=True) if transfer_gradients else None
        for p, g in zip(self.parameters, _backpropagate(outputs, main_gradients, self.parameters), strict=True):
            p.grad = g
        clock.add("student")
        if second is not None:
            with_gradient = [(p, cast(Tensor, p.grad), g) for p, g in zip(self.parameters, second, strict=True) if g is not None]
            clipped = clip_transfer([main for _, main, _ in with_gradient], [g for *_, g in with_gradient], 0)
            for (p, main, _), g in zip(with_gradient, clipped, strict=True):
                p.grad = main + g
            clock.add("loss")

    def _differentiate_inputs(self, clock: Clock) -> None:
        """Run forward and backward of a method that differentiates the student twice.

        The last backward pass, of loss and student together, is counted as part of the student.
        """
        original = at.input_gradient

        def timed(network, *args, **options):
            clock.add("loss")
            gradient = original(network, *args, **options)
            clock.add("teacher" if network is self.method.teacher else "student")
            return gradient

        at.input_gradient = timed
        try:
            total = cast(Tensor, sum(self._losses().values()))
        finally:
            at.input_gradient = original
        clock.add("loss")
        total.backward()
        clock.add("student")

    def _losses(self) -> dict[str, Tensor]:
        return self.method.losses(self.batch)[1]


@contextlib.contextmanager
def _outputs(method: Distiller, teacher: tuple, student: tuple):
    """Make ``method.losses`` use these outputs instead of running the networks."""
    vars(method).update(teacher_outputs=lambda batch: teacher, student_outputs=lambda batch: student)
    try:
        yield
    finally:
        del method.teacher_outputs, method.student_outputs


def _backpropagate(outputs: list[Tensor], gradients, parameters, **options) -> tuple[Tensor | None, ...]:
    """Return the gradients of the parameters from those of the outputs, which may be ``None``."""
    pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None]
    return torch.autograd.grad([x for x, _ in pairs], parameters, [g for _, g in pairs], allow_unused=True, **options)


def time_parts(steps: dict[str, Callable[[], dict[str, float]]], seconds: float) -> dict[str, list[dict[str, float]]]:
    """Run one step of each contender per round, and return the seconds of its parts by round."""
    for step in steps.values():
        step()
    times: dict[str, list] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds
    while len(times["fused"]) < 5 or time.perf_counter() < deadline:
        order = list(steps) if len(times["fused"]) % 2 else list(steps)[::-1]
        for name in order:
            times[name].append(steps[name]())
    return times


@pytest.mark.skipif(MODE == "quick", reason="not one of the main rows")
@pytest.mark.parametrize(("name", "make", "nets", "batch", "seconds"), STEPS, ids=lambda v: v if isinstance(v, str) else "")
def bench_step(name, make, nets, batch, seconds, bench):
    torch.manual_seed(0)
    if SMOKE:
        batch, seconds = 4, 0.01
        nets = ("resnet8", "resnet8") if nets[0].startswith("resnet") else nets
    student, teacher = (getattr(models, n)(num_classes=100) for n in nets)
    step = Step(
        make(student, teacher).to(DEVICE),
        {"image": torch.randn(batch, 3, 32, 32, device=DEVICE), "label": torch.randint(100, (batch,), device=DEVICE)},
    )
    step.method.student.train()

    def with_references() -> dict[str, float]:
        with references():
            return step()

    parts = time_parts({"fused": step, "eager": with_references}, seconds)
    row = row_of(
        "step", f"{name}, {nets[1]} to {nets[0]}, batch {batch}", "step", {c: [sum(s.values()) for s in rounds] for c, rounds in parts.items()}
    )
    row["parts"] = {c: {part: sorted(s[part] for s in rounds)[len(rounds) // 2] for part in PARTS} for c, rounds in parts.items()}
    bench(row)
