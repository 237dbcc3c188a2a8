"""Distillation from unlabelled images of unknown content, DFND (Chen et al., CVPR 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import checks
from ..ops.temperature_kl import temperature_kl
from .loss_module import LossModule


def noise_value(
    logits: Tensor,  # [B, K]
) -> Tensor:  # [B]
    r"""Noise value of images: :math:`-\log \max_k p_k` with p = softmax(logits), in [0, log K].

    This is the cross-entropy of the teacher's predictions with its own most probable class. Images
    with a small value resemble the teacher's training data (Chen et al. 2021, section 3).

    Returns:
        float64 for float64, else float32. NaN where the softmax is not defined, because a logit is
        NaN or infinite (-inf is allowed beside finite logits).

    Raises:
        TypeError: ``logits`` is not a tensor of a supported dtype.
        ValueError: ``logits`` is not of the shape [B, K] with K >= 1.
    """
    checks.tensor("logits", logits, "logits")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must have the shape [B, K] with at least one class, got {tuple(logits.shape)}")
    values = logits if logits.dtype == torch.float64 else logits.float()
    # The largest term of the sum is 1. The other terms alone keep small values accurate.
    largest = values.amax(1, keepdim=True)
    others = (values - largest).exp()
    others = others.scatter(1, values.argmax(1, keepdim=True), 0.0)
    return others.sum(1).log1p().where(largest[:, 0].isfinite(), torch.nan)


def noise_adaptation_matrix(
    weight: Tensor,  # [K, K - 1]
    diagonal: float | Tensor,  # a number, or [K]
    *,
    log: bool = False,
) -> Tensor:  # [K, K]
    r"""Matrix Q of the noise in the teacher's labels; its rows sum to 1.

    :math:`Q_{ii}` = ``diagonal``, the probability that the teacher's label is right, and the other
    elements of row i are :math:`(1 - Q_{ii}) \, \mathrm{softmax}(w_i)`. So :math:`Q_{ij}` is the
    probability of the label j if the class is i.

    Args:
        weight: learned; zeros make all errors of a class equally probable.
        diagonal: fixed, in [0, 1]; one number or one for each class. The authors take the accuracy
            of the teacher.
        log: return log Q; elements may be -inf.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``weight`` is not of the shape [K, K - 1] with K >= 2, or ``diagonal`` is not in
            [0, 1] or has the wrong length.
    """
    checks.tensor("weight", weight, "weights")
    if weight.dim() != 2 or weight.shape[1] != weight.shape[0] - 1 or weight.shape[0] < 2:
        raise ValueError(f"weight must have the shape [K, K - 1] for K >= 2 classes, got {tuple(weight.shape)}")
    classes = len(weight)
    if isinstance(diagonal, bool) or not isinstance(diagonal, (int, float, Tensor)):
        raise TypeError(f"diagonal must be a number or a tensor of {classes} numbers, got {type(diagonal).__name__}")
    values = weight if weight.dtype == torch.float64 else weight.float()
    if isinstance(diagonal, (int, float)):
        checks.fraction("diagonal", diagonal)
    else:
        _check_fractions("diagonal", diagonal)
    right = torch.as_tensor(diagonal, dtype=values.dtype, device=values.device).detach()
    if right.dim() > 1 or (right.dim() == 1 and len(right) != classes):
        raise ValueError(f"diagonal must be one number, or one for each of the {classes} classes, got the shape {tuple(right.shape)}")
    right = right.expand(classes)
    errors = torch.log1p(-right)[:, None] + F.log_softmax(values, 1)  # of row i: the columns without i
    column = torch.arange(classes - 1, device=values.device)
    row = torch.arange(classes, device=values.device)[:, None]
    matrix = torch.diag_embed(right.log()).scatter(1, column + (column >= row), errors)
    return matrix if log else matrix.exp()


def _check_fractions(name: str, value: Tensor) -> None:
    """Check that all elements of a CPU tensor lie in [0, 1].

    Wrappers of torch.func transforms are removed first. GPU tensors, and all tensors while
    torch.compile traces, are not checked.
    """
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    if value.device.type == "cpu" and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{name} must lie in [0, 1], got {value.tolist()}")


def dfnd_loss(
    logits: Tensor,  # [B, K]
    teacher_logits: Tensor,  # [B, K]
    weight: Tensor | None = None,  # [K, K - 1]
    diagonal: float | Tensor = 0.95,  # a number, or [K]
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
) -> Tensor:
    r"""Loss of DFND: a student learns from a teacher's predictions for images without labels.

    .. math:: \alpha T^2 KL(p_t \| p_s) - \log \sum_i p_{s,i} Q_{i \hat y}

    The first term compares the predictions softened by the temperature T. In the second,
    :math:`\hat y` is the teacher's most probable class, p_s the student's prediction for T = 1, and
    Q the noise adaptation matrix (:func:`noise_adaptation_matrix`): the teacher's label may be
    wrong, because the images are not from its training data. It is computed with logarithms, and
    finite also if all of the diagonal is 0 or all of it is 1. It is infinite only for a label that
    no class can have: if the diagonal is 0 for its class and 1 for all others.

    Args:
        logits: of the student.
        teacher_logits: detached.
        weight, diagonal: of the matrix Q. Without ``weight``, Q is the identity, and the second
            term the cross-entropy.
        temperature: T > 0.
        alpha: weight of the divergence.

    Returns:
        0-dim, float32 or float64: a mean over the rows.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, or an option is out of range.

    References:
        H. Chen et al. Learning Student Networks in the Wild. CVPR 2021.
    """
    checks.positive("temperature", temperature)
    checks.not_negative("alpha", alpha)
    checks.tensor("logits", logits, "logits")
    checks.tensor("teacher_logits", teacher_logits, "logits")
    if logits.dim() != 2 or logits.shape != teacher_logits.shape:
        raise ValueError(f"logits and teacher_logits must have the same shape [B, K], got {tuple(logits.shape)} and {tuple(teacher_logits.shape)}")
    if weight is not None and isinstance(weight, Tensor) and weight.shape != (logits.shape[1], logits.shape[1] - 1):
        raise ValueError(f"weight must have the shape [{logits.shape[1]}, {logits.shape[1] - 1}] for these logits, got {tuple(weight.shape)}")
    label = teacher_logits.detach().argmax(1)
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
    if weight is None:
        right = log_p.gather(1, label[:, None])[:, 0]
    else:
        log_matrix = noise_adaptation_matrix(weight, diagonal, log=True)
        right = (log_p + log_matrix.T[label]).logsumexp(1)  # row y of the transpose: log Q_{., y}
    # argmax takes NaN for the largest logit.
    right = right.masked_fill(teacher_logits.detach().isnan().any(1), torch.nan)
    total = -right.sum() / max(len(label), 1)
    if alpha:
        total = total + alpha * temperature_kl(logits, teacher_logits.detach(), temperature)
    return total


class DFNDLoss(LossModule):
    """Module of :func:`dfnd_loss` with fixed options.

    Example: ``DFNDLoss(temperature=4.0)(logits, teacher_logits, weight, 0.95)``.

    Args:
        temperature, alpha: options of :func:`dfnd_loss`.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, *, temperature: float = 4.0, alpha: float = 1.0):
        super().__init__(temperature=temperature, alpha=alpha)
        dfnd_loss(torch.zeros(1, 2), torch.zeros(1, 2), **self.options)  # validate the options

    def forward(self, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None, diagonal: float | Tensor = 0.95) -> Tensor:
        return dfnd_loss(logits, teacher_logits, weight, diagonal, **self.options)
