"""Reading and writing rows of logits, for the kernels of temperature_kl.

A program processes a tile of rows, block by block along their classes. Row i of a tensor starts at
(i // inner_size) * outer_stride + (i % inner_size) * inner_stride, so the classes may be in any
dimension. A row that fits one block is read once and kept in registers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor viewed as rows of classes [rows, C], as an argument of the kernels."""

    pointer: tl.tensor
    outer_stride: tl.tensor
    inner_stride: tl.tensor
    class_stride: tl.tensor


class Tile(NamedTuple):
    """The rows of one program, of the base and the other network."""

    base: tl.tensor  # [ROWS, 1] pointers to the first class
    other: tl.tensor
    base_stride: tl.tensor  # from one class to the next
    other_stride: tl.tensor
    kept: tl.tensor  # [ROWS, 1] false for rows that are masked out or past the end; they are read as zeros
    classes: tl.tensor
    quarter_t: tl.tensor  # [ROWS, 1] T / 4: see read_logits
    inverse_t: tl.tensor  # [ROWS, 1] 4 / T


@triton.jit
def aligned(number, ALIGN: tl.constexpr):
    """Return a number that is a multiple of ALIGN, such that the compiler knows it."""
    return number // ALIGN * ALIGN


@triton.jit
def aligned_rows(rows, ALIGN: tl.constexpr):
    """Return Rows such that the compiler knows that all rows start at multiples of ALIGN.

    See alignment_of_rows.
    """
    return Rows(rows.pointer, aligned(rows.outer_stride, ALIGN), aligned(rows.inner_stride, ALIGN), rows.class_stride)


@triton.jit
def row_offset(rows, row, inner_size):
    """Return the offset of the first class of a row, or of rows [ROWS]."""
    return row // inner_size * rows.outer_stride + row % inner_size * rows.inner_stride


@triton.jit
def row_pointers(rows, row, inner_size):
    """Return pointers [ROWS, 1] to the first class of rows [ROWS]."""
    return rows.pointer + row_offset(rows, row, inner_size)[:, None]


@triton.jit
def tile_pointers(rows, first, inner_size, ROWS: tl.constexpr, ONE_STRIDE: tl.constexpr):
    """Return pointers [ROWS, 1] to the first class of ROWS rows from `first`.

    ONE_STRIDE: inner_size is a multiple of ROWS, so that all rows of a tile have the same outer
    index. One division then suffices for the tile.
    """
    index = tl.arange(0, ROWS)
    if ONE_STRIDE:
        return rows.pointer + row_offset(rows, first, inner_size) + (index * rows.inner_stride)[:, None]
    else:
        return row_pointers(rows, first + index, inner_size)


@triton.jit
def columns(start, BLOCK: tl.constexpr):
    """Return the class indices [1, BLOCK] of the block that begins at `start`."""
    return start + tl.arange(0, BLOCK)[None, :].to(tl.int64)


@triton.jit
def read_logits(tile, start, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Read the logits [ROWS, BLOCK] of both networks, divided by 4.

    The difference of two differences of finite logits may be four times the largest finite number.
    With quarters of the logits it stays in range.
    """
    column = columns(start, BLOCK)
    present = tile.kept & (column < tile.classes)
    base = tl.load(tile.base + column * tile.base_stride, mask=present, other=0.0).to(COMPUTE)
    other = tl.load(tile.other + column * tile.other_stride, mask=present, other=0.0).to(COMPUTE)
    return base * 0.25, other * 0.25


@triton.jit
def block_logits(tile, held, start, COMPUTE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Return a quarter of the logits of both networks in a block, and which columns are classes.

    If a row has one block, `held` contains its logits, and nothing is read.
    """
    if ONE_BLOCK:
        base, other = held
    else:
        base, other = read_logits(tile, start, COMPUTE, BLOCK)
    return base, other, columns(start, BLOCK) < tile.classes


@triton.jit
def store_gradient(gradients, row, inner_size, column, gradient, kept, written):
    """Write a gradient [ROWS, BLOCK], with zeros for rows that are masked out."""
    pointer = row_pointers(gradients, row, inner_size) + column * gradients.class_stride
    tl.store(pointer, tl.where(kept, gradient, 0.0).to(gradients.pointer.dtype.element_ty), mask=written)


@triton.jit
def powers_of_two(largest):
    """Return 2^n in float32, and 2^-n, such that largest * 2^-n lies in [2^14, 2^15).

    This is close to the upper end of the range of float16. n is 0 for 0, infinity and NaN.
    """
    bits = largest.to(tl.float32).to(tl.int32, bitcast=True)
    n = tl.minimum(tl.maximum(((bits >> 23) & 0xFF) - (127 + 14), -126), 126)
    n = tl.where((largest > 0.0) & (largest < float("inf")), n, 0)
    return ((n + 127) << 23).to(tl.float32, bitcast=True), ((127 - n) << 23).to(tl.float32, bitcast=True).to(largest.dtype)


def row_shape(x: Tensor, dim: int) -> tuple[int, ...]:
    """Return the shape of a tensor with one element per row: that of x without dimension `dim`."""
    dim %= x.dim()
    return tuple(x.shape[:dim] + x.shape[dim + 1 :])


def alignment_of_rows(rows: list[Rows | None], classes: int) -> int:
    """Return a power of two that divides the distances between rows, and the number of classes.

    The compiler must know it to load several elements at once, up to 8, which have 128 bits or
    more. Triton itself marks aligned pointers, and strides and sizes that are multiples of 16; rows
    of 1000 classes are multiples of 8 only. The result is 1 if nothing must be added to what Triton
    knows, or if the classes are not adjacent in memory, because consecutive elements then belong to
    different rows.
    """
    present = [r for r in rows if r is not None]
    if any(r.class_stride != 1 for r in present):
        return 1
    alignment = math.gcd(16, classes, *(stride for r in present for stride in (r.outer_stride, r.inner_stride)))
    return 1 if alignment == 16 else alignment


def as_rows(tensors: list[Tensor | None], dim: int) -> tuple[int, list[Rows | None]] | None:
    """View tensors of one shape as Rows, with the classes in dimension `dim` and one inner size.

    The other dimensions are merged if their strides allow it in every tensor.

    Returns:
        (inner size, rows), or None if the rows of a tensor need more than two strides.
    """
    present = [x for x in tensors if x is not None]
    shape, dim = present[0].shape, dim % present[0].dim()
    groups: list[list[int]] = []  # merged dimensions, from the outermost
    for d in (d for d in range(len(shape)) if d != dim and shape[d] != 1):
        if groups and all(x.stride(groups[-1][-1]) == x.stride(d) * x.shape[d] for x in present):
            groups[-1].append(d)
        else:
            groups.append([d])
    if len(groups) > 2:
        return None
    inner_size = math.prod(shape[d] for d in groups[-1]) if groups else 1

    def rows_of(x: Tensor) -> Rows:
        outer = x.stride(groups[0][-1]) if len(groups) == 2 else 0
        return Rows(x, outer, x.stride(groups[-1][-1]) if groups else 0, x.stride(dim))

    return inner_size, [None if x is None else rows_of(x) for x in tensors]
