"""temperature_kl: Kullback-Leibler and Jensen-Shannon divergence of softened logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Reduction
from ..reference import temperature_kl as reference
from . import checks
from .registration import register
from .transforms import examples_first, is_linearized, is_transformed


def temperature_kl(
    student: Tensor,  # [..., C, ...]
    teacher: Tensor,  # [..., C, ...]
    temperature: float | Tensor = 1.0,
    *,
    dim: int = -1,
    direction: str = "forward",
    beta: float = 0.5,
    reduction: str = "batchmean",
    scale_by_t2: bool = True,
    include_entropy: bool = True,
    target_eps: float = 0.0,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Divergence between the softened predictions of a student and a teacher, as one fused op.

    The divergence is never negative, and accurate even if student and teacher nearly agree.

    With :math:`p_t = \mathrm{softmax}(\text{teacher}/T)` and
    :math:`p_s = \mathrm{softmax}(\text{student}/T)` over ``dim``, the loss of a row is

    ======================  ====================================================================
    ``direction``           loss of a row (times :math:`T^2` if ``scale_by_t2``)
    ======================  ====================================================================
    ``"forward"``           :math:`KL(p_t \| p_s) = \sum_k p_t (\log p_t - \log p_s)`
                            (Hinton et al. 2015)
    ``"reverse"``           :math:`KL(p_s \| p_t)`
    ``"jsd"``               :math:`\beta KL(p_t \| M) + (1-\beta) KL(p_s \| M)`,
                            :math:`M = \beta p_t + (1-\beta) p_s` (Agarwal et al. 2024, eq. 1);
                            as in TRL and Liger, ``beta=0`` is ``"forward"`` and ``beta=1`` is
                            ``"reverse"``
    ======================  ====================================================================

    Args:
        student: logits, float64, float32, bfloat16 or float16, with any strides. The classes are
            in dimension ``dim``; the elements of all other dimensions are rows. ``-inf`` excludes
            a class; :math:`0 \log 0 = 0`. A row gives NaN if all its logits are ``-inf`` or if any
            is NaN.
        teacher: logits of the same shape and device; the dtype may differ. The teacher receives a
            gradient only if it requires one.
        temperature: T > 0, by which the logits are divided. A float, or a tensor that broadcasts to
            the rows (one T per sample: ``[B]`` or ``[B, 1]`` for logits ``[B, C]``). The loss is
            differentiable with respect to a tensor that requires a gradient.
        dim: the dimension of the classes. For ``[B, K, H, W]`` and ``dim=1`` each pixel is a row.
        beta: weight of the teacher in the mixture, in [0, 1]; used by ``"jsd"`` only.
        reduction: ``"batchmean"`` divides the sum by the number of (unmasked) rows; ``"mean"``
            divides it by the number of rows times C, like ``"mean"`` of
            ``torch.nn.functional.kl_div``; ``"sum"``; or ``"none"`` for one loss per row.
        scale_by_t2: multiply by :math:`T^2`, which keeps the size of the gradient when T changes.
        include_entropy: ``False`` gives the soft cross-entropy :math:`-\sum p_t \log p_s`. Its
            gradient with respect to the student is the same, its value is not. Only for
            ``"forward"``.
        target_eps: added to every :math:`p_t`, both as the weight and inside the logarithm, without
            renormalising. Only for ``"forward"``. (Feature Fusion Learning, Kim et al. 2019, uses
            1e-7.)
        mask: bool, one element per row. Rows with ``False`` contribute nothing to the loss, even if
            they are not finite, and are not counted.
        normalizer: float or one-element tensor that replaces the number of rows in ``"batchmean"``
            and ``"mean"``, so that gradient accumulation gives the same result as one large batch.
            It is not differentiated.

    Returns:
        float64 if either input is float64, else float32, also under autocast. A 0-dim tensor, or
        one loss per row for ``"none"``. A batch without (unmasked) rows gives 0.

    Raises:
        TypeError: logits, temperature or mask have the wrong type.
        ValueError: shapes or devices differ, T is not a finite number > 0, or an option is out of
            range. The values of CUDA tensors for ``temperature`` and ``normalizer`` are not
            checked, because that would wait for the GPU; T <= 0 gives NaN there.

    If only the student requires a gradient, the forward pass also computes this gradient, without
    an additional pass over the logits. The autograd graph then keeps this gradient and the
    student's logits, but not the teacher's logits for ``"forward"`` without ``target_eps``. A
    float16 gradient is stored with a power of two for each row, and multiplied by the upstream
    gradient in float32. The factor of a loss scaler is therefore applied before small gradients
    could underflow. Second derivatives, forward mode and ``torch.func`` use
    :func:`kdkernels.reference.temperature_kl`.

    References:
        G. Hinton, O. Vinyals, J. Dean. Distilling the Knowledge in a Neural Network. 2015.
        https://arxiv.org/abs/1503.02531
        R. Agarwal et al. On-Policy Distillation of Language Models. ICLR 2024.
        https://arxiv.org/abs/2306.13649
    """
    _check(student, teacher, dim, direction, beta, reduction, scale_by_t2, include_entropy, target_eps, mask, normalizer)
    rows_temperature = None
    if isinstance(temperature, Tensor):
        rows_temperature, temperature = _rows_temperature(temperature, student, dim), 1.0
    else:
        checks.positive("temperature", temperature, "a number or a tensor")
    if direction == "jsd" and (beta == 0 or beta == 1):
        direction = "reverse" if beta == 1 else "forward"
    if normalizer is not None and not isinstance(normalizer, Tensor):
        widest = torch.float64 if student.device.type != "mps" else torch.float32  # MPS devices do not support float64
        normalizer = torch.full((), normalizer, dtype=widest, device=student.device)
    if not torch.compiler.is_compiling() and is_transformed() and not is_linearized():  # the reference does not check them
        checks.positive_values("temperature", rows_temperature)
        checks.positive_values("normalizer", normalizer)
    values = checks.option("direction", direction), beta, checks.option("reduction", reduction)
    options = (dim, *values, scale_by_t2, include_entropy, target_eps)
    return _divergence(student, teacher, temperature, rows_temperature, mask, normalizer, *options, False)


def _row_shape(logits: Tensor, dim: int) -> tuple:
    return (*logits.shape[:dim], *logits.shape[dim:][1:])  # no `del`: torch.compile of torch 2.10 cannot delete from a list of symbolic sizes


def _rows_temperature(temperature: Tensor, logits: Tensor, dim: int) -> Tensor:
    rows = _row_shape(logits, dim)
    if not temperature.is_floating_point():
        raise TypeError(f"temperature must be floating point, got {temperature.dtype}")
    if temperature.device != logits.device:
        raise ValueError(f"temperature must be on the logits' device {logits.device}, got {temperature.device}")
    if temperature.dim() == logits.dim() and temperature.shape[dim] == 1:  # [B, 1] for [B, C]
        temperature = temperature.squeeze(dim)
    try:
        return temperature.expand(rows)
    except RuntimeError:
        raise ValueError(
            f"temperature must broadcast to the rows {rows} (the logits' shape without dim={dim}), got {tuple(temperature.shape)}"
        ) from None


def _check(student, teacher, dim, direction, beta, reduction, scale_by_t2, include_entropy, target_eps, mask, normalizer) -> None:
    checks.tensor("student", student, "logits")
    checks.tensor("teacher", teacher, "logits")
    checks.integer("dim", dim)
    checks.option("direction", direction)
    checks.option("reduction", reduction)
    checks.fraction("beta", beta)
    checks.not_negative("target_eps", target_eps)
    checks.flag("scale_by_t2", scale_by_t2)
    checks.flag("include_entropy", include_entropy)
    ndim = student.dim()
    if ndim == 0:
        raise ValueError("student must have a dimension of classes, got a 0-dim tensor")
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim must lie in [{-ndim}, {ndim - 1}] for logits of {ndim} dimensions, got {dim}")
    if student.shape != teacher.shape:
        if ndim == teacher.dim() and student.shape[dim] != teacher.shape[dim]:
            raise ValueError(
                f"student and teacher must have the same classes in dim={dim}, got {student.shape[dim]} and {teacher.shape[dim]}: "
                "pad the smaller vocabulary with -inf, or slice both to the classes that they share"
            )
        raise ValueError(f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if student.shape[dim] == 0:
        raise ValueError(f"student and teacher must have at least one class, got shape {tuple(student.shape)} with dim={dim}")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    if direction != "forward" and (target_eps > 0 or not include_entropy):
        raise ValueError(f"target_eps > 0 and include_entropy=False are defined for direction='forward' only, got direction={direction!r}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {checks.kind(mask)}")
        if tuple(mask.shape) != _row_shape(student, dim):
            raise ValueError(f"mask must have the shape of the rows {_row_shape(student, dim)}, got {tuple(mask.shape)}")
        if mask.device != student.device:
            raise ValueError(f"mask must be on the logits' device {student.device}, got {mask.device}")
    if normalizer is not None:
        _check_normalizer(normalizer, student, reduction)


def _check_normalizer(normalizer, student, reduction) -> None:
    if reduction not in ("mean", "batchmean"):
        raise ValueError(f"normalizer replaces the number of rows in reduction='batchmean' or 'mean', got reduction={reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element, got shape {tuple(normalizer.shape)}")
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"normalizer must be a real number or a tensor of one, got {normalizer.dtype}")
        if normalizer.requires_grad:
            raise ValueError("normalizer is not differentiated and must not require a gradient: pass normalizer.detach()")
        if normalizer.device != student.device:
            raise ValueError(f"normalizer must be on the logits' device {student.device}, got {normalizer.device}")
    else:
        checks.positive("normalizer", normalizer, "a number or a tensor of one")


@torch.library.register_fake("kdkernels::temperature_kl")
def _(
    student,
    teacher,
    temperature,
    row_temperature,
    mask,
    normalizer,
    dim,
    direction,
    beta,
    reduction,
    scale_by_t2,
    include_entropy,
    target_eps,
    save_grad,
):
    shape = _row_shape(student, dim) if reduction == Reduction.NONE else ()
    loss = student.new_empty(shape, dtype=compute_dtype(student, teacher))
    scaled = save_grad and student.dtype == torch.float16
    row_scale = student.new_empty(_row_shape(student, dim) if scaled else 0, dtype=torch.float32)
    return loss, torch.empty_like(student) if save_grad else student.new_empty(0), row_scale


def _fake_backward(grad_loss, student, teacher, temperature, row_temperature, mask, normalizer, dim, *options):
    wanted = options[-1]
    row_dtype = compute_dtype(student, teacher) if row_temperature is None else row_temperature.dtype
    return (
        torch.empty_like(student) if wanted[0] else student.new_empty(0),
        torch.empty_like(teacher) if wanted[1] else student.new_empty(0),
        student.new_empty(_row_shape(student, dim), dtype=row_dtype) if wanted[2] else student.new_empty(0),
    )


def _reference(
    student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2, include_entropy, target_eps
):
    return reference(
        student,
        teacher,
        temperature if row_temperature is None else row_temperature,
        dim=dim,
        direction=direction,
        beta=beta,
        reduction=reduction,
        scale_by_t2=scale_by_t2,
        include_entropy=include_entropy,
        target_eps=target_eps,
        mask=mask,
        normalizer=normalizer,
    )


def _vmap(info, in_dims, student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, *other_options):
    """Call the op once for all vmap examples with reduction="none"; then reduce each example."""
    examples = info.batch_size
    dim = dim % (student.dim() - (in_dims[0] is not None))
    tensors = (student, teacher, row_temperature, mask, normalizer)
    student, teacher, rows, mask, normalizer = examples_first(examples, tensors, (*in_dims[:2], *in_dims[3:6]))
    *options, _save_grad = other_options
    loss = _divergence(student, teacher, temperature, rows, mask, None, dim + 1, direction, beta, Reduction.NONE.value, *options, False)
    if reduction != Reduction.NONE:
        classes = student.shape[dim + 1]
        kept_rows = loss[0].numel() if mask is None else mask.flatten(1).sum(1).clamp(min=1)
        count = max(kept_rows, 1) if normalizer is None and mask is None else kept_rows if normalizer is None else normalizer.reshape(examples)
        loss = loss.reshape(examples, loss[0].numel()).sum(1)
        if reduction != Reduction.SUM:
            loss = loss / (count * classes if reduction == Reduction.MEAN else count)
    return (loss, student.new_empty(examples, 0), student.new_empty(examples, 0, dtype=torch.float32)), (0, 0, 0)


_divergence = register("temperature_kl", _reference, launchers="temperature_kl", vmap=_vmap, fake_of_backward=_fake_backward)
