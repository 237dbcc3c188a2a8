"""Measure the test accuracy of each method on ClutterDigits, over several seeds.

Usage: python benches/accuracy.py [--seeds 3] [--rows REGEX] [--out FILE.json]

The student is a TinyCNN of width 8, as in the demo. It is trained for six epochs, or for eight if
the method has a first stage of two epochs. The teacher is a TinyCNN of width 32. FSP and SVD-KD
need a teacher with as many channels as the student; theirs has width 8 and is three times as deep.
A network of this depth is also the student of some methods without a teacher (rows "deep student").
The rows "segmentation" are the mean IoU of a TinyBiFPN on SegmentedClutterDigits. The rows "DFND"
are trained on as many images of the pool WildDigits, without labels. Finished runs are saved in the
file and not repeated.
"""

import argparse
import json
import logging
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from kdkernels.data import Augment, ClutterDigits, ImageData, SampleIndex, SegmentedClutterDigits, SelectedImages, WildDigits, select_samples
from kdkernels.distill import (
    BYOT,
    DFND,
    DML,
    FFL,
    FRSKD,
    FSP,
    KD,
    ONE,
    SAD,
    SLA,
    SVDKD,
    AttentionTransfer,
    DeepSupervision,
    DualNet,
    GradientAttentionTransfer,
    Supervised,
)
from kdkernels.distill.online import OnlineDistiller
from kdkernels.models import TinyBiFPN, TinyCNN, load_weights
from kdkernels.tasks import Segmentation

BLOCKS = ["block1", "block2", "block3"]
# name: (epochs, teacher, function that creates the method from a student and a teacher)
METHODS: dict[str, tuple[int, str | None, Callable]] = {
    "student alone": (6, None, lambda s, t: Supervised(s)),
    "KD": (6, "wide", lambda s, t: KD(s, t)),
    "AT": (6, "wide", lambda s, t: AttentionTransfer(s, t, BLOCKS, BLOCKS)),
    "AT, beta = 100": (6, "wide", lambda s, t: AttentionTransfer(s, t, BLOCKS, BLOCKS, beta=100.0)),
    "AT + KD": (6, "wide", lambda s, t: AttentionTransfer(s, t, BLOCKS, BLOCKS, gamma=0.1, alpha=0.9)),
    "gradient AT": (6, "wide", lambda s, t: GradientAttentionTransfer(s, t)),
    "gradient AT, symmetry": (6, None, lambda s, t: GradientAttentionTransfer(s, symmetry=True)),
    "FSP, two stages": (8, "deep", lambda s, t: FSP(s, t, BLOCKS, BLOCKS, first_stage_epochs=2, variant="repdistiller")),
    "FSP, one stage": (6, "deep", lambda s, t: FSP(s, t, BLOCKS, BLOCKS, variant="repdistiller")),
    "KD, deep teacher": (6, "deep", lambda s, t: KD(s, t)),
    **{
        f"SVD-KD, k = {k}" + ", authors' gradient" * (grad == "authors"): (
            6,
            "deep",
            lambda s, t, k=k, grad=grad: SVDKD(s, t, BLOCKS, BLOCKS, k=k, grad=grad),
        )
        for grad in ("exact", "authors")
        for k in (1, 2, 4)
    },
    "SVD-KD, k = 1, poster's rule": (6, "deep", lambda s, t: SVDKD(s, t, BLOCKS, BLOCKS, rule="poster")),
    "SVD-KD, k = 1, two stages": (8, "deep", lambda s, t: SVDKD(s, t, BLOCKS, BLOCKS, loss="mean", first_stage_epochs=2)),
}
# Self-distillation has no teacher. The attention loss of SAD begins after two thirds of the steps.
LATE = 252
# The authors' form for segmentation: the self-teacher continues the network's BiFPN, and teaches
# after two thirds of the epochs.
REFINED = ["refined1", "refined2", "refined3"]
ADAMW = partial(torch.optim.AdamW, lr=5e-3)
SEGMENTATION: dict[str, Any] = {"width": 1, "laterals": False, "ramp_start": 4, "ramp_epochs": 2, "task": Segmentation(), "optimizer": ADAMW}
METHODS |= {
    "deep supervision": (6, None, lambda s, t: DeepSupervision(s, BLOCKS)),
    "BYOT": (6, None, lambda s, t: BYOT(s, BLOCKS)),
    "BYOT, no feature loss": (6, None, lambda s, t: BYOT(s, BLOCKS, beta=0.0)),
    "BYOT, authors": (6, None, lambda s, t: BYOT(s, BLOCKS, variant="authors")),
    "BYOT, luanyunteng": (6, None, lambda s, t: BYOT(s, BLOCKS, variant="luanyunteng")),
    "BYOT, separable branches": (6, None, lambda s, t: BYOT(s, BLOCKS, branch="separable")),
    "FRSKD": (6, None, lambda s, t: FRSKD(s, BLOCKS)),
    "FRSKD\\F": (6, None, lambda s, t: FRSKD(s, BLOCKS, feature_loss=None)),
    "FRSKD\\F, paper's KL": (6, None, lambda s, t: FRSKD(s, BLOCKS, feature_loss=None, variant="paper")),
    "FRSKD, paper's losses, beta = 1": (6, None, lambda s, t: FRSKD(s, BLOCKS, beta=1.0, variant="paper")),
    "FRSKD, fit": (6, None, lambda s, t: FRSKD(s, BLOCKS, beta=1.0, feature_loss="fit")),
    "SLA": (6, None, lambda s, t: SLA(s, BLOCKS[2:])),
    "SLA, T = 4": (6, None, lambda s, t: SLA(s, BLOCKS[2:], temperature=4.0)),
    "deep student alone": (6, None, lambda s, t: Supervised(s)),
    "deep student, deep supervision": (6, None, lambda s, t: DeepSupervision(s, BLOCKS)),
    "deep student, BYOT": (6, None, lambda s, t: BYOT(s, BLOCKS)),
    "segmentation alone": (6, None, lambda s, t: Supervised(s, task=Segmentation(), optimizer=ADAMW)),
    "segmentation, FRSKD": (6, None, lambda s, t: FRSKD(s, REFINED, 1.0, 50.0, 1.0, **SEGMENTATION)),
    "segmentation, FRSKD\\F": (6, None, lambda s, t: FRSKD(s, REFINED, 1.0, 0.0, 1.0, **SEGMENTATION)),
    "SAD": (6, None, lambda s, t: SAD(s, BLOCKS, start_step=LATE)),
    "SAD, from the start": (6, None, lambda s, t: SAD(s, BLOCKS)),
    "SAD, not detached": (6, None, lambda s, t: SAD(s, BLOCKS, start_step=LATE, detach_target=False)),
    "SAD, block 2 to 3": (6, None, lambda s, t: SAD(s, BLOCKS, paths=[BLOCKS[1:]], start_step=LATE)),
    "SAD, block 1 to 3": (6, None, lambda s, t: SAD(s, BLOCKS, paths=[[BLOCKS[0], BLOCKS[2]]], start_step=LATE)),
    "SAD, reversed": (6, None, lambda s, t: SAD(s, BLOCKS, paths=[[BLOCKS[1], BLOCKS[0]], [BLOCKS[2], BLOCKS[1]]], start_step=LATE)),
    "SAD, gamma = 1": (6, None, lambda s, t: SAD(s, BLOCKS, gamma=1.0, start_step=LATE)),
}
# Online distillation: the student and a second network like it. The rows of the method are the
# student; those of the ensemble and of the joint classifier are measured in the same run.
METHODS |= {
    "DML": (6, None, lambda s, t: DML(s, [TinyCNN(8)])),
    "DML, symmetric": (6, None, lambda s, t: DML(s, [TinyCNN(8)], variant="symmetric")),
    "FFL": (6, None, lambda s, t: FFL(s, [TinyCNN(8)], "block3", split="block3")),
    "FFL, ramp": (6, None, lambda s, t: FFL(s, [TinyCNN(8)], "block3", split="block3", ramp_epochs=2)),
    "FFL, separate networks": (6, None, lambda s, t: FFL(s, [TinyCNN(8)], "block3")),
    "ONE": (6, None, lambda s, t: ONE(s, [TinyCNN(8)], "block3")),
    "DualNet": (6, None, lambda s, t: DualNet(s, [TinyCNN(8)], "block3", joint_epochs=2)),
}
# Distillation without the original images; "KD, no labels" has them.
METHODS |= {
    "KD, no labels": (6, "wide", lambda s, t: KD(s, t, gamma=0.0, alpha=1.0)),
    "DFND": (6, "wide", lambda s, t: DFND(s, t)),
    "DFND, diagonal = 0.5": (6, "wide", lambda s, t: DFND(s, t, diagonal=0.5)),
    "DFND, no Q": (6, "wide", lambda s, t: DFND(s, t, diagonal=None)),
    "DFND, random images": (6, "wide", lambda s, t: DFND(s, t)),
    "DFND, random images, no Q": (6, "wide", lambda s, t: DFND(s, t, diagonal=None)),
}
POOL = WildDigits(40000)
SELECTED = 8000
JOINT = {"test/accuracy_ensemble": "ensemble", "test/accuracy_fused": "fused", "test/accuracy_gated": "gated"}
TEACHERS = {"wide": lambda: TinyCNN(32), "deep": lambda: TinyCNN(8, depth=3)}


def new_student(name: str):
    if name.startswith("segmentation"):
        return TinyBiFPN()
    return TinyCNN(8, depth=3) if name.startswith("deep student") else TinyCNN(8)


def data_for(name: str, seed: int, teacher: torch.nn.Module | None, folder: Path) -> ImageData:
    """Return the data of a row."""
    if name.startswith("segmentation"):
        return SegmentedClutterDigits(train_size=4000, test_size=1000, batch_size=32, augment=Augment(crop=2))
    images = ClutterDigits()
    if not name.startswith("DFND"):
        return images
    if "random" in name:
        chosen = torch.randperm(len(POOL), generator=torch.Generator().manual_seed(seed))[:SELECTED].tolist()
        return SelectedImages(torch.utils.data.Subset(POOL, chosen), images)
    assert teacher is not None
    index = folder / f"index_{seed}.pt"
    selected = select_samples(teacher, POOL, SELECTED, index, mean=images.mean, std=images.std)
    shares = folder / "dfnd_selection.json"
    stored = json.loads(shares.read_text()) if shares.exists() else {}
    shares.write_text(json.dumps(stored | {str(seed): selection_shares(selected)}, indent=1) + "\n")
    return SelectedImages(POOL, images, index)


def selection_shares(index: SampleIndex) -> dict[str, float | list[float]]:
    """Return shares of the selected images, from the true labels, and of the pool."""
    labels = POOL.true_labels(index.indices)
    has_digit, right = labels >= 0, labels == index.labels
    return {
        "one digit": float(has_digit.float().mean()),
        "one digit, in the pool": float((POOL.true_labels(torch.arange(len(POOL))) >= 0).float().mean()),
        "teacher right": float(right.float().mean()),
        "teacher right, of those with one digit": float(right[has_digit].float().mean()),
        "by the teacher's class": (index.labels.bincount(minlength=10) / len(index.labels)).tolist(),
    }


def train(method, data, epochs: int, seed: int) -> dict[str, float]:
    """Return the accuracies in %: of the student "", and of networks that were trained with it."""
    L.seed_everything(seed, verbose=False)
    data.order_seed = seed
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        trainer.fit(method.to(memory_format=torch.channels_last), data)
        (tested,) = trainer.test(method, data, verbose=False)
    found = {"": tested["test/mean_iou" if "test/mean_iou" in tested else "test/accuracy"]}
    if isinstance(method, OnlineDistiller):
        found |= {f", {name}": tested[key] for key, name in JOINT.items() if key in tested}
    return {name: 100 * value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="measure only the rows whose names match this regular expression")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy.json"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in range(options.seeds):
        for name, (epochs, teacher, make_method) in METHODS.items():
            if f"{name}/{seed}" in results or not re.match(options.rows, name):
                continue
            network = None
            if teacher is not None:
                weights = options.out.with_name(f"{teacher}_{seed}.pt")
                if not weights.exists():
                    L.seed_everything(seed, verbose=False)
                    method = Supervised(TEACHERS[teacher]())
                    results[f"teacher, {teacher}/{seed}"] = train(method, ClutterDigits(), 8, seed)[""]
                    torch.save(method.student.state_dict(), weights)
                    options.out.write_text(json.dumps(results, indent=1))
                network = load_weights(TEACHERS[teacher](), weights)
            data = data_for(name, seed, network, options.out.parent)
            L.seed_everything(seed, verbose=False)
            for suffix, value in train(make_method(new_student(name), network), data, epochs, seed).items():
                results[f"{name}{suffix}/{seed}"] = value
            options.out.write_text(json.dumps(results, indent=1))
            print(f"{name:<24}seed {seed}: {results[f'{name}/{seed}']:.2f}", flush=True)
    print()
    for name in dict.fromkeys(key.split("/")[0] for key in results):
        values = [value for key, value in results.items() if key.split("/")[0] == name]
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{name:<24}{statistics.mean(values):6.2f}{spread}")


if __name__ == "__main__":
    main()
