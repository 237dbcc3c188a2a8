"""``kdkernels demo``: train a teacher, a student alone, and the same student distilled with KD."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from .. import reference, temperature_kl
from ..benches.timing import forward_backward, ratio, time_interleaved
from ..data import ClutterDigits
from ..distill import KD, Supervised
from ..distill.engine import AtomicCheckpointIO, checkpoints, silence_lightning
from ..models import TinyCNN
from .arguments import Parser, make_folder
from .demo_report import write_report
from .demo_results import ALONE, STAGES, STUDENT_WIDTH, TEACHER, TEACHER_WIDTH, Results, Stage, table

BENCH_SHAPES = {"128 x 100": ((128, 100), 1), "1024 x 1000": ((1024, 1000), 1), "16 x 21 x 64 x 64, dim=1": ((16, 21, 64, 64), 1)}


def main(arguments: list[str]) -> int:
    parser = Parser("demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for checkpoints, results and report.html (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device (default: the GPU, if there is one)")
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions with different initial weights and order (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="train for one epoch on few images, as a test; the accuracies mean nothing")
    parser.add_argument("--restart", action="store_true", help="do not resume an earlier run in --out; delete its checkpoints")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine; use --device cpu")
    make_folder(parser, options.out)

    silence_lightning()
    results = Results(options.out / "results.json", {"quick": options.quick}, restart=options.restart)
    data = ClutterDigits(train_size=512, val_size=128, test_size=256) if options.quick else ClutterDigits()
    print("Generating images of handwritten digits on photographs", flush=True)
    data.setup()
    try:
        for seed in range(options.seeds):
            for stage in STAGES:
                if results.missing(stage, seed):
                    results.add(stage, seed, train(stage, seed, data, options))
        if "bench" not in results.values:
            print("\nTiming the loss: fused, reference, torch.compile of the reference", flush=True)
            results.values["bench"] = bench(0.2 if options.quick else 2.0, options.device)
            results.save()
    except (KeyboardInterrupt, SystemExit):
        command = " ".join(["kdkernels demo", *(a for a in arguments if a != "--restart")])
        print(
            f"\nInterrupted. The finished stages, and the checkpoint of the last epoch, are in {options.out}; resume with: {command}  (or make demo)"
        )
        return 130
    report = write_report(options.out / "report.html", results.values, data, options.seeds)
    print("\n" + table(results.values, options.seeds))
    print(f"\nReport: {report}")
    return 0


class Curve(Callback):
    """Callback that records the validation accuracy of each epoch and saves it in checkpoints."""

    def __init__(self):
        self.accuracy: list[float] = []

    def on_validation_epoch_end(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.accuracy.append(float(trainer.callback_metrics["val/accuracy"]))

    def state_dict(self) -> dict:
        return {"accuracy": self.accuracy}

    def load_state_dict(self, state: dict) -> None:
        self.accuracy = list(state["accuracy"])


class OneBar(TQDMProgressBar):
    """Progress bar of the training epochs, without bars for validation and test."""

    def __init__(self):
        super().__init__(refresh_rate=5)

    def init_validation_tqdm(self):
        return Tqdm(disable=True)

    def init_test_tqdm(self):
        return Tqdm(disable=True)


def build(stage: Stage, folder: Path, seed: int) -> L.LightningModule:
    if stage is TEACHER:
        return Supervised(TinyCNN(TEACHER_WIDTH))
    if stage is ALONE:
        return Supervised(TinyCNN(STUDENT_WIDTH))
    return KD(TinyCNN(STUDENT_WIDTH), TinyCNN(TEACHER_WIDTH), teacher_weights=folder / f"teacher_{seed}" / "last.ckpt")


def train(stage: Stage, seed: int, data: ClutterDigits, options: argparse.Namespace) -> dict:
    """Train a stage, from its last checkpoint if there is one; return its accuracies and time."""
    folder = options.out / f"{stage.name}_{seed}"
    last = folder / "last.ckpt"
    print(f"\n{stage.title}, seed {seed}" + (" (resumed)" if last.exists() else ""), flush=True)
    L.seed_everything(seed, verbose=False)
    data.order_seed = seed
    module, curve = build(stage, options.out, seed).to(memory_format=torch.channels_last), Curve()  # channels_last is faster on CPUs
    trainer = L.Trainer(
        max_epochs=1 if options.quick else stage.epochs,
        callbacks=[curve, *checkpoints(folder), OneBar()],
        logger=False,
        accelerator={None: "auto", "cpu": "cpu", "cuda": "gpu"}[options.device],
        devices=1,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
    )
    start = time.perf_counter()
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    seconds = time.perf_counter() - start
    (tested,) = trainer.test(module, data, verbose=False)
    return {"accuracy": tested["test/accuracy"], "curve": curve.accuracy, "seconds": seconds}


def bench(seconds: float, device: str | None = None) -> dict:
    """Time forward + backward for each shape: milliseconds, and ratios to the fused op."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = {}
    for name, (shape, dim) in BENCH_SHAPES.items():
        student, teacher = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
        losses = {
            "fused": lambda s, t, dim=dim: temperature_kl(s, t, 4.0, dim=dim),
            "reference": lambda s, t, dim=dim: reference.temperature_kl(s, t, 4.0, dim=dim),
        }
        losses["compiled"] = torch.compile(losses["reference"], dynamic=False)
        try:
            losses["compiled"](student, teacher)
        except Exception as error:
            print(f"torch.compile of the reference failed on this machine and is left out: {type(error).__name__}")
            del losses["compiled"]
        times = time_interleaved({k: forward_backward(f, student, teacher) for k, f in losses.items()}, seconds=seconds, device=device)
        milliseconds = {k: 1e3 * statistics.median(v) for k, v in times.items()}
        rows[name] = {"milliseconds": milliseconds, "ratios": {k: ratio(times, k, "fused") for k in times if k != "fused"}}
    return rows
