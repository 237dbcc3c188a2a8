"""Measure self attention distillation on SyntheticLanes, over several seeds: the ablations of SAD.

Usage: python benches/lane_accuracy.py [--seeds 0 1 2] [--out FILE.json]

The network, its optimizer and its training are those of configs/lanes_enet.yaml. The attention loss
begins after two thirds of the steps, as in the paper. Until then all runs with it are the same, so
that they continue from one checkpoint. Finished runs are saved in the file and not repeated.
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch

from kdkernels.data import SyntheticLanes
from kdkernels.distill import SAD, DeepSupervision
from kdkernels.models import ENet
from kdkernels.tasks import Lanes

EPOCHS, START_EPOCH, STEPS_PER_EPOCH = 9, 6, 250
E1, E2, E3, E4 = ENCODERS = [f"encoder{i}" for i in range(1, 5)]
METRICS = ["f1", "tusimple_accuracy", "lane_iou", "pixel_accuracy"]


OPTIMIZER = partial(torch.optim.AdamW, lr=1e-2)


def sad(network: ENet, paths: list[list[str]] | None = None, **options) -> SAD:
    """The paths are those of the paper, unless others are given."""
    paths = [[E2, E3], [E3, E4]] if paths is None else paths
    return SAD(network, ENCODERS, paths, start_step=START_EPOCH * STEPS_PER_EPOCH, task=Lanes(), optimizer=OPTIMIZER, **options)


# name: function that creates the method. Those of LATE do not differ before START_EPOCH.
LATE: dict[str, Callable] = {
    "network alone": lambda s: sad(s, gamma=0.0),
    "SAD": lambda s: sad(s),
    "SAD, mean": lambda s: sad(s, reduction="mean"),
    "SAD, normalised": lambda s: sad(s, normalize=True),
    "SAD, normalised, gamma = 1": lambda s: sad(s, normalize=True, gamma=1.0),
    "SAD, normalised, only 3 to 4": lambda s: sad(s, [[E3, E4]], normalize=True),
    "SAD, normalised, also 1 to 2": lambda s: sad(s, [[E1, E2], [E2, E3], [E3, E4]], normalize=True),
    "SAD, normalised, 2 to 4": lambda s: sad(s, [[E2, E4]], normalize=True),
    "SAD, normalised, reversed": lambda s: sad(s, [[E3, E2], [E4, E3]], normalize=True),
    "SAD, normalised, not detached": lambda s: sad(s, normalize=True, detach_target=False),
}
OTHERS: dict[str, Callable] = {
    "deep supervision": lambda s: DeepSupervision(s, ENCODERS[1:], 0.1, task=Lanes(), optimizer=OPTIMIZER),
}


def trainer(folder: Path, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder,
        **options,
    )


def shared_checkpoint(data: SyntheticLanes, seed: int, folder: Path) -> Path:
    """Train until the attention losses begin, unless this is done already."""
    path = folder / f"lanes_{seed}.ckpt"
    if not path.exists():
        seed_all(data, seed)
        method = sad(network())
        # The schedule of the learning rate depends on max_epochs.
        run = trainer(folder, max_epochs=EPOCHS, callbacks=[StopAt(START_EPOCH)])
        run.fit(method, data)
        run.save_checkpoint(path)
    return path


class StopAt(L.Callback):
    """Stop the run before an epoch."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epoch


def network() -> ENet:
    return ENet(width=0.25, image_size=(64, 160))


def seed_all(data: SyntheticLanes, seed: int) -> None:
    L.seed_everything(seed, verbose=False)
    data.order_seed = seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/lane_accuracy.json"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    data = SyntheticLanes(train_size=2000, batch_size=8)
    for seed in options.seeds:
        for name, make_method in (LATE | OTHERS).items():
            if f"{name}/{seed}" in results:
                continue
            ckpt = shared_checkpoint(data, seed, options.out.parent) if name in LATE else None
            seed_all(data, seed)
            method = make_method(network())
            run = trainer(options.out.parent, max_epochs=EPOCHS)
            run.fit(method, data, ckpt_path=ckpt)
            assert run.global_step == EPOCHS * STEPS_PER_EPOCH
            (tested,) = run.test(method, data, verbose=False)
            results[f"{name}/{seed}"] = {metric: 100 * tested[f"test/{metric}"] for metric in METRICS}
            options.out.write_text(json.dumps(results, indent=1))
            print(f"{name:<32}seed {seed}:", *(f"{metric} {value:.2f}" for metric, value in results[f"{name}/{seed}"].items()), flush=True)
    print()
    for name in dict.fromkeys(key.split("/")[0] for key in results):
        rows = [value for key, value in results.items() if key.split("/")[0] == name]
        for metric in METRICS:
            values = [row[metric] for row in rows]
            spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            print(f"{name:<32}{metric:<20}{statistics.mean(values):6.2f}{spread}")


if __name__ == "__main__":
    main()
