"""Losses of other projects, with their names, signatures and numbers, on the ops of this package.

Each module of this package has the names of one project:

=========================  ========================================================================
module                     names
=========================  ========================================================================
``attention_transfer``     ``at``, ``at_loss``, ``distillation`` (szagoruyko/attention-transfer)
``functional``             ``kl_div_of_logits``: ``F.kl_div`` of ``log_softmax`` and ``softmax``
``liger``                  ``LigerKLDIVLoss``, ``LigerJSD``
``mdistiller``             ``kd_loss``, ``single_stage_at_loss``, ``at_loss``
``modelopt``               ``LogitsDistillationLoss``
``repdistiller``           ``DistillKL``, ``Attention``, ``FSP``, ``KDSVD``
``torchdistill``           ``KDLoss``, ``ATLoss``, ``FSPLoss``
``trl``                    ``generalized_jsd_loss``
=========================  ========================================================================

Results are float32 for half precision and float32, and float64 for float64. docs/migration.md has
the old and the new call of each loss, and what they are divided by.
"""

from . import attention_transfer, functional, liger, mdistiller, modelopt, repdistiller, torchdistill, trl
from .patching import Patch, patch
from .weights import convert_weight

__all__ = [
    "Patch",
    "attention_transfer",
    "convert_weight",
    "functional",
    "liger",
    "mdistiller",
    "modelopt",
    "patch",
    "repdistiller",
    "torchdistill",
    "trl",
]
