"""Error bounds against the float64 reference.

They follow from the dtype and the length of the sums, not from observed errors.
"""

import torch


def rounding(dtype: torch.dtype) -> float:
    """Return the unit roundoff of dtype."""
    return torch.finfo(dtype).eps / 2


def sum_error(dtype: torch.dtype, length: int, operations: int = 24) -> float:
    """Return the relative error of a sum of `length` terms with `operations` roundings each, summed
    in blocks. It grows with the square root, because the signs of rounding errors are random.
    """
    return rounding(dtype) * (operations + length**0.5 / 4)


def assert_close(
    name: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    rtol: float,
    atol: float = 0.0,
    scale: torch.Tensor | float | None = None,
    truncated=False,
):
    """Check that `actual` is close to `expected`, and has infinities and NaN at the same positions.

    The bound is |actual - expected| <= rtol * max(|expected|, scale) + atol + half a unit of
    actual's dtype. ``truncated`` allows a whole unit of bfloat16: Triton's interpreter truncates
    float32 to bfloat16, while a GPU rounds.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    special = ~torch.isfinite(e)
    assert torch.equal(torch.isnan(a), torch.isnan(e)), f"{name}: NaN in other places"
    assert torch.equal(a[special & ~torch.isnan(e)], e[special & ~torch.isnan(e)]), f"{name}: infinities differ"
    a, e = a[~special], e[~special]
    magnitude = e.abs() if scale is None else torch.maximum(e.abs(), torch.as_tensor(scale, dtype=torch.float64).expand(actual.shape)[~special])
    limit = rtol * magnitude + atol
    if actual.dtype != torch.float64:  # the result is rounded; denormal numbers have a fixed step
        units = 2 if truncated and actual.dtype == torch.bfloat16 else 1
        limit = limit + units * rounding(actual.dtype) * e.abs() + torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    excess = (a - e).abs() - limit
    assert excess.numel() == 0 or excess.max() <= 0, f"{name}: off by {(a - e).abs()[excess.argmax()]:.3e}, allowed {limit[excess.argmax()]:.3e}"
