"""``kdkernels quantify``: what a distilled student knows, compared with a student trained alone.

The protocol of Cheng et al. (CVPR 2020): visual concepts through the epochs of two trainings, how
early they are learned, and how steadily. Writes report.html, knowledge.json and the entropies.
Without --student and --baseline, a teacher, a student by feature distillation and a baseline are
trained on generated images first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from ..analysis import KnowledgeRecord, KnowledgeRecorder, Training, TrainingKnowledge, knowledge_of_trainings, knowledge_table
from ..data import ClutterDigits, ImageData
from ..distill import Distiller, FeatureDistillation, Supervised
from ..distill.engine import AtomicCheckpointIO, EpochLines, checkpoints, silence_lightning
from ..files import replaced_atomically
from ..models import TinyCNN, load_weights
from ..plots.checkpoints import restore_with_images
from .arguments import Parser, make_folder
from .quantify_report import write_report

LAYER = "block3"
SETTINGS = "settings.json"  # of the trainings in --out
RECORD = "knowledge"  # name of the recorder's folder in that of a run


def main(arguments: list[str]) -> int:
    parser = Parser("quantify", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quantify"), help="folder for the results and report.html (default: %(default)s)")
    parser.add_argument("--student", type=Path, help="folder of a run of kdkernels fit with the callback KnowledgeRecorder (folder: RUN/knowledge)")
    parser.add_argument("--baseline", type=Path, help="folder of the run to compare with, on the same data")
    parser.add_argument("--images", type=int, help="number of validation images (default: 24; 16 with --quick)")
    parser.add_argument("--grid", type=int, help="blocks along each side of an image (default: 16; 8 with --quick)")
    parser.add_argument("--weight", type=float, default=7.0, help="lambda of the entropy; the authors use 6 for ResNets (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.2, help="b, of the concepts, in nats (default: %(default)s)")
    parser.add_argument("--by", choices=("epoch", "step"), default="epoch", help="weight distance of the paper or of its code (default: %(default)s)")
    parser.add_argument("--foreground", choices=("mask", "center"), default="mask", help="masks of the data, or the centre as the paper for ILSVRC")
    parser.add_argument("--epochs", type=int, help="epochs of the trainings without --student (default: 8; 2 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="seed of these trainings and of the noise (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="train for two epochs on few images, with little noise, as a test; the numbers mean nothing"
    )
    options = parser.parse_args(arguments)
    for name, (value, quick) in {"images": (24, 16), "grid": (16, 8), "epochs": (8, 2)}.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else value)
    if (options.student is None) != (options.baseline is None):
        parser.error("--student and --baseline must be given together, or neither")
    for name in ("images", "grid", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 0 < options.weight < math.inf:
        parser.error(f"--weight must be finite and > 0, got {options.weight}")
    if not math.isfinite(options.threshold):
        parser.error(f"--threshold must be finite, got {options.threshold}")
    make_folder(parser, options.out)
    silence_lightning()
    accuracies: dict[str, float] = {}
    if options.student is None:
        data: ImageData = ClutterDigits(train_size=128, val_size=64, test_size=64) if options.quick else ClutterDigits()
        check_settings(options)
        trainings, accuracies = train_protocol(options, cast(ClutterDigits, data))
    else:
        trainings, data = {}, cast(ImageData, None)
        for name, folder in (("student", options.student), ("baseline", options.baseline)):
            method, found = restore_with_images(folder / "last.ckpt")
            if data is not None and found.fingerprint("val") != data.fingerprint("val"):
                raise ValueError(f"--baseline: {folder} was trained on other data than {options.student}: their validation images differ")
            data = found
            trainings[name] = Training(KnowledgeRecord.load(folder / RECORD), method.student)
        check_comparable(*trainings.values())
    raw, images, mask = images_of(data, options)
    print(f"Finding the entropies of {len(images)} images at the checkpoints of {len(trainings)} trainings", flush=True)
    cheap: dict[str, Any] = {"copies": 8, "steps": 30} if options.quick else {}
    results, keep = knowledge_of_trainings(
        trainings,
        images,
        mask,
        options.out / "entropies",
        grid=options.grid,
        threshold=options.threshold,
        by=options.by,
        weight=options.weight,
        seed=options.seed,
        **cheap,
    )
    table = knowledge_table(results)
    settings = settings_of(options, trainings)
    stored = {
        "settings": settings,
        "kept_images": keep.tolist(),
        "accuracies": accuracies,
        "table": table,
        "trainings": {name: as_values(result) for name, result in results.items()},
    }
    with replaced_atomically(options.out / "knowledge.json") as temporary:
        temporary.write_text(json.dumps(stored, indent=1) + "\n")
    report = write_report(options.out / "report.html", results, table, accuracies, settings, raw[keep], mask[keep], len(images))
    for row in table:
        print(
            f"{row['quantity']:44}" + "".join(f"{row[name]:>10.3f}" for name in results) + f"   difference {row['difference']:+.3f} {row['interval']}"
        )
    print(f"\nReport: {report}")
    return 0


def settings_of(options: argparse.Namespace, trainings: Mapping[str, Training]) -> dict[str, Any]:
    """Return what the numbers depend on."""
    (record, network), _ = trainings.values()
    names = ("images", "grid", "weight", "threshold", "by", "foreground", "seed", "quick")
    return {"layer": record.layer, "network": type(network).__name__} | {name: getattr(options, name) for name in names}


def check_settings(options: argparse.Namespace) -> None:
    """Raise ValueError if the trainings in the folder have other settings; else store these.

    They would be continued, and their weights taken for those of the new settings.
    """
    path, given = options.out / SETTINGS, {name: getattr(options, name) for name in ("seed", "epochs", "quick")}
    if path.exists():
        stored = json.loads(path.read_text())
        for name, value in given.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"--out: the trainings in {os.fspath(options.out)!r} were made with {name} {stored.get(name)}, now {value}: give another folder, "
                    "or remove this one"
                )
    with replaced_atomically(path) as temporary:
        temporary.write_text(json.dumps(given) + "\n")


def check_comparable(student: Training, baseline: Training) -> None:
    """Raise ValueError unless two recorded trainings can be compared."""
    for what, first, second in (
        ("recorded layer", student.record.layer, baseline.record.layer),
        ("recorded epochs", student.record.checkpoints, baseline.record.checkpoints),
    ):
        if first != second:
            raise ValueError(f"--student and --baseline must have the same {what}, got {first} and {second}")
    shapes, others = ({name: tuple(v.shape) for name, v in x.network.state_dict().items()} for x in (student, baseline))
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            raise ValueError(f"--student and --baseline must have the same network, got {name} {shapes.get(name)} and {name} {others.get(name)}")


def as_values(result: TrainingKnowledge) -> dict[str, Any]:
    """Return the numbers of a training as plain values."""
    found = result.concepts
    return {
        "epochs": result.epochs,
        "weight_distance": result.distances.tolist(),
        "foreground": found.foreground.tolist(),
        "background": found.background.tolist(),
        "D_mean": result.speed.mean,
        "D_std": result.speed.std,
        "D_variance": result.speed.variance,
        "rho": dict(zip(("foreground", "background", "all"), result.stability[:3], strict=True)),
    }


def images_of(data: ImageData, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return validation images [N, C, H, W] for display, normalised, and their masks [N, H, W]."""
    split: Any = data.splits["val"]
    count = min(options.images, len(split))
    batch = split[list(range(0, len(split), len(split) // count))[:count]]
    raw = batch["image"] / 255 if batch["image"].dtype == torch.uint8 else batch["image"]
    if options.foreground == "center":
        height, width = raw.shape[2:]
        mask = torch.zeros(count, height, width)
        mask[:, 2 * height // 16 : 14 * height // 16, 2 * width // 16 : 14 * width // 16] = 1
    elif "mask" not in batch:
        raise ValueError(f"--foreground mask needs images with masks, such as ClutterDigits, got {type(data).__name__}: give --foreground center")
    else:
        mask = batch["mask"].float()
    return raw, data.finish(batch)["image"], mask


# The protocol on generated images.


def train_protocol(options: argparse.Namespace, data: ClutterDigits) -> tuple[dict[str, Training], dict[str, float]]:
    """Train teacher, student and baseline; return the recorded trainings and test accuracies."""
    data.setup()
    epochs, accuracies = options.epochs, {}
    networks: dict[str, TinyCNN] = {}
    for name in ("teacher", "student", "baseline"):
        L.seed_everything(options.seed, verbose=False)  # student and baseline begin with the same weights
        network = networks[name] = TinyCNN(8, depth=3 if name == "teacher" else 1)
        method: Distiller = Supervised(network)
        length = epochs
        if name == "student":
            teacher = load_weights(TinyCNN(8, depth=3), options.out / "teacher" / "last.ckpt")
            method, length = FeatureDistillation(network, teacher, LAYER, first_stage_epochs=epochs), epochs + max(1, epochs // 2)
        accuracies[name] = train(method, data, length, options.out / name, None if name == "teacher" else epochs, options.seed)
    return {name: Training(KnowledgeRecord.load(options.out / name / RECORD), networks[name]) for name in ("student", "baseline")}, accuracies


def train(method: Distiller, data: ClutterDigits, epochs: int, folder: Path, recorded: int | None, seed: int) -> float:
    """Train, from the last checkpoint if there is one; return the test accuracy.

    The epochs up to ``recorded`` are recorded.
    """
    last = folder / "last.ckpt"
    print(f"\n{folder.name}: {type(method).__name__}, {epochs} epochs" + (" (resumed)" if last.exists() else ""), flush=True)
    L.seed_everything(seed, verbose=False)
    data.order_seed = seed
    recorder = [] if recorded is None else [KnowledgeRecorder(folder / RECORD, LAYER, range(recorded + 1))]
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*recorder, *checkpoints(folder), EpochLines()],
        logger=False,
        accelerator="auto",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(method, data, ckpt_path=last if last.exists() else None, weights_only=True)
    (tested,) = trainer.test(method, data, verbose=False)
    return tested["test/accuracy"]
