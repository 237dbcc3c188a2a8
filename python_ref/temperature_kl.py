"""The definition of temperature_kl. :func:`kdkernels.temperature_kl` describes the arguments."""

import torch
from torch import Tensor


def temperature_kl(
    student: Tensor,  # [..., C, ...], classes in dimension `dim`
    teacher: Tensor,  # like student
    temperature: float | Tensor = 1.0,  # a tensor broadcasts to the rows; it may keep `dim`, with size 1
    *,
    dim: int = -1,
    direction: str = "forward",
    beta: float = 0.5,
    reduction: str = "batchmean",
    scale_by_t2: bool = True,
    include_entropy: bool = True,
    target_eps: float = 0.0,
    mask: Tensor | None = None,  # [rows], bool
    normalizer: float | Tensor | None = None,
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s, t = student.movedim(dim, -1).to(dtype), teacher.movedim(dim, -1).to(dtype)
    rows = s.shape[:-1]
    temperature = torch.as_tensor(temperature, device=s.device, dtype=dtype)  # without rounding to float32
    if temperature.dim() == s.dim() and temperature.shape[dim] == 1:
        temperature = temperature.squeeze(dim)
    temperature = temperature.expand(rows)
    if mask is not None:  # before any arithmetic, so that NaN in masked rows changes neither value nor gradient
        s, t = (torch.where(mask[..., None], x, 0) for x in (s, t))

    # Excluded classes (-inf) stay excluded at every T: they must not add 0 * inf to T's gradient.
    def log_probabilities(x: Tensor) -> Tensor:
        rows_t = temperature[..., None]
        # Subtract the maximum, because the gradient of T is inaccurate for very low logits.
        largest = x.detach().amax(-1, keepdim=True) if x.shape[-1] else 0
        x = x - torch.where(torch.isfinite(torch.as_tensor(largest)), largest, 0)
        excluded = x / rows_t.detach() == -torch.inf  # -inf, or an overflow such as -finfo.max at T < 1
        return torch.log_softmax(torch.where(excluded, x / rows_t.detach(), torch.where(excluded, 0, x) / rows_t), -1)

    log_s, log_t = log_probabilities(s), log_probabilities(t)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:  # sum p (log p - log q), 0 log 0 = 0
        p = log_p.exp()
        return (p * torch.where(p != 0, log_p - log_q, 0)).sum(-1)  # NaN if p is NaN, also in the gradients

    # KL(p || weight_p p + weight_q q), accurate for every weight.
    def kl_mixture(log_p: Tensor, log_q: Tensor, weight_q: float, weight_p: float) -> Tensor:
        present = log_p > -torch.inf
        z = torch.where(present, log_q - torch.where(present, log_p, 0), 0)  # log q / p
        is_small = z < 1
        log1p_form = torch.log1p(weight_q * torch.expm1(torch.where(is_small, z, 0)))
        log_form = torch.where(is_small, 0, z) + torch.log(weight_q + weight_p * torch.exp(-torch.where(is_small, 1, z)))
        return -(log_p.exp() * torch.where(is_small, log1p_form, log_form)).sum(-1)

    if direction == "reverse" or (direction == "jsd" and beta == 1):
        loss = kl(log_s, log_t)
    elif direction == "jsd" and beta != 0:
        loss = beta * kl_mixture(log_t, log_s, 1 - beta, beta) + (1 - beta) * kl_mixture(log_s, log_t, beta, 1 - beta)
    elif target_eps > 0 or not include_entropy:
        p = log_t.exp() + target_eps
        loss = (p * torch.where(p != 0, (p.log() if include_entropy else 0) - log_s, 0)).sum(-1)
    else:
        loss = kl(log_t, log_s)

    if scale_by_t2:
        loss = loss * temperature**2
    if mask is not None:
        loss = torch.where(mask, loss, 0)
    if reduction == "none":
        return loss
    count: float | Tensor = 1
    if reduction != "sum":
        kept = loss.numel() if mask is None else mask.sum()
        count = torch.as_tensor(kept).clamp(min=1) if normalizer is None else normalizer
    if reduction == "mean":
        count = count * s.shape[-1]
    return loss.sum() / count
