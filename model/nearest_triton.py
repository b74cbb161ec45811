"""The two smallest distances of each row and whose the smallest is, in one pass and without an N x K matrix: for GPUs.

The kernel of `model.nearest`'s screens where Triton runs; what it gives is a screen, never the truth. A program owns
`ROWS` rows and walks over the centroids, `COLUMNS` at a time; each of its columns keeps its own two smallest, which are
compared at the end. So it reads vectors and centroids and writes 12 bytes a row.

Products are on tensor cores: `tf32` cuts both factors to 10 bits of fraction, `tf32x3` adds up three such products of a
high and a low part of both (low times low dropped), at a third of the speed and with nearly float32's error.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WIDTH, WARPS = 128, 64, 64, 8  # of a tile, as tried on an H100; WIDTH cuts the dimensions


@triton.jit(do_not_specialize=["n", "k"])  # fewer variants to compile
def _kernel(  # type: ignore[no-untyped-def]  # pointers to the tensors below
    x,
    c,
    square,
    label,
    gap,
    n,
    k,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    best = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    second = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    place = tl.zeros([ROWS, COLUMNS], tl.int32)
    depth = tl.arange(0, WIDTH)
    left = tl.load(x + rows[:, None] * d + depth[None, :], (rows[:, None] < n) & (depth[None, :] < d), 0.0)
    for start in range(0, k, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        right_at = c + columns[None, :] * d
        right = tl.load(right_at + depth[:, None], (columns[None, :] < k) & (depth[:, None] < d), 0.0)
        dots = tl.dot(left, right, input_precision=PRECISION)
        if not WHOLE:
            for low in range(WIDTH, d, WIDTH):
                deep = low + depth
                more = tl.load(x + rows[:, None] * d + deep[None, :], (rows[:, None] < n) & (deep[None, :] < d), 0.0)
                right = tl.load(right_at + deep[:, None], (columns[None, :] < k) & (deep[:, None] < d), 0.0)
                dots = tl.dot(more, right, dots, input_precision=PRECISION)
        norms = tl.load(square + columns, columns < k, float("inf"))
        scores = norms[None, :] - 2.0 * dots
        second = tl.minimum(second, tl.maximum(best, scores))
        place = tl.where(scores < best, start, place)
        best = tl.minimum(best, scores)
    smallest, column = tl.min(best, 1, return_indices=True)
    is_smallest = tl.arange(0, COLUMNS)[None, :] == column[:, None]
    others = tl.minimum(tl.min(second, 1), tl.min(tl.where(is_smallest, float("inf"), best), 1))
    tl.store(label + rows, (tl.sum(tl.where(is_smallest, place, 0), 1) + column).to(tl.int64), rows < n)
    tl.store(gap + rows, others - smallest, rows < n)


def two_nearest(x_ND: Tensor, centroids_KD: Tensor, precision: Literal["tf32", "tf32x3"]) -> tuple[Tensor, Tensor]:
    """int64 [N]: the probably nearest centroid of each row; float32 [N]: by how much the second one is farther.

    Both are contiguous float32 on one device. A gap may be NaN where distances overflow, and then the label says nothing.
    """
    n, k, d = len(x_ND), len(centroids_KD), x_ND.shape[1]
    label_N = torch.zeros(n, dtype=torch.int64, device=x_ND.device)
    gap_N = torch.zeros(n, device=x_ND.device)
    square_K = (centroids_KD * centroids_KD).sum(1)
    width = min(WIDTH, max(16, triton.next_power_of_2(d)))
    _kernel[(triton.cdiv(n, ROWS),)](
        x_ND,
        centroids_KD,
        square_K,
        label_N,
        gap_N,
        n,
        k,
        d,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        WIDTH=width,
        WHOLE=d <= width,
        PRECISION=precision,
        num_warps=WARPS,
    )
    return label_N, gap_N
