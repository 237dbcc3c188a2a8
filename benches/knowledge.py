"""Test the hypotheses of Cheng et al. (CVPR 2020) on students of several methods.

Usage: python benches/knowledge.py [--seeds 0 1 2] [--images 24] [--out FOLDER]

The student is a TinyCNN of width 8 on ClutterDigits, trained for six epochs, with the same initial
weights by each method of a seed. It is analysed at its last block. KD and attention transfer have a
TinyCNN of width 32 as their teacher, SVD-KD one of width 8 that is three times as deep. The results
are in FOLDER/knowledge.json. Finished trainings and entropies are not computed again.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch

from kdkernels.analysis import KnowledgeRecord, KnowledgeRecorder, Training, knowledge_of_trainings, knowledge_table
from kdkernels.data import ClutterDigits
from kdkernels.distill import KD, SVDKD, AttentionTransfer, Supervised
from kdkernels.distill.base import Distiller
from kdkernels.models import TinyCNN, load_weights

BLOCKS = ["block1", "block2", "block3"]
EPOCHS = 6
TEACHERS: dict[str, Callable] = {"wide": lambda: TinyCNN(32), "deep": lambda: TinyCNN(8, depth=3)}
METHODS: dict[str, tuple[str, Callable]] = {
    "baseline": ("", lambda s, t: Supervised(s)),
    "KD": ("wide", lambda s, t: KD(s, t)),
    "AT, beta = 10": ("wide", lambda s, t: AttentionTransfer(s, t, BLOCKS, BLOCKS, beta=10.0)),
    "SVD-KD": ("deep", lambda s, t: SVDKD(s, t, BLOCKS, BLOCKS, loss="mean")),
}


def fit(method: Distiller, data: ClutterDigits, epochs: int, callbacks: list) -> float:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(method, data)
    (tested,) = trainer.test(method, data, verbose=False)
    return tested["test/accuracy"]


def teacher(name: str, seed: int, data: ClutterDigits, folder: Path) -> torch.nn.Module:
    path = folder / f"{name}_{seed}.pt"
    if not path.exists():
        L.seed_everything(seed, verbose=False)
        data.order_seed = seed
        method = Supervised(TEACHERS[name]())
        fit(method, data, 8, [])
        torch.save(method.student.state_dict(), path)
    return load_weights(TEACHERS[name](), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/knowledge"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    data = ClutterDigits()
    data.setup()
    step = len(data.splits["val"]) // options.images  # type: ignore[arg-type]
    batch = data.splits["val"][[step * i for i in range(options.images)]]
    images, mask = data.normalize(batch["image"]), batch["mask"].float()
    path = options.out / "knowledge.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for seed in options.seeds:
        trainings: dict[str, Training] = {}
        for name, (kind, make) in METHODS.items():
            folder = options.out / f"{name.split(',')[0]}_{seed}"
            network = None if not kind else teacher(kind, seed, data, options.out)
            if f"accuracy, {name}/{seed}" not in results:
                L.seed_everything(seed, verbose=False)
                data.order_seed = seed
                method = make(TinyCNN(8), network)
                results[f"accuracy, {name}/{seed}"] = fit(method, data, EPOCHS, [KnowledgeRecorder(folder, "block3")])
                path.write_text(json.dumps(results, indent=1))
            trainings[name] = Training(KnowledgeRecord.load(folder), TinyCNN(8))
            if name == "baseline" or f"{name}/{seed}" in results:
                continue
            pair = {name: trainings[name], "baseline": trainings["baseline"]}
            found, keep = knowledge_of_trainings(pair, images, mask, options.out / f"entropies_{seed}", progress=False)
            rows = [{("student" if key == name else key): value for key, value in row.items()} for row in knowledge_table(found)]
            results[f"{name}/{seed}"] = {"kept": int(keep.sum()), "rows": rows}
            path.write_text(json.dumps(results, indent=1))
            print(f"{name} seed {seed}: {int(keep.sum())} images, accuracy {results[f'accuracy, {name}/{seed}']:.4f}", flush=True)
            for row in rows:
                print(f"  {row['quantity']:44}{row['student']:9.3f}{row['baseline']:9.3f}{row['difference']:+9.3f} {row['interval']}", flush=True)
    print()
    for name in list(METHODS)[1:]:
        runs = [results[f"{name}/{seed}"]["rows"] for seed in options.seeds]
        for of_seeds in zip(*runs, strict=True):
            values = [row["difference"] for row in of_seeds]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            print(f"{name:14}{of_seeds[0]['quantity']:44}{statistics.mean(values):+8.3f}{spread}")


if __name__ == "__main__":
    main()
