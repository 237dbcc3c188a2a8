"""Lanes as curves: points at fixed rows from probability maps, and drawing with a given width.

A curve is a row of ``columns`` [..., R]: its column at each of R fixed rows, and NaN at rows where
the lane has no point. Rows and columns are indices of pixels; the centre of a pixel has integer
coordinates.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class LaneMaps:
    """Predicted or labelled lanes of a batch.

    Several metrics use the same curves, so curves that have been extracted are kept.
    """

    probability: Tensor  # [B, L, H, W] in [0, 1]: of each lane, without the background
    exists: Tensor | None  # [B, L] bool; None: not known
    classes: Tensor  # [B, H, W] int64: 0 for the background, 1 to L for the lanes
    _curves: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    def curves(self, rows: list[int], threshold: float = 0.3) -> Tensor:  # [B, L, R]
        """Return the curves of :func:`extract_columns`."""
        key = (*rows, threshold)
        if key not in self._curves:
            self._curves[key] = extract_columns(self.probability, rows, self.exists, threshold)
        return self._curves[key]


def culane_rows(height: int) -> list[int]:
    """Return the 18 rows of CULane's post-processing, from the bottom to the top.

    They are 20 pixels apart in an image of height 590 (SCNN's ``getLane``). Rows that coincide in a
    smaller image are returned once.
    """
    rows = [height - 1 - round(i * 20 * height / 590) for i in range(18)]
    return list(dict.fromkeys(row for row in rows if row >= 0))


def tusimple_rows(height: int) -> list[int]:
    """Return the rows of TuSimple's labels: 160, 170, ..., 710 in an image of height 720.

    Rows that coincide in a smaller image are returned once.
    """
    rows = [round(y * height / 720) for y in range(160, 720, 10)]
    return list(dict.fromkeys(row for row in rows if row < height))


def extract_columns(
    probability: Tensor,  # [B, L, H, W]
    rows: list[int],  # R row indices
    exists: Tensor | None = None,  # [B, L] bool
    threshold: float = 0.3,
) -> Tensor:  # [B, L, R], NaN where a lane has no point
    """Extract curves from probability maps as CULane's post-processing does.

    At each row, a lane has a point at the column of its largest probability if this is above the
    threshold. If several columns have exactly the largest probability, as in a label map, the point
    is at their mean. A lane with fewer than two points, or that does not exist, has no points.
    """
    values = probability[:, :, rows]  # [B, L, R, W]
    largest = values.amax(3, keepdim=True)
    at_largest = (values == largest).float()
    position = torch.arange(values.shape[3], device=values.device, dtype=torch.float32)
    columns = (at_largest * position).sum(3) / at_largest.sum(3)
    is_point = largest[..., 0] > threshold
    is_lane = is_point.sum(2) >= 2
    if exists is not None:
        is_lane = is_lane & exists
    return torch.where(is_point & is_lane[..., None], columns, math.nan)


def fill_gaps(columns: Tensor, rows: list[int]) -> Tensor:  # [N, R] -> [N, R]
    """Replace NaN between two points of a curve by linear interpolation over the rows."""
    y = torch.tensor(rows, device=columns.device, dtype=columns.dtype)
    count = len(rows)
    index = torch.arange(count, device=columns.device).expand_as(columns)
    known = ~columns.isnan()
    before = torch.where(known, index, -1).cummax(1).values
    after = torch.where(known, index, count).flip(1).cummin(1).values.flip(1)
    inside = (before >= 0) & (after < count)
    before, after = before.clamp(min=0), after.clamp(max=count - 1)
    x0, x1, y0, y1 = columns.gather(1, before), columns.gather(1, after), y[before], y[after]
    share = torch.where(y1 == y0, 0, (y - y0) / torch.where(y1 == y0, 1, y1 - y0))
    return torch.where(inside, x0 + share * (x1 - x0), math.nan)


def draw_lanes(
    columns: Tensor,  # [N, R], NaN where a lane has no point
    rows: list[int],  # R row indices, in ascending or descending order
    height: int,
    width: int,
    line_width: float,
) -> Tensor:  # [N, height, width] bool
    """Draw each curve as a polyline through its points.

    A pixel belongs to a line if the distance of its centre from a segment is at most half of
    ``line_width``. Points with absent rows between them are connected too. A lane with one point is
    not drawn.
    """
    columns = fill_gaps(columns.float(), rows)
    mask = torch.zeros(len(columns), height, width, dtype=torch.bool, device=columns.device)
    x = torch.arange(width, device=columns.device, dtype=torch.float32)
    half = line_width / 2
    for i, (first, second) in enumerate(itertools.pairwise(rows)):
        top = max(0, math.ceil(min(first, second) - half))
        bottom = min(height, math.floor(max(first, second) + half) + 1)
        y = torch.arange(top, bottom, device=columns.device, dtype=torch.float32)[:, None] - first
        dy = float(second - first)
        dx = (columns[:, i + 1] - columns[:, i])[:, None, None]
        from_first = x - columns[:, i, None, None]  # [N, 1, W]
        # Position of the nearest point of the segment, from 0 to 1. It is NaN if an end is absent,
        # and comparisons with NaN are false.
        along = ((from_first * dx + y * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        distance = (from_first - along * dx).square() + (y - along * dy).square()
        mask[:, top:bottom] |= distance <= half * half
    return mask
