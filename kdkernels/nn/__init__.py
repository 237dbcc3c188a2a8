"""Losses as modules and functions. This package depends on torch only."""

from .attention import AttentionTransferLoss, attention_transfer_losses
from .kd import TemperatureKLLoss, kd_loss
from .svd_kd import SVDKDLoss, svd_kd_loss

__all__ = ["AttentionTransferLoss", "SVDKDLoss", "TemperatureKLLoss", "attention_transfer_losses", "kd_loss", "svd_kd_loss"]
