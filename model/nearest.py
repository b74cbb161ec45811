"""The nearest centroid of each row: as fast as float32, and with one answer everywhere.

The truth is the squared distance in float64, its terms added in one fixed order, and the lowest index on exact ties.
Float32 products of matrices (faiss on CPUs, a Triton kernel on GPUs, else torch) only screen: their error has a bound, and
every row whose second best lies within it is decided again by the truth, over all centroids within it. So a label depends
on the row and the centroids alone: not on the chunk, the place in the batch, the BLAS, the threads or the device.

A guess, the label of an earlier pass, makes the screen cheaper and moves no label: one minimum over the other centroids
says whether the guess still wins by more than the bound, and only rows where it does not look for their best.

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

faiss: Any
try:
    import faiss
except ImportError:  # torch alone is a little slower on CPUs
    faiss = None
fused: Any = None
if torch.cuda.is_available():  # Triton takes most of a second to import
    with suppress(ImportError):  # torch alone writes distances to memory and reads them again
        from model import nearest_triton as fused

SCORES = 1 << 25  # elements of a block of the N x K matrix
SCORE_ROWS = {"cpu": 1024}  # on CPUs: fewer cost calls, more leave the cache
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
    if _fused(x_ND):  # has no use for a guess, and wants many rows
        labels = [_screen(x_ND[s].contiguous(), distinct_UD) for s in blocks(len(x_ND), 1, max(chunk, FUSED_ROWS))]
    elif guess is None:
        labels = [_screen(x_ND[s].contiguous(), distinct_UD) for s in blocks(len(x_ND), 1, chunk)]
    else:
        places_N, norm_N = place_K[guess.labels_N], guess.norm_N
        labels = [_improve(x_ND[s], distinct_UD, places_N[s], norm_N[s]) for s in blocks(len(x_ND), 1, chunk)]
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


def _improve(x_ND: Tensor, centroids_KD: Tensor, guess_N: Tensor, norm_N: Tensor) -> Tensor:
    """Keeps every guess that beats the second best by more than the margin; the other rows are screened."""
    margin_N, square_K = margin(norm_N, centroids_KD), (centroids_KD * centroids_KD).sum(1)
    unsure = []
    room: Tensor | None = None
    with full_precision():
        for s in _score_blocks(len(x_ND), centroids_KD):
            room = torch.empty(s.stop - s.start, len(centroids_KD), device=x_ND.device) if room is None else room
            scores_BK = torch.addmm(square_K, x_ND[s], centroids_KD.T, alpha=-2, out=room[: s.stop - s.start])
            guess_B1 = guess_N[s, None]
            own_B = scores_BK.gather(1, guess_B1)[:, 0]
            gap = scores_BK.scatter_(1, guess_B1, torch.inf).amin(1) - own_B
            unsure.append(~(gap > margin_N[s]))  # so written, a NaN is unsure
    again = torch.cat(unsure).nonzero()[:, 0]
    labels = guess_N.clone()
    if len(again):
        labels[again] = _screen(x_ND[again], centroids_KD)
    return labels


def rows_nearer(x_ND: Tensor, centroids_KD: Tensor, distance_N: Tensor) -> Tensor:
    """int64: every row to which a centroid is nearer than its squared distance (float64 [N]), and few others."""
    norm_N, square_K = x_ND.norm(dim=1), (centroids_KD * centroids_KD).sum(1)
    with full_precision():
        parts = [
            torch.addmm(square_K, x_ND[s], centroids_KD.T, alpha=-2).amin(1) for s in _score_blocks(len(x_ND), centroids_KD)
        ]
    nearest_N = torch.cat(parts).double() + norm_N.double() ** 2
    return (~(nearest_N - margin(norm_N, centroids_KD) > distance_N)).nonzero()[:, 0]


def _screen(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """int64 [N]: labels of rows of which nothing is known."""
    if _fused(x_ND):
        return _screen_by(x_ND, centroids_KD, list(FUSED_ERRORS))
    if faiss is None or x_ND.device.type != "cpu":
        return _screen_by_products(x_ND, centroids_KD)
    return _screen_by(x_ND, centroids_KD, ["faiss"])


def _screen_by(x_ND: Tensor, centroids_KD: Tensor, screens: list[str]) -> Tensor:
    """Labels by the first of `screens`; rows whose two nearest it cannot tell apart go to the next, at last to products."""
    if not screens:
        return _screen_by_products(x_ND, centroids_KD)
    if screens[0] == "faiss":
        index = faiss.IndexFlatL2(centroids_KD.shape[1])
        index.add(centroids_KD.numpy())
        near_N2, labels_N2 = index.search(x_ND.numpy(), 2)
        labels_N, gap_N = torch.from_numpy(labels_N2[:, 0]).clone(), torch.from_numpy(near_N2[:, 1] - near_N2[:, 0])
    else:
        labels_N, gap_N = fused.two_nearest(x_ND, centroids_KD, screens[0])
    allowed_N = margin(x_ND.norm(dim=1), centroids_KD, *FUSED_ERRORS.get(screens[0], ()))
    unsure = (~(gap_N > allowed_N)).nonzero()[:, 0]  # so written, a NaN is unsure
    if len(unsure):
        labels_N[unsure] = _screen_by(x_ND[unsure], centroids_KD, screens[1:])
    return labels_N


def _fused(x_ND: Tensor) -> bool:
    return fused is not None and x_ND.is_cuda


def _screen_by_products(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """Screens with products of matrices, then decides each row that has several centroids within the margin."""
    margin_N, square_K = margin(x_ND.norm(dim=1), centroids_KD), (centroids_KD * centroids_KD).sum(1)
    labels, rows, columns = [], [], []
    for s in _score_blocks(len(x_ND), centroids_KD):
        with full_precision():
            scores_BK = torch.addmm(square_K, x_ND[s], centroids_KD.T, alpha=-2)
        best_B, label_B = scores_BK.min(1)
        row, column = (~(scores_BK > (best_B + margin_N[s])[:, None])).nonzero(as_tuple=True)
        several = (torch.bincount(row, minlength=len(label_B)) > 1)[row]
        labels.append(label_B)
        rows.append(row[several] + s.start)
        columns.append(column[several])
    return _decide(x_ND, centroids_KD, torch.cat(labels), torch.cat(rows), torch.cat(columns))


def _score_blocks(rows: int, centroids_KD: Tensor) -> Iterator[slice]:
    """Slices whose scores stay in the cache of a CPU, or within `SCORES` elsewhere."""
    return blocks(rows, 1, SCORE_ROWS.get(centroids_KD.device.type, max(1, SCORES // len(centroids_KD))))


def margin(norm_N: Tensor, centroids_KD: Tensor, wider: float = 1.0, cut: float = 0.0) -> Tensor:
    """float32 [N]: a gap of two float32 distances above it has the sign of the true gap, for rows of these norms; with
    `wider` and `cut`, of distances that err so many times more and, in proportion, by the cut of their factors."""
    width = centroids_KD.shape[1]
    reach = norm_N + centroids_KD.norm(dim=1).max()
    relative = wider * (width + 16) * 2.0**-23 + cut
    return 2 * (relative * reach * reach + wider * width * 2.0**-120)  # the last: products that underflow


def _decide(x_ND: Tensor, centroids_KD: Tensor, labels_N: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Labels, those of the rows in the pairs (row, column) by the truth: the nearest candidate, the lowest on ties."""
    if len(row) == 0:
        return labels_N
    parts = [squared_distances(x_ND[row[s]], centroids_KD[column[s]]) for s in row_blocks(x_ND, len(row))]
    distance = torch.cat(parts)
    best = distance.new_full((len(x_ND),), torch.inf).scatter_reduce_(0, row, distance, "amin")
    wins = distance == best[row]
    labels_N[row] = len(centroids_KD)
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
