"""The losses of torchdistill 1.x: ``torchdistill.losses.mid_level``.

``student_io_dict`` and ``teacher_io_dict`` have, for each path of a module, a dict with its
``"input"`` and ``"output"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn

from ..nn.fsp import fsp_loss
from ..ops import checks
from ..ops.attention_pool import attention_transfer_loss
from .attention_transfer import require_one_size
from .functional import kl_div_of_logits


def _value(name: str, io_dict: Mapping[str, Mapping[str, Tensor]], place: Mapping[str, str]) -> Tensor:
    path, io = place["path"], place["io"]
    if path not in io_dict:
        raise KeyError(f"{name} has no module {path!r}; it has {sorted(io_dict)}")
    if io not in io_dict[path]:
        raise KeyError(f"{name} has no {io!r} of the module {path!r}; it has {sorted(io_dict[path])}")
    return io_dict[path][io]


class KDLoss(nn.KLDivLoss):
    """``alpha * cross_entropy + beta * T^2 KL``.

    If alpha is 0, or if there are no targets, the loss is KL **without T^2** and without beta.

    Args:
        student_module_path, student_module_io, teacher_module_path, teacher_module_io: where the
            logits are. The classes are in dimension 1.
        temperature: T.
        alpha: weight of the cross-entropy; ``None`` is as 0. (torchdistill 1.1.5 raises a TypeError
            for ``alpha=None`` unless ``beta`` is given.)
        beta: weight of T^2 KL; ``None``: 1 - alpha.
        reduction: of KL; see :func:`kdkernels.compat.functional.kl_div_of_logits`. "batchmean"
            takes the mean of the cross-entropy.
        **kwargs: other arguments of ``nn.CrossEntropyLoss``.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: Literal["batchmean", "mean", "sum", "none"] = "batchmean",
        **kwargs: Any,
    ):
        checks.positive("temperature", temperature)
        checks.choice("reduction", reduction, ("batchmean", "mean", "sum", "none"))
        super().__init__(reduction=reduction)
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self.temperature, self.alpha = temperature, alpha
        self.beta = 1 - (alpha or 0.0) if beta is None else beta
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction="mean" if reduction == "batchmean" else reduction, **kwargs)

    def forward(  # type: ignore[override]  # torchdistill gives this subclass other arguments too
        self, student_io_dict: Mapping, teacher_io_dict: Mapping, targets: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        student = _value("student_io_dict", student_io_dict, {"path": self.student_module_path, "io": self.student_module_io})
        teacher = _value("teacher_io_dict", teacher_io_dict, {"path": self.teacher_module_path, "io": self.teacher_module_io})
        soft_only = not self.alpha or targets is None
        soft = kl_div_of_logits(student, teacher, self.temperature, dim=1, reduction=cast(Any, self.reduction), scale_by_t2=not soft_only)
        if soft_only:
            return soft
        return self.alpha * self.cross_entropy_loss(student.to(soft.dtype), targets) + self.beta * soft


class ATLoss(nn.Module):
    """Attention transfer losses, weighted and summed.

    Args:
        at_pairs: for each name a dict with ``student`` and ``teacher``, each a dict with the
            ``path`` and ``io`` of a feature map, and optionally ``weight``.
        mode: "code", the mean squared difference of the maps, or "paper", the L2 norm of the
            difference as a mean over samples.
    """

    def __init__(self, at_pairs: Mapping[str, Mapping[str, Any]], mode: Literal["code", "paper"] = "code", **kwargs: Any):
        super().__init__()
        checks.choice("mode", mode, ("code", "paper"))
        self.at_pairs, self.mode = at_pairs, mode

    def forward(self, student_io_dict: Mapping, teacher_io_dict: Mapping, *args: Any, **kwargs: Any) -> Tensor:
        variant = "authors" if self.mode == "code" else "paper"
        total: Any = 0
        for pair in self.at_pairs.values():
            student = _value("student_io_dict", student_io_dict, pair["student"])
            teacher = _value("teacher_io_dict", teacher_io_dict, pair["teacher"])
            require_one_size(student, teacher)
            total = total + pair.get("weight", 1) * attention_transfer_loss(student, teacher, variant=variant)
        return total


class FSPLoss(nn.Module):
    """Norms of the columns of the differences of FSP matrices, summed and divided by B.

    Args:
        fsp_pairs: for each name a dict with ``student_first``, ``student_second``,
            ``teacher_first`` and ``teacher_second``, each a dict with the ``path`` and ``io`` of a
            feature map, and optionally ``weight``.
    """

    def __init__(self, fsp_pairs: Mapping[str, Mapping[str, Any]], **kwargs: Any):
        super().__init__()
        self.fsp_pairs = fsp_pairs

    def forward(self, student_io_dict: Mapping, teacher_io_dict: Mapping, *args: Any, **kwargs: Any) -> Tensor:
        total: Any = 0
        for pair in self.fsp_pairs.values():
            student, teacher = (
                tuple(_value(f"{who}_io_dict", io_dict, pair[f"{who}_{place}"]) for place in ("first", "second"))
                for who, io_dict in (("student", student_io_dict), ("teacher", teacher_io_dict))
            )
            total = total + pair.get("weight", 1) * fsp_loss([cast(tuple, student)], [cast(tuple, teacher)], variant="torchdistill")
        return total
