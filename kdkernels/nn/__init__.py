"""Losses as modules and functions. This package depends on torch only."""

from .attention import AttentionTransferLoss, attention_transfer_losses
from .byot import BYOTLoss, byot_loss
from .kd import TemperatureKLLoss, kd_loss
from .sad import SADLoss, sad_attention, sad_loss
from .svd_kd import SVDKDLoss, svd_kd_loss

__all__ = [
    "AttentionTransferLoss",
    "BYOTLoss",
    "SADLoss",
    "SVDKDLoss",
    "TemperatureKLLoss",
    "attention_transfer_losses",
    "byot_loss",
    "kd_loss",
    "sad_attention",
    "sad_loss",
    "svd_kd_loss",
]
