"""Losses as modules and functions. This package depends on torch only."""

from .attention import AttentionTransferLoss, attention_transfer_losses
from .byot import BYOTLoss, byot_feature_losses, byot_loss
from .dfnd import DFNDLoss, dfnd_loss, noise_adaptation_matrix, noise_value
from .frskd import FRSKDLoss, frskd_feature_losses, frskd_loss, frskd_ramp
from .fsp import fsp_loss, fsp_matrix
from .kd import TemperatureKLLoss, kd_loss
from .online import DMLLoss, FFLLoss, ONELoss, dml_loss, ffl_loss, ffl_ramp, one_loss
from .overhaul import overhaul_loss, overhaul_margins
from .sad import SADLoss, sad_attention, sad_loss
from .sla import SLALoss, aggregate_rotations, four_rotations, joint_labels, sla_loss
from .svd_kd import SVDKDLoss, svd_kd_loss

__all__ = [
    "AttentionTransferLoss",
    "BYOTLoss",
    "DFNDLoss",
    "DMLLoss",
    "FFLLoss",
    "FRSKDLoss",
    "ONELoss",
    "SADLoss",
    "SLALoss",
    "SVDKDLoss",
    "TemperatureKLLoss",
    "aggregate_rotations",
    "attention_transfer_losses",
    "byot_feature_losses",
    "byot_loss",
    "dfnd_loss",
    "dml_loss",
    "ffl_loss",
    "ffl_ramp",
    "four_rotations",
    "frskd_feature_losses",
    "frskd_loss",
    "frskd_ramp",
    "fsp_loss",
    "fsp_matrix",
    "joint_labels",
    "kd_loss",
    "noise_adaptation_matrix",
    "noise_value",
    "one_loss",
    "overhaul_loss",
    "overhaul_margins",
    "sad_attention",
    "sad_loss",
    "sla_loss",
    "svd_kd_loss",
]
