"""truncated_svd, feature_svd and align_singular_vectors: the main directions of features, and those of a student against a teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..reference import align_singular_vectors as align_reference
from ..reference import truncated_svd as svd_reference
from . import checks
from .registration import register
from .transforms import examples_first, is_batched, is_linearised, is_transformed, takes_reference
from .truncated_svd_implementations import chosen  # the import registers the kernels of all devices but the CPU

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
    r"""The k largest singular triplets of every matrix of a batch: exact, differentiable everywhere, with fixed signs.

    .. math:: x = \sum_j \sigma_j u_j v_j^T, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge \sigma_k

    Args:
        x: matrices, float64, float32, bfloat16 or float16 (computed in float32), with any number of batch dimensions and any strides: a
            feature map seen as [B, H*W, C] is not copied (see :func:`feature_svd`).
        k: how many triplets, 0 to min(M, N). Where k is 0, results are empty and gradients zeros.
        sign: "max_abs": the entry of largest magnitude of every v is positive, and u follows. Entries within a share of 1e-4 of the largest
            count as equal to it, and the one of lowest index decides: which of two equal entries comes out larger is a matter of rounding. So
            signs are the same on every device, in every type, for any k and any batch, unless an entry lies just at that bound.
            ``None`` leaves signs as they come.
        return_u: also the left singular vectors.
        gap_eps: the noise of x, as a share of :math:`\sigma_1`. Where the derivative of triplet j divides by a difference d of squared singular
            values, it takes :math:`d / (d^2 + \epsilon_j^2)` with :math:`\epsilon_j` = gap_eps :math:`\sigma_1 \sigma_j`, what that noise does to
            :math:`\sigma_j^2`: continuous, 0 at d = 0, and never more than 1 / (gap_eps :math:`\sigma_1`) of the upstream gradient. Default: 1e-6
            (float32's rounding), 1e-12 for float64. 1e-4 to 1e-3 damps the gradients of close values. Below the unit roundoff of the
            computing type it counts as that.

    Returns:
        (u or None, s, v), float64 for float64 matrices, else float32. s is descending. Columns of u and v are orthonormal, also where singular
        values are 0 or equal (any basis of the subspace is right then; this one is deterministic). A matrix that holds a NaN or an infinity
        gives NaN, and so does its gradient unless that of all its triplets is 0; the others are not touched. v and u are transposed views of
        contiguous [..., k, N] and [..., k, M].

    Raises:
        TypeError: x of a wrong type.
        ValueError: no matrix, or an option out of its range.

    The gradient of any function of u, s and v comes from the kept triplets and a projected solve, whatever the discarded singular values
    are: it is finite for every finite matrix and upstream gradient, and exact for a function of span(v) alone even where kept values are
    equal. The sign is a constant to it. The backward is an op of its own; double backward and ``torch.func`` transforms go through
    :func:`kdkernels.reference.truncated_svd`, and are undefined where singular values are equal. docs/truncated_svd.md has the algorithm.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular
        Value Decomposition. ECCV 2018. https://arxiv.org/abs/1807.06819
    """
    _check_matrices("x", x)
    k, sign, gap_eps = _check_options(k, min(x.shape[-2:]), sign, return_u, gap_eps, compute_dtype(x))
    if k == 0:
        return _no_triplets(x, return_u)
    u, s, v = _decompose(x, k, sign, return_u, gap_eps, False, chosen.implementation)
    return u if return_u else None, s, v


def feature_svd(
    features: Tensor,  # [B, C, *spatial]
    k: int,
    *,
    sign: str | None = "max_abs",
    return_u: bool = False,
    gap_eps: float | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # [B, S, k] or None, [B, k], [B, C, k]
    """:func:`truncated_svd` of a feature map as SVD-KD sees it: rows are the S places, columns the C channels, so v lives on the channels.

    Contiguous (NCHW) and channels_last maps are read where they lie, and the gradient has their layout.

    Raises:
        TypeError: features of a wrong type.
        ValueError: fewer than three dimensions, or an option out of its range.
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
    """:func:`truncated_svd` of several batches of matrices, of any shapes: the maps of several layers, of student and teacher. On a GPU the CUDA
    kernels decompose all of them in one launch for each kind of kernel, and so for the gradients; elsewhere it is a loop.

    Args:
        xs: batches of matrices on one device; k is at most the smallest of their sides. Nothing is kept for a backward of those that need no
            gradient.

    Returns:
        What :func:`truncated_svd` returns, for each x.

    Raises:
        TypeError: an x of a wrong type.
        ValueError: no x, devices that differ, or an option out of its range.
    """
    if isinstance(xs, (Tensor, str)) or not isinstance(xs, Iterable) or getattr(xs, "ndim", 1) == 0:  # an array of one number has no members
        raise TypeError(f"xs must be a list of tensors, got {type(xs).__name__}")
    xs = list(xs)
    if not xs:
        raise ValueError("xs must hold at least one batch of matrices")
    for i, x in enumerate(xs):
        _check_matrices(f"xs[{i}]", x)
        if x.device != xs[0].device:
            raise ValueError(f"xs must be on one device, got {xs[0].device} and {x.device}")
    least = min(min(x.shape[-2:]) for x in xs)
    checked = [_check_options(k, least, sign, return_u, gap_eps, compute_dtype(x)) for x in xs]
    (k, sign_value, _), noise = checked[0], [own for *_, own in checked]
    if k == 0:
        return [_no_triplets(x, return_u) for x in xs]
    if is_transformed():  # one by one, as the transforms know it
        return [truncated_svd(x, k, sign=sign, return_u=return_u, gap_eps=gap_eps) for x in xs]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    us, ss, vs, _states = _group_op(xs, k, sign_value, return_u, noise, save, chosen.implementation)
    return [(u if return_u else None, s, v) for u, s, v in zip(us, ss, vs, strict=True)]


def align_singular_vectors(
    student: Tensor,  # [..., N, K]
    teacher: Tensor,  # [..., N, k]
    weight: Tensor | None = None,  # [..., k]
    *,
    flip: str = "teacher",
) -> tuple[Tensor, Tensor]:  # [..., N, k] each
    r"""Orders and flips singular vectors so that a student's can be compared with a teacher's, one by one.

    For teacher vector i, :math:`m(i) = \arg\max_j |\langle s_j, t_i \rangle|` is the student's vector that is nearest to its line, the first of
    those within a share of 1e-6 of the largest; the results are :math:`w_i s_{m(i)}` and :math:`w_i t_i`, one of the two flipped so that their
    product is not negative. Two teacher vectors may find the same student vector, as in the authors' code. Of no teacher vectors, or of vectors
    without entries, results are empty and gradients zeros.

    Args:
        student: K vectors as columns, float64, float32, bfloat16 or float16. SVD-KD takes K = k + 1: order may change from one network to another.
        teacher: k vectors.
        weight: a factor for each pair (SVD-KD: the teacher's :math:`\sigma_i / \|\sigma\|_2`). Default: 1.
        flip: which side is flipped: "teacher" (the authors') leaves the student as it is, "student" the teacher.

    Returns:
        (student, teacher), [..., N, k] each, float64 if either is, else float32. Gradients flow to every input that requires one; choice and
        sign are constants to them.

    Raises:
        TypeError: an input of a wrong type.
        ValueError: shapes or devices that do not fit, or an unknown flip.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular
        Value Decomposition. ECCV 2018. https://arxiv.org/abs/1807.06819
    """
    _check_matrices("student", student)
    _check_matrices("teacher", teacher)
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher must agree but in their last dimension, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if weight is not None:
        if not isinstance(weight, Tensor) or weight.dtype not in checks.FLOATING:
            raise TypeError(f"weight must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight).__name__)}")
        if weight.shape != teacher.shape[:-2] + teacher.shape[-1:] or weight.device != teacher.device:
            expected = (*teacher.shape[:-2], teacher.shape[-1])
            raise ValueError(f"weight must have the shape {expected} on {teacher.device}, got {tuple(weight.shape)} on {weight.device}")
    if student.shape[-1] == 0 and teacher.shape[-1] > 0:
        raise ValueError(f"student must hold a vector for those of teacher to choose, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    checks.choice("flip", flip, _FLIPS)
    if 0 in teacher.shape[-2:]:
        dtype = compute_dtype(student, teacher)
        results = (_nothing(t, teacher.shape, dtype) for t in (student, teacher))
        return tuple(t if weight is None else t * weight.to(dtype)[..., None, :] for t in results)
    return _align(student, teacher, weight, flip == "teacher", chosen.implementation)


def _check_matrices(name: str, x: Tensor) -> None:
    checks.tensor(name, x, "matrices")
    if x.dim() < 2:
        raise ValueError(f"{name} must be matrices [..., M, N], got {tuple(x.shape)}")


def _check_options(k, least: int, sign, return_u, gap_eps, dtype: torch.dtype) -> tuple[int, int, float]:
    """Checks the options of truncated_svd; returns k, the value of ``sign``, and gap_eps for matrices computed in dtype."""
    checks.integer("k", k)
    if not 0 <= k <= least:
        raise ValueError(f"k must be an int in [0, min(M, N)] = [0, {least}], got {k!r}")
    sign = checks.option("sign", sign)
    checks.flag("return_u", return_u)
    if gap_eps is None:
        gap_eps = 1e-12 if dtype == torch.float64 else 1e-6
    checks.not_negative("gap_eps", gap_eps)
    return int(k), sign, max(float(gap_eps), torch.finfo(dtype).eps / 2)


def _nothing(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without numbers, whose gradient gives zeros to x."""
    return x[:0].to(dtype).reshape(tuple(shape))


def _no_triplets(x: Tensor, return_u: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Zero of them, of matrices of any size."""
    *batch, m, n = x.shape
    u, s, v = (_nothing(x, shape, compute_dtype(x)) for shape in ((*batch, m, 0), (*batch, 0), (*batch, n, 0)))
    return u if return_u else None, s, v


def _vectors(x: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-2], k, n), dtype=dtype).mT


@torch.library.register_fake("kdkernels::truncated_svd")
def _(x, k, sign, return_u, gap_eps, save_state, implementation=0):
    dtype = compute_dtype(x)
    m, n = x.shape[-2:]
    u = _vectors(x, m, k, dtype) if return_u or m < n else x.new_empty(0, dtype=dtype)
    state = x.new_empty(_state_size() if save_state else 0, dtype=dtype)
    return u, x.new_empty((*x.shape[:-2], k), dtype=dtype), _vectors(x, n, k, dtype), state


def _state_size() -> int | torch.SymInt:
    """How large the state is depends on the machine that will run this; what reads it takes any."""
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except RuntimeError:  # meta tensors, and fake ones outside of a trace, have no sizes that are known later
        return 0


@torch.library.register_fake("kdkernels::align_singular_vectors")
def _(student, teacher, weight, flip_teacher, implementation=0):
    n, k = teacher.shape[-2:]
    dtype = compute_dtype(student, teacher)
    small = (*teacher.shape[:-2], k)
    return (
        _vectors(student, n, k, dtype),
        _vectors(teacher, n, k, dtype),
        student.new_empty(small, dtype=torch.int64),
        student.new_empty(small, dtype=dtype),
    )


# The group: its ops take and give lists, and run one by one where no launch is shared.


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
    # The others may have been made in inference mode, and what autograd saves must not.
    ctx.members = [i for i, x in enumerate(xs) if x.requires_grad]
    ctx.gap_eps = [gap_eps[i] for i in ctx.members]
    others = set(range(len(xs))) - set(ctx.members)
    states = output[3]
    ctx.mark_non_differentiable(*states, *(tensors[i] for tensors in output[:3] for i in others))
    ctx.save_for_backward(*(tensors[i] for tensors in (xs, *output) for i in ctx.members))


def _backward_group(ctx, *grads):
    n, saved = len(ctx.members), ctx.saved_tensors  # read once: checkpoint computes again what is read
    x, u, s, v, state = (saved[i * n : (i + 1) * n] for i in range(5))
    gu, gs, gv = ([None if part is None else part[i] for i in ctx.members] for part in grads[:3])
    members = list(zip(ctx.members, gu, gs, gv, x, u, s, v, state, ctx.gap_eps, strict=True))
    used = [m for m in members if any(g is not None for g in m[1:4])]
    result: list[Tensor | None] = [None] * ctx.count
    if torch.is_grad_enabled() or any(is_batched(g) for g in (*gu, *gs, *gv)):  # one by one: those have a double backward, and rules for vmap
        for i, *own in used:
            result[i] = torch.ops.kdkernels.truncated_svd_backward(*own, ctx.implementation)
    elif used:
        places, *lists, gap_eps = (list(part) for part in zip(*used, strict=True))
        none = lists[3][0].new_empty(0)
        for part, like in zip(lists[:3], (lists[3], lists[5], lists[3]), strict=True):
            part[:] = [none if g is None or g.dim() != t.dim() else g for g, t in zip(part, like, strict=True)]
        for i, gradient in zip(places, torch.ops.kdkernels.truncated_svd_group_backward(*lists, gap_eps, ctx.implementation), strict=True):
            result[i] = gradient
    return result, *(None,) * 6


torch.library.register_autograd("kdkernels::truncated_svd_group", _backward_group, setup_context=_setup_group)


def _svd_reference(x, k, sign, return_u):
    if is_linearised():
        raise NotImplementedError("torch.func.linearize of a singular value decomposition gives NaN in torch: take torch.func.jvp instead")
    return svd_reference(x, k, sign=sign, return_u=return_u)


def _svd_reference_of_backward(x, v):
    """The reference's triplets with the signs that the op gave."""
    outputs = svd_reference(x, v.shape[-1], return_u=True)
    flip = torch.where((outputs[2].detach() * v.detach()).sum(-2, keepdim=True) < 0, -1.0, 1.0).to(v.dtype)
    return outputs[0] * flip, outputs[1], outputs[2] * flip


def _align_reference(student, teacher, weight, flip_teacher):
    return align_reference(student, teacher, weight, flip="teacher" if flip_teacher else "student")


def _vmap_svd(info, in_dims, x, k, sign, return_u, gap_eps, save_state, implementation=0):
    """The examples are one more batch dimension."""
    x = x.movedim(in_dims[0], 0)
    m, n = x.shape[-2:]
    u, s, v = _decompose(x, k, sign, return_u or m < n, gap_eps, False, implementation)
    none = s.new_empty(info.batch_size, 0)
    return (u if return_u or m < n else none, s, v, none), (0, 0, 0, 0)


def _vmap_align(info, in_dims, student, teacher, weight, flip_teacher, implementation=0):
    given = examples_first(info.batch_size, (student, teacher, weight), in_dims[:3])
    if takes_reference(*given):
        none = student.new_empty(info.batch_size, 0)
        return (*_align(*given, flip_teacher, implementation), none, none), (0, 0, 0, 0)
    return torch.ops.kdkernels.align_singular_vectors(*given, flip_teacher, implementation), (0, 0, 0, 0)


_decompose = register("truncated_svd", _svd_reference, vmap=_vmap_svd, reference_of_backward=_svd_reference_of_backward)
_align = register("align_singular_vectors", _align_reference, vmap=_vmap_align)
