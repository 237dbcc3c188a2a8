"""Callback that keeps the validation accuracy of each epoch."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback


class Curve(Callback):
    """Record the main validation metric of each epoch, and save it in checkpoints."""

    def __init__(self, metric: str = "val/accuracy"):
        self.metric = metric
        self.values: list[float] = []

    def on_validation_epoch_end(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics[self.metric]))

    def state_dict(self) -> dict:
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.values = list(state["values"])
