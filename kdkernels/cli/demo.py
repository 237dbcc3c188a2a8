"""``kdkernels demo``: distil a student with four methods, and time the four ops that they use.

A teacher, the student alone, and the same student with KD, attention transfer, FSP and SVD-KD are
trained on generated images, of which the students see 1,000. This is kdkernels compare with given
weights. The report also shows what each op computes for an image, and the times of the ops.
"""

from __future__ import annotations

import json
import shutil
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import attention_transfer_loss, rbf_correlation_loss, reference, temperature_kl, truncated_svd
from ..benches.timing import forward_backward, ratio, time_interleaved
from ..files import replaced_atomically
from .arguments import Parser, make_folder
from .compare import Plan, compare, jobs_of, only_one, text_table
from .comparison.methods import BASELINE, parse_rows
from .comparison.pool import pool_of
from .comparison.runs import EMBEDDED, Settings
from .demo_report import write_demo

ROWS = "kd:alpha=0.9,at:beta=10,fsp:beta=0.1,svd_kd:loss=mean:beta=10"  # weights: docs/which_method.md


def main(arguments: list[str]) -> int:
    parser = Parser("demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results and report.html (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: the GPU, if there is one)")
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions with different initial weights and images (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="trainings at the same time, a process each (default: one per core; 1 with a GPU)")
    parser.add_argument("--quick", action="store_true", help="train for one epoch on few images, as a test; the accuracies mean nothing")
    parser.add_argument("--restart", action="store_true", help="do not continue an earlier run in --out; delete its trainings")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    jobs = jobs_of(parser, options)
    make_folder(parser, options.out)
    if options.restart:
        remove_results(options.out)
    plan = Plan(parse_rows(ROWS), list(range(options.seeds)), [], BASELINE, cost=False)
    with only_one(options.out), pool_of(jobs) as pool:
        try:
            comparison = compare(demo_settings(options.quick, options.device), plan, options.out, pool)
            times = op_times(options.out / "op_times.json", 0.1 if options.quick else 1.5, options.device)
        except (KeyboardInterrupt, SystemExit):
            command = " ".join(["kdkernels demo", *(a for a in arguments if a != "--restart")])
            print(f"\nInterrupted. The finished trainings are in {options.out}; resume with: {command}  (or make demo)")
            return 130
    report = write_demo(options.out / "report.html", comparison, times, options.out, demo_settings(options.quick, options.device))
    print("\n" + text_table(comparison) + "\n\n" + times_table(times))
    print(f"\nReport: {report}")
    return 0


def demo_settings(quick: bool, device: str) -> Settings:
    return Settings(
        data=EMBEDDED,
        size=32,
        labelled=None if quick else 1000,
        epochs=1 if quick else 24,
        teacher_epochs=1 if quick else 6,
        batch_size=128,
        learning_rate=0.1,
        augment=False,
        student="TinyCNN:width=8",
        teacher="TinyCNN:width=8:depth=3",
        teacher_weights=None,
        layers=(),
        teacher_layers=(),
        quick=quick,
        device=device,
    )


def remove_results(folder: Path) -> None:
    """Delete what an earlier run wrote to the folder, and nothing else."""
    shutil.rmtree(folder / "trainings", ignore_errors=True)
    for name in ("settings.json", "comparison.json", "op_times.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _correlation_loss(op: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss between the singular vectors of two layers, [B, N, k] each."""
    return lambda s, t: op(s[:, :64], s[:, 64:], t[:, :64], t[:, 64:])


def _projection(triplets: tuple[Any, Tensor, Tensor], target: Tensor) -> Tensor:
    """Return a loss of singular values [B, k] and right singular vectors [B, N, k]."""
    _, s, v = triplets
    return s.sum() + (v * target[:, : v.shape[1], : v.shape[2]]).sum()


# name: (op, its reference, shape of the student's and of the teacher's input)
OPS: dict[str, tuple[Callable, Callable, tuple[int, ...]]] = {
    "temperature_kl": (lambda s, t: temperature_kl(s, t, 4.0), lambda s, t: reference.temperature_kl(s, t, 4.0), (1024, 1000)),
    "attention_transfer_loss": (attention_transfer_loss, reference.attention_transfer_loss, (64, 64, 32, 32)),
    "truncated_svd": (lambda s, t: _projection(truncated_svd(s, 2), t), lambda s, t: _projection(reference.truncated_svd(s, 2), t), (32, 256, 64)),
    "rbf_correlation_loss": (_correlation_loss(rbf_correlation_loss), _correlation_loss(reference.rbf_correlation_loss), (64, 192, 2)),
}


def op_times(path: Path, seconds: float, device: str) -> dict[str, Any]:
    """Time forward + backward of each op: milliseconds, and ratios to the fused op.

    The times are stored in ``path``, and measured only if they are not there.
    """
    if path.exists():
        return json.loads(path.read_text())
    print("\nTiming the ops: fused, reference, torch.compile of the reference", flush=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*")  # of torch.compile about itself
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {}
    for name, (op, plain, shape) in OPS.items():
        student, teacher = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
        losses = {"fused": op, "reference": plain, "compiled": torch.compile(plain, dynamic=False)}
        try:
            losses["compiled"](student, teacher).backward()
        except Exception as error:
            print(f"torch.compile of the reference of {name} failed on this machine and is left out: {type(error).__name__}")
            del losses["compiled"]
        times = time_interleaved({k: forward_backward(f, student, teacher) for k, f in losses.items()}, seconds=seconds, device=device)
        rows[f"{name} {' x '.join(map(str, shape))}"] = {
            "milliseconds": {k: 1e3 * statistics.median(v) for k, v in times.items()},
            "ratios": {k: ratio(times, k, "fused") for k in times if k != "fused"},
        }
    with replaced_atomically(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def times_table(times: dict[str, Any]) -> str:
    lines = [f"{'forward + backward':<44}{'fused':>11}{'reference':>24}{'torch.compile':>24}"]
    for name, row in times.items():
        cells = [f"{row['milliseconds']['fused']:.3f} ms"]
        for other in ("reference", "compiled"):
            cells.append(f"{row['milliseconds'][other]:.3f} ms ({row['ratios'][other]:.1f}x)" if other in row["ratios"] else "-")
        lines.append(f"{name:<44}{cells[0]:>11}{cells[1]:>24}{cells[2]:>24}")
    return "\n".join(lines)
