"""The nearest centroid of each row: as fast as float32, and with one answer everywhere.

The truth is the squared distance in float64, its terms added in one fixed order, and the lowest index on exact ties.
Float32 products of matrices (a Triton kernel on GPUs, elsewhere tiles that stay in the cache) only screen: their error has
a bound, and every row whose second best lies within it is decided again by the truth, over all centroids within it. So a
label depends on the row and the centroids alone: not on the chunk, the place in the batch, the BLAS, the threads or the
device.

A guess, the label of an earlier pass, makes the screen cheaper and moves no label: a tile's plain minimum says whether the
guess still wins there by more than the bound, and only rows where it does not look for the place of their best.

Bound: a float32 sum of D products errs by at most D u times the sum of their magnitudes, whatever its order (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1), u = 2^-24, so |x|^2 - 2 x.c + |c|^2 errs by at most
(D + 4) u (|x| + |c|)^2; we take twice that and a little more. At K = 256, D = 128 it re-decides about 1 row in 1,000.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

fused: Any = None
if torch.cuda.is_available():  # Triton takes most of a second to import
    with suppress(ImportError):  # torch alone writes distances to memory and reads them again
        from model import nearest_triton as fused

SCORES = 1 << 25  # elements of a block of the N x K matrix
TILE = {"cpu": (2048, 256)}  # rows and centroids whose scores stay in the cache
WIDE_TILE = (1 << 16, 512)  # on other devices
# Elements of a block of elementwise float64 work. On CPUs it stays in the cache and below the size from which torch
# wakes its threads, whose barriers cost more than the work where cores are shared.
BLOCK = {"cpu": (1 << 15) - 1}
WIDE_BLOCK = 1 << 24  # on other devices
FUSED_ROWS = 1 << 21  # of one start of the fused kernel
# The fused kernel's precisions, rough to fine, as arguments of `margin`. Tensor cores cut, rather than round, each sum of 8
# products (Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021), and the factors at 2^-10 (tf32) or at
# 2^-20 (tf32x3) of themselves, which moves 2 x.c by at most 4 times that of |x||c| <= (|x| + |c|)^2 / 4.
FUSED_ERRORS = {"tf32": (8.0, 2.0**-9), "tf32x3": (8.0, 2.0**-19)}


def squared_distances(a_PD: Tensor, b_PD: Tensor) -> Tensor:
    """float64 [P]: |a - b|^2 of each pair of rows, the same bits on every device and in every batch."""
    terms = a_PD.double() - b_PD.double()
    return fixed_sum(terms * terms)


def fixed_sum(terms_PD: Tensor) -> Tensor:
    """[P]: the sum of each row by halving, an order that no device, batch or number of threads changes."""
    while (width := terms_PD.shape[1]) > 1:
        half = width // 2
        folded = terms_PD[:, :half] + terms_PD[:, half : 2 * half]
        terms_PD = torch.cat([folded, terms_PD[:, 2 * half :]], 1) if width % 2 else folded
    return terms_PD[:, 0] if terms_PD.shape[1] else terms_PD.new_zeros(len(terms_PD))


def row_blocks(x_ND: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Slices of the rows of `x_ND`, or of as many `rows` of its width, for elementwise work."""
    return blocks(len(x_ND) if rows is None else rows, x_ND.shape[1], BLOCK.get(x_ND.device.type, WIDE_BLOCK))


def blocks(rows: int, width: int, elements: int) -> Iterator[slice]:
    """Slices of `rows` whose rows times `width` stay within `elements`, at least one row each."""
    step = max(1, elements // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def label_distances(x_ND: Tensor, centroids_KD: Tensor, labels_N: Tensor) -> Tensor:
    """float64 [N]: each row's squared distance to the centroid of its label."""
    parts = [squared_distances(x_ND[s], centroids_KD.index_select(0, labels_N[s])) for s in row_blocks(x_ND)]
    return torch.cat(parts) if parts else x_ND.new_zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class Guess:
    """What an earlier pass knows of the rows."""

    labels_N: Tensor  # int64, probably right
    norm_N: Tensor  # float32, of the rows


def assign(x_ND: Tensor, centroids_KD: Tensor, chunk: int = 65_536, guess: Guess | None = None) -> Tensor:
    """int64 [N]: the nearest centroid of each row by the truth above.

    `x_ND` and `centroids_KD` are finite float32 on one device. Neither `chunk`, which bounds the rows screened at a time,
    nor `guess` changes a label. Equal centroids: the first has all the rows.
    """
    first_U, place_K = distinct(centroids_KD)
    if len(first_U) == 1:
        return first_U.expand(len(x_ND)).clone()
    distinct_UD = centroids_KD[first_U].contiguous()
    if fused is not None and x_ND.is_cuda:  # has no use for a guess, and wants many rows
        parts = blocks(len(x_ND), 1, max(chunk, FUSED_ROWS))
        labels = [_screen_fused(x_ND[s].contiguous(), distinct_UD, list(FUSED_ERRORS)) for s in parts]
    elif guess is None:
        labels = [_screen(x_ND[s], distinct_UD, x_ND[s].norm(dim=1)) for s in blocks(len(x_ND), 1, chunk)]
    else:
        places_N, norm_N = place_K[guess.labels_N], guess.norm_N
        labels = [_screen(x_ND[s], distinct_UD, norm_N[s], places_N[s]) for s in blocks(len(x_ND), 1, chunk)]
    return first_U[torch.cat(labels)] if labels else torch.empty(0, dtype=torch.int64, device=x_ND.device)


def distinct(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [U], ascending: the first of each set of equal rows; and int64 [N]: the place of each row's first in it."""
    places_N = torch.arange(len(rows_ND), device=rows_ND.device)
    if len(torch.unique(_row_hash(rows_ND))) == len(rows_ND):
        return places_N, places_N
    _, set_N = torch.unique(rows_ND, dim=0, return_inverse=True)
    first_S = places_N.new_full((int(set_N.max()) + 1,), len(rows_ND)).scatter_reduce_(0, set_N, places_N, "amin")
    first_U, order = first_S.sort()
    return first_U, order.argsort()[set_N]


def _row_hash(rows_ND: Tensor) -> Tensor:
    """int64 [N]: equal for equal rows, and seldom otherwise; far cheaper than an order of the rows."""
    bits = (rows_ND + 0.0).contiguous().view(torch.int32).long()  # the sum makes negative zeros positive
    odd = 2 * torch.arange(1, rows_ND.shape[1] + 1, device=rows_ND.device) + 1
    mixed = (bits ^ (bits << 21)) * (odd * -7046029254386353131)
    return (mixed ^ (mixed >> 29)).sum(1)


def rows_nearer(x_ND: Tensor, centroids_KD: Tensor, distance_N: Tensor) -> Tensor:
    """int64: every row to which a centroid is nearer than its squared distance (float64 [N]), and few others."""
    norm_N, nearest_N = x_ND.norm(dim=1), x_ND.new_full((len(x_ND),), torch.inf)
    for rows, _, scores_BT in _tiles(x_ND, centroids_KD):
        nearest_N[rows] = torch.minimum(nearest_N[rows], scores_BT.amin(1))
    squared_N = nearest_N.double() + norm_N.double() ** 2
    return (~(squared_N - margin(norm_N, centroids_KD) > distance_N)).nonzero()[:, 0]


def screen_scores(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """float32 [N, K]: |c|^2 - 2 x.c, by which centroids are told apart where `margin` says so."""
    with full_precision():
        return torch.addmm((centroids_KD * centroids_KD).sum(1), x_ND, centroids_KD.T, alpha=-2)


def _tiles(x_ND: Tensor, centroids_KD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """`screen_scores` of some rows and some centroids, [B, T], all centroids of the same rows in a row. The next tile
    overwrites it."""
    tile_rows, tile_codes = TILE.get(x_ND.device.type, WIDE_TILE)
    square_K = (centroids_KD * centroids_KD).sum(1)
    room = x_ND.new_empty(min(tile_rows, len(x_ND)) * min(tile_codes, len(centroids_KD)))
    with full_precision():
        for rows in blocks(len(x_ND), 1, tile_rows):
            for codes in blocks(len(centroids_KD), 1, tile_codes):
                shape = (rows.stop - rows.start, codes.stop - codes.start)
                scores_BT = room[: shape[0] * shape[1]].view(shape)
                torch.addmm(square_K[codes], x_ND[rows], centroids_KD[codes].T, alpha=-2, out=scores_BT)
                yield rows, codes, scores_BT


def _screen(x_ND: Tensor, centroids_KD: Tensor, norm_N: Tensor, guess_N: Tensor | None = None) -> Tensor:
    """int64 [N]: the labels; `guess_N` are probably right ones."""
    margin_N = margin(norm_N, centroids_KD)
    second_N = torch.full_like(norm_N, torch.inf)  # the best score but that of the label
    best_N = second_N.clone()
    label_N = torch.zeros(len(x_ND), dtype=torch.int64, device=x_ND.device) if guess_N is None else guess_N.clone()
    one_tile = len(centroids_KD) <= TILE.get(x_ND.device.type, WIDE_TILE)[1]
    if guess_N is not None and not one_tile:
        best_N = _own_scores(x_ND, centroids_KD, guess_N)
    for rows, codes, scores_BT in _tiles(x_ND, centroids_KD):
        label_B, best_B, second_B = label_N[rows], best_N[rows], second_N[rows]
        if guess_N is not None and one_tile:
            guess_B1 = guess_N[rows, None]
            best_B.copy_(scores_BT.gather(1, guess_B1)[:, 0])
            scores_BT.scatter_(1, guess_B1, torch.inf)
        elif guess_N is not None:  # has its score already
            place_B = guess_N[rows] - codes.start
            here = ((place_B >= 0) & (place_B < scores_BT.shape[1])).nonzero()[:, 0]
            scores_BT.view(-1).index_fill_(0, here * scores_BT.shape[1] + place_B[here], torch.inf)
        near = (~(scores_BT.amin(1) > best_B + margin_N[rows])).nonzero()[:, 0]  # so written, a NaN is near
        if len(near) == 0:
            continue
        scores_MT = scores_BT if len(near) == len(scores_BT) else scores_BT.index_select(0, near)
        found_M, column_M = scores_MT.min(1)
        runner_up_M = scores_MT.scatter_(1, column_M[:, None], torch.inf).amin(1)
        before_M = best_B[near]
        second_B[near] = torch.minimum(torch.minimum(second_B[near], runner_up_M), torch.maximum(before_M, found_M))
        label_B[near] = torch.where(found_M < before_M, column_M + codes.start, label_B[near])
        best_B[near] = torch.minimum(before_M, found_M)
    unsure = (~(second_N - best_N > margin_N)).nonzero()[:, 0]
    if len(unsure):
        label_N[unsure] = _decide(x_ND[unsure], centroids_KD)
    return label_N


def _own_scores(x_ND: Tensor, centroids_KD: Tensor, labels_N: Tensor) -> Tensor:
    """float32 [N]: the score of each row's label."""
    square_K = (centroids_KD * centroids_KD).sum(1)
    parts = [(x_ND[s] * centroids_KD.index_select(0, labels_N[s])).sum(1) for s in row_blocks(x_ND)]
    return square_K[labels_N] - 2 * torch.cat(parts)


def _screen_fused(x_ND: Tensor, centroids_KD: Tensor, precisions: list[str]) -> Tensor:
    """Labels by the first of `precisions`; rows whose two nearest it cannot tell apart go to the next."""
    label_N, gap_N = fused.two_nearest(x_ND, centroids_KD, precisions[0])
    margin_N = margin(x_ND.norm(dim=1), centroids_KD, *FUSED_ERRORS[precisions[0]])
    unsure = (~(gap_N > margin_N)).nonzero()[:, 0]  # so written, a NaN is unsure
    if len(unsure):
        rows_UD = x_ND[unsure]
        finer = precisions[1:]
        label_N[unsure] = _screen_fused(rows_UD, centroids_KD, finer) if finer else _decide(rows_UD, centroids_KD)
    return label_N


def _decide(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """int64 [N]: labels by the truth, over the centroids within the margin of a row's best score."""
    margin_N, row, column = margin(x_ND.norm(dim=1), centroids_KD), [], []
    for s in blocks(len(x_ND), len(centroids_KD), SCORES):
        scores_BK = screen_scores(x_ND[s], centroids_KD)
        near_B, near_K = (~(scores_BK > (scores_BK.amin(1) + margin_N[s])[:, None])).nonzero(as_tuple=True)
        row.append(near_B + s.start)
        column.append(near_K)
    return _best_of(x_ND, centroids_KD, torch.cat(row), torch.cat(column))


def margin(norm_N: Tensor, centroids_KD: Tensor, wider: float = 1.0, cut: float = 0.0) -> Tensor:
    """float32 [N]: a gap of two float32 distances above it has the sign of the true gap, for rows of these norms; with
    `wider` and `cut`, of distances that err so many times more and, in proportion, by the cut of their factors."""
    width = centroids_KD.shape[1]
    reach = norm_N + centroids_KD.norm(dim=1).max()
    relative = wider * (width + 16) * 2.0**-23 + cut
    return 2 * (relative * reach * reach + wider * width * 2.0**-120)  # the last: products that underflow


def _best_of(x_ND: Tensor, centroids_KD: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """int64 [N]: of the centroids paired with each row the nearest by the truth, the lowest on ties."""
    parts = [squared_distances(x_ND[row[s]], centroids_KD[column[s]]) for s in row_blocks(x_ND, len(row))]
    distance = torch.cat(parts)
    best = distance.new_full((len(x_ND),), torch.inf).scatter_reduce_(0, row, distance, "amin")
    wins = distance == best[row]
    labels_N = row.new_full((len(x_ND),), len(centroids_KD))
    return labels_N.scatter_reduce_(0, row[wins], column[wins], "amin")


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in true float32: TF32 or bfloat16, where someone allowed them, would break the bound."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
