"""Trains each method for a few steps and writes the student's weights.

test_engine.py runs it in one process, and in two with torchrun.
Usage: python train_processes.py OUT BATCH_SIZE ACCUMULATE ddp|fsdp|none
"""

import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from kdkernels.data import Augment, ClutterDigits
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
    FeatureDistillation,
    GradientAttentionTransfer,
    Supervised,
)


def network(width: int) -> nn.Module:
    """Return a network without batch norm, whose statistics would depend on the process."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2),
        nn.GroupNorm(2, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def without_batch_norm(method: nn.Module) -> nn.Module:
    """Replace batch norm in the branches of a method."""
    for name, layer in list(method.branches.named_modules()):
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            parent, _, attribute = name.rpartition(".")
            setattr(method.branches.get_submodule(parent), attribute, nn.GroupNorm(1, layer.num_features))
    return method


class Halving(nn.Module):
    """A network without batch norm whose blocks, in a container, halve the resolution."""

    def __init__(self, width: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(channels, width, 3, 2, 1) for channels in (3, width, width))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.fc(x.mean((2, 3)))


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)  # the step is proportional to the gradient


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]

# All methods. test_engine.py compares the names with kdkernels.distill.
METHODS = {
    "Supervised": lambda options: Supervised(network(4), **options),
    "KD": lambda options: KD(network(4), network(6), **options),
    "AttentionTransfer": lambda options: AttentionTransfer(network(4), network(6), ["2", "4"], ["2", "4"], alpha=0.9, beta=10.0, **options),
    "GradientAttentionTransfer": lambda options: GradientAttentionTransfer(network(4), network(6), **options),
    "SVDKD": lambda options: SVDKD(network(6), network(6), ["2", "4"], ["2", "4"], k=2, **options),
    "BYOT": lambda options: without_batch_norm(BYOT(Halving(4), BLOCKS, image_shape=[3, 32, 32], **options)),
    "DeepSupervision": lambda options: without_batch_norm(
        DeepSupervision(Halving(4), BLOCKS, branch="separable", image_shape=[3, 32, 32], **options)
    ),
    "FRSKD": lambda options: without_batch_norm(FRSKD(Halving(4), BLOCKS, 0.5, 1.0, width=1, depth=1, sla=True, image_shape=[3, 32, 32], **options)),
    "FeatureDistillation": lambda options: FeatureDistillation(network(4), network(4), "4", first_stage_epochs=1, **options),
    "FSP": lambda options: FSP(network(4), network(4), ["2", "4"], ["2", "4"], first_stage_epochs=1, beta=0.01, **options),
    "SAD": lambda options: SAD(Halving(4), BLOCKS, gamma=1.0, start_step=2, **options),
    "SLA": lambda options: SLA(Halving(4), ["blocks.2"], image_shape=[3, 32, 32], **options),
    "DFND": lambda options: DFND(network(4), network(6), **options),
    "DML": lambda options: DML(network(4), [Halving(6)], **options),
    "DualNet": lambda options: DualNet(Halving(4), [Halving(4)], "blocks.2", image_shape=[3, 32, 32], **options),
    "FFL": lambda options: without_batch_norm(
        FFL(Halving(4), [Halving(4), Halving(4)], "blocks.2", split="blocks.1", image_shape=[3, 32, 32], **options)
    ),
    "ONE": lambda options: without_batch_norm(ONE(Halving(4), [Halving(4)], "blocks.1", image_shape=[3, 32, 32], **options)),
}


def main(out: Path, batch_size: int, accumulate: int, strategy: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name, make in METHODS.items():
        torch.manual_seed(0)
        method = make({"optimizer": plain_sgd, "scheduler": constant})
        if strategy == "fsdp" and not method.can_be_sharded:
            continue
        data = ClutterDigits(train_size=43, val_size=10, test_size=2, batch_size=batch_size, augment=Augment(crop=2, flip=True))
        processes = {"devices": 2, "strategy": "ddp"} if strategy == "ddp" else {"devices": 1}
        if strategy == "fsdp":
            sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
            processes = {"devices": 2, "strategy": sharded}
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            precision="32-true" if strategy == "fsdp" else "64-true",
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **processes,
        )
        trainer.fit(method, data)
        trainer.save_checkpoint(out / f"{name}.ckpt")
        if trainer.is_global_zero:
            torch.save({k: float(v) for k, v in trainer.callback_metrics.items()}, out / f"{name}.metrics")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
