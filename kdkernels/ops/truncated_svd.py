"""truncated_svd, truncated_svds, feature_svd and align_singular_vectors.

The first three compute the largest singular triplets of matrices, the last matches a student's
singular vectors with a teacher's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..reference import align_singular_vectors as align_reference
from ..reference import truncated_svd as svd_reference
from . import checks
from .registration import register
from .transforms import examples_first, is_batched, is_linearized, is_transformed, takes_reference
from .truncated_svd_implementations import chosen  # importing it registers the kernels of all devices but the CPU

_FLIPS = ("teacher", "student")

_svd_op = torch.ops.kdkernels.truncated_svd.default
_group_op = torch.ops.kdkernels.truncated_svd_group.default


def truncated_svd(
    x: Tensor,  # [..., M, N]
    k: int,
    *,
    sign: str | None = "max_abs",
    return_u: bool = False,
    gap_eps: float | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # [..., M, k] or None, [..., k], [..., N, k]
    r"""The k largest singular triplets of each matrix of a batch, with fixed signs.

    The triplets are exact, and differentiable everywhere:

    .. math:: x = \sum_j \sigma_j u_j v_j^T, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge \sigma_k

    Args:
        x: matrices, float64, float32, bfloat16 or float16 (computed in float32), with any number of
            batch dimensions and any strides. A feature map viewed as [B, H*W, C] is not copied (see
            :func:`feature_svd`).
        k: number of triplets, 0 to min(M, N). For k = 0 the results are empty and the gradients
            zero.
        sign: with "max_abs", the entry of largest magnitude of every v is made positive, and u
            changes its sign accordingly. All entries whose magnitude is at least (1 - 1e-4) times
            the largest count as equal, because rounding decides which of them is largest; the one
            with the lowest index is used. The signs are therefore the same on every device, in
            every dtype, and for any k and batch, except if an entry is close to this threshold.
            With ``None`` the signs are not fixed.
        return_u: also return the left singular vectors.
        gap_eps: the noise of x, as a fraction of :math:`\sigma_1`. The derivative of triplet j
            divides by differences d of squared singular values. These quotients 1 / d are replaced
            by :math:`d / (d^2 + \epsilon_j^2)`, where :math:`\epsilon_j` is the effect of the noise
            on :math:`\sigma_j^2`: gap_eps :math:`\sigma_1` times the larger of :math:`\sigma_j` and
            gap_eps :math:`\sigma_1`. This function is continuous and 0 at d = 0, and no difference
            amplifies an upstream gradient by more than 1 / (gap_eps :math:`\sigma_1`). Default:
            1e-6, about the rounding of float32, and 1e-12 for float64. Values of 1e-4 to 1e-3 damp
            the gradients of close singular values. Values below the unit roundoff of the dtype of
            the computation are replaced by it.

    Returns:
        (u or None, s, v), float64 for float64 matrices, else float32. s is descending. The columns
        of u and v are orthonormal, even if singular values are 0 or equal. (Any basis of the
        subspace is then correct; the one returned is deterministic.) A matrix that contains a NaN
        or an infinity gives NaN. Its gradient is also NaN, unless the upstream gradients of all its
        triplets are 0. The other matrices of the batch are not affected. v and u are transposed
        views of contiguous [..., k, N] and [..., k, M].

    Raises:
        TypeError: x has the wrong type.
        ValueError: x has fewer than two dimensions, or an option is out of range.

    The gradient of any function of u, s and v is computed from the kept triplets and a linear
    solve in the complement of the kept vectors. A float32 or float64 gradient is finite for every
    finite matrix and upstream gradient, whatever the discarded singular values are; a
    half-precision gradient may overflow to infinity. For functions of span(v) alone the gradient is
    exact even if kept singular values are equal. The sign is treated as a constant. The first
    derivative is computed by the op ``kdkernels::truncated_svd_backward``. Double backward and
    ``torch.func`` transforms use :func:`kdkernels.reference.truncated_svd`, and are undefined if
    singular values are equal. docs/truncated_svd.md describes the algorithm.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular
        Value Decomposition. ECCV 2018. https://arxiv.org/abs/1807.06819
    """
    _check_matrices("x", x)
    k, sign_value, floor = _check_options(k, min(x.shape[-2:]), sign, return_u, gap_eps, compute_dtype(x))
    if k == 0:
        return _no_triplets(x, return_u)
    u, s, v = _decompose(x, k, sign_value, return_u, floor, False, chosen.implementation)
    return u if return_u else None, s, v


def feature_svd(
    features: Tensor,  # [B, C, *spatial]
    k: int,
    *,
    sign: str | None = "max_abs",
    return_u: bool = False,
    gap_eps: float | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # [B, S, k] or None, [B, k], [B, C, k]
    """Compute :func:`truncated_svd` of feature maps, as in SVD-KD.

    The rows of the matrix of a sample are the S spatial positions and its columns the C channels,
    so v has one entry per channel. Contiguous (NCHW) and channels_last features are read in place,
    without a copy, and the gradient has their layout.

    Args:
        features: feature maps with one or more spatial dimensions.
        k, sign, return_u, gap_eps: see :func:`truncated_svd`.

    Raises:
        TypeError: features have the wrong type.
        ValueError: features have fewer than three dimensions, or an option is out of range.
    """
    checks.tensor("features", features, "features")
    if features.dim() < 3:
        raise ValueError(f"features must have the shape [B, C, *spatial], got {tuple(features.shape)}")
    return truncated_svd(features.flatten(2).transpose(1, 2), k, sign=sign, return_u=return_u, gap_eps=gap_eps)


def truncated_svds(
    xs: Sequence[Tensor],  # [..., M, N] each
    k: int,
    *,
    sign: str | None = "max_abs",
    return_u: bool = False,
    gap_eps: float | None = None,
) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    """Compute :func:`truncated_svd` of several batches of matrices, of any shapes.

    The batches are, for example, the feature maps of several layers of student and teacher. The
    CUDA kernels decompose all batches with one launch for each kind of kernel, and compute their
    gradients in the same way. Other implementations decompose one batch after another.

    Args:
        xs: batches of matrices on one device. Nothing is saved for the backward pass of batches
            that do not require a gradient.
        k: number of triplets, at most the smallest number of rows or columns of any x.
        sign, return_u, gap_eps: see :func:`truncated_svd`.

    Returns:
        The result of :func:`truncated_svd` for each x.

    Raises:
        TypeError: xs is not a list of tensors, or an x has the wrong type.
        ValueError: xs is empty, devices differ, or an option is out of range.
    """
    if isinstance(xs, (Tensor, str)) or not isinstance(xs, Iterable) or getattr(xs, "ndim", 1) == 0:  # ndim 0: an array that cannot be iterated
        raise TypeError(f"xs must be a list of tensors, got {type(xs).__name__}")
    xs = list(xs)
    if not xs:
        raise ValueError("xs must contain at least one batch of matrices")
    for i, x in enumerate(xs):
        _check_matrices(f"xs[{i}]", x)
        if x.device != xs[0].device:
            raise ValueError(f"xs must be on one device, got {xs[0].device} and {x.device}")
    smallest_side = min(min(x.shape[-2:]) for x in xs)
    checked = [_check_options(k, smallest_side, sign, return_u, gap_eps, compute_dtype(x)) for x in xs]
    (k, sign_value, _), gap_eps_of_xs = checked[0], [gap_eps_of_x for *_, gap_eps_of_x in checked]
    if k == 0:
        return [_no_triplets(x, return_u) for x in xs]
    if is_transformed():  # one by one: the group op does not support transforms
        return [truncated_svd(x, k, sign=sign, return_u=return_u, gap_eps=gap_eps) for x in xs]
    save_state = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    us, ss, vs, _states = _group_op(xs, k, sign_value, return_u, gap_eps_of_xs, save_state, chosen.implementation)
    return [(u if return_u else None, s, v) for u, s, v in zip(us, ss, vs, strict=True)]


def align_singular_vectors(
    student: Tensor,  # [..., N, K]
    teacher: Tensor,  # [..., N, k]
    weight: Tensor | None = None,  # [..., k]
    *,
    flip: str = "teacher",
) -> tuple[Tensor, Tensor]:  # [..., N, k] each
    r"""Select and flip the student's singular vectors to match the teacher's, one by one.

    For teacher vector i, :math:`m(i) = \arg\max_j |\langle s_j, t_i \rangle|` selects the student
    vector with the largest magnitude of the inner product. Magnitudes of at least (1 - 1e-6) times
    the largest count as equal, and the first of these vectors is selected. The results are
    :math:`w_i s_{m(i)}` and :math:`w_i t_i`, one of them flipped so that their inner product is not
    negative. Two teacher vectors may select the same student vector, as in the authors' code. If
    there are no teacher vectors, or vectors have no entries, the results are empty and the
    gradients zero.

    Args:
        student: K vectors as columns, float64, float32, bfloat16 or float16. SVD-KD uses K = k + 1,
            because the order of the vectors may differ between the networks.
        teacher: k vectors as columns.
        weight: a factor for each pair (SVD-KD: the teacher's :math:`\sigma_i / \|\sigma\|_2`).
            Default: 1.
        flip: whose vectors are flipped: "teacher" (the authors' code) or "student".

    Returns:
        (student, teacher), each [..., N, k], float64 if either input is float64, else float32.
        Every input that requires a gradient receives one. The selection and the sign are treated as
        constants.

    Raises:
        TypeError: an input has the wrong type.
        ValueError: shapes or devices do not match, or ``flip`` is unknown.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular
        Value Decomposition. ECCV 2018. https://arxiv.org/abs/1807.06819
    """
    _check_matrices("student", student)
    _check_matrices("teacher", teacher)
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student and teacher must have the same shape except for the last dimension, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if weight is not None:
        if not isinstance(weight, Tensor) or weight.dtype not in checks.FLOATING:
            raise TypeError(f"weight must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight).__name__)}")
        if weight.shape != teacher.shape[:-2] + teacher.shape[-1:] or weight.device != teacher.device:
            expected = (*teacher.shape[:-2], teacher.shape[-1])
            raise ValueError(f"weight must have the shape {expected} on {teacher.device}, got {tuple(weight.shape)} on {weight.device}")
    if student.shape[-1] == 0 and teacher.shape[-1] > 0:
        raise ValueError(f"student must have at least one vector if teacher has any, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    checks.choice("flip", flip, _FLIPS)
    if 0 in teacher.shape[-2:]:
        dtype = compute_dtype(student, teacher)
        of_student, of_teacher = (_empty(x, teacher.shape, dtype) for x in (student, teacher))
        if weight is None:
            return of_student, of_teacher
        factor = weight.to(dtype)[..., None, :]
        return of_student * factor, of_teacher * factor
    return _align(student, teacher, weight, flip == "teacher", chosen.implementation)


def _check_matrices(name: str, x: Tensor) -> None:
    checks.tensor(name, x, "matrices")
    if x.dim() < 2:
        raise ValueError(f"{name} must be matrices [..., M, N], got {tuple(x.shape)}")


def _check_options(k, smallest_side: int, sign, return_u, gap_eps, dtype: torch.dtype) -> tuple[int, int, float]:
    """Check the options of truncated_svd.

    Returns:
        k, the integer value of ``sign``, and gap_eps for matrices computed in ``dtype``.
    """
    checks.integer("k", k)
    if not 0 <= k <= smallest_side:
        raise ValueError(f"k must be an int in [0, min(M, N)] = [0, {smallest_side}], got {k!r}")
    sign = checks.option("sign", sign)
    checks.flag("return_u", return_u)
    if gap_eps is None:
        gap_eps = 1e-12 if dtype == torch.float64 else 1e-6
    checks.not_negative("gap_eps", gap_eps)
    return int(k), sign, max(float(gap_eps), torch.finfo(dtype).eps / 2)


def _empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor that is connected to x with a zero gradient."""
    return x[:0].to(dtype).reshape(tuple(shape))


def _no_triplets(x: Tensor, return_u: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the results of truncated_svd for k = 0."""
    *batch, m, n = x.shape
    u, s, v = (_empty(x, shape, compute_dtype(x)) for shape in ((*batch, m, 0), (*batch, 0), (*batch, n, 0)))
    return u if return_u else None, s, v


def _empty_vectors(x: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-2], k, n), dtype=dtype).mT


@torch.library.register_fake("kdkernels::truncated_svd")
def _(x, k, sign, return_u, gap_eps, save_state, implementation=0):
    dtype = compute_dtype(x)
    m, n = x.shape[-2:]
    u = _empty_vectors(x, m, k, dtype) if return_u or m < n else x.new_empty(0, dtype=dtype)
    state = x.new_empty(_state_size() if save_state else 0, dtype=dtype)
    return u, x.new_empty((*x.shape[:-2], k), dtype=dtype), _empty_vectors(x, n, k, dtype), state


def _state_size() -> int | torch.SymInt:
    """Return an unknown size: the size of the state depends on the machine that runs the op."""
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except RuntimeError:  # meta tensors, and fake tensors outside a trace, cannot have an unknown size
        return 0


@torch.library.register_fake("kdkernels::align_singular_vectors")
def _(student, teacher, weight, flip_teacher, implementation=0):
    n, k = teacher.shape[-2:]
    dtype = compute_dtype(student, teacher)
    small = (*teacher.shape[:-2], k)
    return (
        _empty_vectors(student, n, k, dtype),
        _empty_vectors(teacher, n, k, dtype),
        student.new_empty(small, dtype=torch.int64),
        student.new_empty(small, dtype=dtype),
    )


# The group ops take and return lists. Batches that cannot share a launch are computed one by one.


@torch.library.register_fake("kdkernels::truncated_svd_group")
def _(x, k, sign, return_u, gap_eps, save_state, implementation):
    each = [_svd_op(m, k, sign, return_u, noise, save_state, implementation) for m, noise in zip(x, gap_eps, strict=True)]
    return tuple(map(list, zip(*each, strict=True)))


@torch.library.register_fake("kdkernels::truncated_svd_group_backward")
def _(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, implementation):
    return [torch.empty_like(m) for m in x]


def _setup_group(ctx, inputs, output) -> None:
    xs, _k, _sign, _return_u, gap_eps, _save_state, ctx.implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.count = len(xs)
    # Save only these: the others may be inference tensors, which autograd cannot save.
    ctx.members = [i for i, x in enumerate(xs) if x.requires_grad]
    ctx.gap_eps = [gap_eps[i] for i in ctx.members]
    constants = set(range(len(xs))) - set(ctx.members)
    states = output[3]
    ctx.mark_non_differentiable(*states, *(tensors[i] for tensors in output[:3] for i in constants))
    ctx.save_for_backward(*(tensors[i] for tensors in (xs, *output) for i in ctx.members))


def _backward_group(ctx, *grads):
    n, saved = len(ctx.members), ctx.saved_tensors  # read once: torch.utils.checkpoint recomputes tensors when they are read
    x, u, s, v, state = (saved[i * n : (i + 1) * n] for i in range(5))
    gu, gs, gv = ([None if items is None else items[i] for i in ctx.members] for items in grads[:3])
    members = list(zip(ctx.members, gu, gs, gv, x, u, s, v, state, ctx.gap_eps, strict=True))
    used = [m for m in members if any(g is not None for g in m[1:4])]
    result: list[Tensor | None] = [None] * ctx.count
    if torch.is_grad_enabled() or any(is_batched(g) for g in (*gu, *gs, *gv)):  # one by one: these ops have a double backward and vmap rules
        for i, *tensors in used:
            result[i] = torch.ops.kdkernels.truncated_svd_backward(*tensors, ctx.implementation)
    elif used:
        positions, *lists, gap_eps = (list(items) for items in zip(*used, strict=True))
        missing = lists[3][0].new_empty(0)
        for items, like in zip(lists[:3], (lists[3], lists[5], lists[3]), strict=True):
            items[:] = [missing if g is None or g.dim() != t.dim() else g for g, t in zip(items, like, strict=True)]
        for i, gradient in zip(positions, torch.ops.kdkernels.truncated_svd_group_backward(*lists, gap_eps, ctx.implementation), strict=True):
            result[i] = gradient
    return result, *(None,) * 6


torch.library.register_autograd("kdkernels::truncated_svd_group", _backward_group, setup_context=_setup_group)


def _svd_reference(x, k, sign, return_u):
    if is_linearized():
        raise NotImplementedError("torch.func.linearize of a singular value decomposition gives NaN in torch: use torch.func.jvp instead")
    return svd_reference(x, k, sign=sign, return_u=return_u)


def _svd_reference_of_backward(x, v):
    """Return the triplets of the reference, with the signs of the op's results."""
    outputs = svd_reference(x, v.shape[-1], return_u=True)
    flip = torch.where((outputs[2].detach() * v.detach()).sum(-2, keepdim=True) < 0, -1.0, 1.0).to(v.dtype)
    return outputs[0] * flip, outputs[1], outputs[2] * flip


def _align_reference(student, teacher, weight, flip_teacher):
    return align_reference(student, teacher, weight, flip="teacher" if flip_teacher else "student")


def _vmap_svd(info, in_dims, x, k, sign, return_u, gap_eps, save_state, implementation=0):
    """Treat the vmap examples as one more batch dimension."""
    x = x.movedim(in_dims[0], 0)
    m, n = x.shape[-2:]
    u, s, v = _decompose(x, k, sign, return_u or m < n, gap_eps, False, implementation)
    empty = s.new_empty(info.batch_size, 0)
    return (u if return_u or m < n else empty, s, v, empty), (0, 0, 0, 0)


def _vmap_align(info, in_dims, student, teacher, weight, flip_teacher, implementation=0):
    batched = examples_first(info.batch_size, (student, teacher, weight), in_dims[:3])
    if takes_reference(*batched):
        empty = student.new_empty(info.batch_size, 0)
        return (*_align(*batched, flip_teacher, implementation), empty, empty), (0, 0, 0, 0)
    return torch.ops.kdkernels.align_singular_vectors(*batched, flip_teacher, implementation), (0, 0, 0, 0)


_decompose = register("truncated_svd", _svd_reference, vmap=_vmap_svd, reference_of_backward=_svd_reference_of_backward)
_align = register("align_singular_vectors", _align_reference, vmap=_vmap_align)
