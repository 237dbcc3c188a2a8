"""The main job on the embedded images: a teacher, a student alone, and the same student distilled through temperature_kl."""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from .data import ClutterDigits
from .distill import KD, Supervised
from .engine import AtomicCheckpointIO, checkpoints
from .models import TinyCNN


@dataclass(frozen=True)
class Stage:
    """One training: what it is called in the report, and how long it runs."""

    name: str
    title: str
    epochs: int


TEACHER = Stage("teacher", "teacher", 8)
ALONE = Stage("student_alone", "student alone", 6)
DISTILLED = Stage("student_distilled", "student distilled", 6)
STAGES = (TEACHER, ALONE, DISTILLED)
TEACHER_WIDTH, STUDENT_WIDTH = 32, 8
BENCH_SHAPES = {"128 x 100": ((128, 100), 1), "1024 x 1000": ((1024, 1000), 1), "16 x 21 x 64 x 64, dim=1": ((16, 21, 64, 64), 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kdkernels demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of checkpoints, results and report.html (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions with other initial weights and order (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one epoch each on few images: shows that it runs, not what it gives")
    parser.add_argument("--restart", action="store_true", help="start anew where an earlier run in --out would be resumed")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {options.out}: {error.strerror}")
    if not os.access(options.out, os.W_OK):
        parser.error(f"--out: the folder {options.out} cannot be written to")

    _quiet()
    results = Results(options.out / "results.json", {"quick": options.quick}, restart=options.restart)
    data = ClutterDigits(train_size=512, val_size=128, test_size=256) if options.quick else ClutterDigits()
    print("Making images of handwritten digits on photographs", flush=True)
    data.setup()
    try:
        for seed in range(options.seeds):
            for stage in STAGES:
                if results.missing(stage, seed):
                    results.add(stage, seed, train(stage, seed, data, options))
        if "bench" not in results.values:
            print("\nTiming the loss: fused, reference, torch.compile of the reference", flush=True)
            results.values["bench"] = bench(seconds=0.2 if options.quick else 2.0)
            results.save()
    except (KeyboardInterrupt, SystemExit):
        again = " ".join(["kdkernels demo", *(arguments if arguments is not None else sys.argv[2:])]).replace(" --restart", "")
        print(f"\nStopped. Finished stages and the last epoch of the current one are kept in {options.out}; resume with: {again}  (or make demo)")
        return 130
    from .report import write_report

    report = write_report(options.out / "report.html", results.values, data, options.seeds)
    print("\n" + table(results.values, options.seeds))
    print(f"\nReport: {report}")
    return 0


class Results:
    """What is known so far, on disk after every stage."""

    def __init__(self, path: Path, settings: dict, restart: bool):
        self.path = path
        self.values: dict = {"settings": settings, "stages": {}}
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("settings") == settings and not restart:
            self.values = stored
        else:  # a checkpoint of another run must not be resumed
            for checkpoint in (c for stage in STAGES for c in path.parent.glob(f"{stage.name}_*/last.ckpt")):
                checkpoint.unlink()
        self.save()

    def missing(self, stage: Stage, seed: int) -> bool:
        return f"{stage.name}/{seed}" not in self.values["stages"]

    def add(self, stage: Stage, seed: int, outcome: dict) -> None:
        self.values["stages"][f"{stage.name}/{seed}"] = outcome
        self.save()

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1))
        temporary.replace(self.path)


class Curve(Callback):
    """Validation accuracy after every epoch; part of the checkpoint, so that a resumed curve is whole."""

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
    """The bar of the training epochs, without one for every validation and test."""

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
    """Trains one stage, from its last checkpoint if there is one; returns its accuracies and time."""
    folder = options.out / f"{stage.name}_{seed}"
    last = folder / "last.ckpt"
    print(f"\n{stage.title}, seed {seed}" + (" (resumed)" if last.exists() else ""), flush=True)
    L.seed_everything(seed, verbose=False)
    data.order_seed = seed
    module, curve = build(stage, options.out, seed).to(memory_format=torch.channels_last), Curve()  # the faster layout on a CPU
    trainer = L.Trainer(
        max_epochs=1 if options.quick else stage.epochs,
        callbacks=[curve, *checkpoints(folder), OneBar()],
        logger=False,
        accelerator="auto",
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


def bench(seconds: float) -> dict:
    """Milliseconds of forward + backward, and ratios to the fused op, for each shape."""
    from . import reference, temperature_kl
    from .timing import forward_backward, ratio, time_interleaved

    device = "cuda" if torch.cuda.is_available() else "cpu"
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
            print(f"torch.compile of the reference failed here and is left out: {type(error).__name__}")
            del losses["compiled"]
        times = time_interleaved({k: forward_backward(f, student, teacher) for k, f in losses.items()}, seconds=seconds)
        milliseconds = {k: 1e3 * statistics.median(v) for k, v in times.items()}
        rows[name] = {"milliseconds": milliseconds, "ratios": {k: ratio(times, k, "fused") for k in times if k != "fused"}}
    return rows


def summary(results: dict, seeds: int) -> list[tuple[str, list[float]]]:
    """(title, test accuracies in percent by seed) of each stage."""
    return [(s.title, [100 * results["stages"][f"{s.name}/{seed}"]["accuracy"] for seed in range(seeds)]) for s in STAGES]


def mean_and_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(results: dict, seeds: int) -> str:
    lines = [f"{'test accuracy, %':<22}{'mean +- std':>16}   by seed"]
    for title, values in summary(results, seeds):
        lines.append(f"{title:<22}{mean_and_spread(values):>16}   {'  '.join(f'{v:.2f}' for v in values)}")
    lines += ["", f"{'loss, forward + backward':<28}{'fused':>10}{'reference':>22}{'torch.compile':>22}"]
    for name, row in results["bench"].items():
        cells = [f"{row['milliseconds']['fused']:.3f} ms"]
        for other in ("reference", "compiled"):
            cells.append(f"{row['milliseconds'][other]:.3f} ms ({row['ratios'][other]:.1f}x)" if other in row["ratios"] else "-")
        lines.append(f"{name:<28}{cells[0]:>10}{cells[1]:>22}{cells[2]:>22}")
    return "\n".join(lines)


def _quiet() -> None:
    """Lightning's hints about workers and loggers are not for this reader."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*exists and is not empty.*", ".*isinstance.treespec.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
