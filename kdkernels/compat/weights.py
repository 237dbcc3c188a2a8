"""The weight of a loss under another project's definition of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..ops import checks

__all__ = ["convert_weight"]


class _Sizes:
    """The sizes that the ratios of losses depend on. Reading one that is not given is an error."""

    def __init__(self, sizes: dict[str, float | None]):
        self._sizes = sizes

    def __getattr__(self, name: str) -> float:
        value = self._sizes[name]
        if value is None:
            raise ValueError(f"{name} is needed to convert between these losses: {_MEANING[name]}")
        return value


_MEANING = {
    "temperature": "T",
    "classes": "C, the number of classes",
    "batch_size": "B, the number of samples of a batch",
    "k": "the number of singular vectors",
    "matrix_elements": "the sum of C1 * C2 over the pairs of layers",
}


class _Definition(NamedTuple):
    quantity: str  # losses of one quantity are proportional to each other
    value: Callable[[_Sizes], float]  # of the loss, divided by that of the first loss of the quantity


def _one(_: _Sizes) -> float:
    return 1.0


_KL, _JSD, _AT, _AT_NORM = "divergence of logits", "generalised JSD", "squared distance of attention maps", "distance of attention maps"
_FSP_AVG, _FSP_MAX, _FSP_NORM, _SVD = "FSP, average pooling", "FSP, max pooling", "FSP, norms of columns", "SVD-KD"
_DEFINITIONS = {
    "kdkernels.temperature_kl": _Definition(_KL, _one),
    "attention_transfer.distillation": _Definition(_KL, lambda x: x.rows_per_sample),
    "repdistiller.DistillKL": _Definition(_KL, lambda x: x.rows_per_sample),
    "mdistiller.kd_loss": _Definition(_KL, _one),
    "torchdistill.KDLoss": _Definition(_KL, lambda x: x.rows_per_sample),
    "torchdistill.KDLoss, without targets": _Definition(_KL, lambda x: x.rows_per_sample / x.temperature**2),
    "modelopt.LogitsDistillationLoss, batchmean": _Definition(_KL, lambda x: x.rows_per_sample),
    "modelopt.LogitsDistillationLoss, mean": _Definition(_KL, lambda x: 1 / x.classes),
    "F.kl_div, batchmean": _Definition(_KL, lambda x: x.rows_per_sample / x.temperature**2),
    "F.kl_div, mean": _Definition(_KL, lambda x: 1 / x.classes / x.temperature**2),
    "F.kl_div, sum": _Definition(_KL, lambda x: x.batch_size * x.rows_per_sample / x.temperature**2),
    "liger.LigerKLDIVLoss, batchmean": _Definition(_KL, lambda x: 1 / x.temperature**2),
    "liger.LigerKLDIVLoss, mean": _Definition(_KL, lambda x: 1 / x.classes / x.temperature**2),
    "kdkernels.temperature_kl, jsd": _Definition(_JSD, _one),
    "trl.generalized_jsd_loss": _Definition(_JSD, lambda x: 1 / x.temperature**2),
    "trl.generalized_jsd_loss, without labels": _Definition(_JSD, lambda x: x.rows_per_sample / x.temperature**2),
    "liger.LigerJSD": _Definition(_JSD, lambda x: 1 / x.temperature**2),
    "kdkernels.attention_transfer_loss": _Definition(_AT, _one),
    "attention_transfer.at_loss": _Definition(_AT, _one),
    "repdistiller.Attention": _Definition(_AT, _one),
    "mdistiller.at_loss": _Definition(_AT, _one),
    "torchdistill.ATLoss, code": _Definition(_AT, _one),
    "kdkernels.attention_transfer_loss, paper": _Definition(_AT_NORM, _one),
    "torchdistill.ATLoss, paper": _Definition(_AT_NORM, _one),
    "kdkernels.fsp_loss, repdistiller": _Definition(_FSP_AVG, _one),
    "repdistiller.FSP": _Definition(_FSP_AVG, _one),
    "kdkernels.fsp_loss, paper": _Definition(_FSP_MAX, _one),
    "kdkernels.fsp_loss, sskd": _Definition(_FSP_MAX, lambda x: 1 / (2 * x.matrix_elements)),
    "kdkernels.fsp_loss, torchdistill": _Definition(_FSP_NORM, _one),
    "torchdistill.FSPLoss": _Definition(_FSP_NORM, _one),
    "kdkernels.svd_kd_loss, mean": _Definition(_SVD, _one),
    "kdkernels.svd_kd_loss, authors": _Definition(_SVD, lambda x: x.batch_size * math.sqrt(x.k) / 2),
    "repdistiller.KDSVD": _Definition(_SVD, _one),
}


def convert_weight(
    weight: float,
    from_: str,
    to: str,
    *,
    temperature: float | None = None,
    classes: int | None = None,
    batch_size: int | None = None,
    rows_per_sample: int = 1,
    k: int | None = None,
    matrix_elements: int | None = None,
) -> float:
    """Return the weight under which the loss ``to`` counts as much as ``weight`` times ``from_``.

    For the same tensors, ``weight * from_loss == convert_weight(weight, ...) * to_loss``, and the
    same holds for the gradients. Only the sizes that the two losses depend on are needed.

    Example: ``convert_weight(0.9, "F.kl_div, mean", "kdkernels.temperature_kl", temperature=4,
    classes=100)`` is 0.9 / (16 * 100).

    Args:
        weight: of the loss ``from_``.
        from_, to: names of losses, as in docs/migration.md: a module and a name of
            ``kdkernels.compat``, ``kdkernels.`` and a name, or ``F.kl_div``; behind a comma the
            reduction or variant, as in "F.kl_div, mean". For SVD-KD both losses have the same
            ``align``, ``extra`` and ``weighting``.
        temperature: T, of both losses.
        classes: C.
        batch_size: B.
        rows_per_sample: number of tokens or pixels of a sample.
        k: number of singular vectors.
        matrix_elements: sum of C1 * C2 over the pairs of layers of FSP.

    Raises:
        TypeError: a size or the weight is not a number.
        ValueError: a name is unknown, the losses are not proportional to each other, or a size that
            they depend on is missing or not positive.
    """
    checks.not_negative("weight", weight)
    sizes: dict[str, float | None] = {
        "temperature": temperature,
        "classes": classes,
        "batch_size": batch_size,
        "rows_per_sample": rows_per_sample,
        "k": k,
        "matrix_elements": matrix_elements,
    }
    for name, size in sizes.items():
        if size is not None:
            (checks.positive if name == "temperature" else checks.integer)(name, size)
            checks.positive(name, size)
    definitions = []
    for argument, name in (("from_", from_), ("to", to)):
        if name not in _DEFINITIONS:
            raise ValueError(f"{argument} must be one of {', '.join(map(repr, _DEFINITIONS))}, got {name!r}")
        definitions.append(_DEFINITIONS[name])
    old, new = definitions
    if old.quantity != new.quantity:
        raise ValueError(
            f"{from_!r} and {to!r} are not proportional to each other ({old.quantity}; {new.quantity}): no weight makes them equal, choose it anew"
        )
    return weight * old.value(_Sizes(sizes)) / new.value(_Sizes(sizes))
