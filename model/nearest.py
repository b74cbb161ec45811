"""The nearest centroid of each row: as fast as float32, and with one answer everywhere.

The truth is the squared distance in float64, its terms added in one fixed order, and the lowest index on exact ties.
Float32 products of matrices (faiss on CPUs, else torch) only screen: their error has a bound, and every row whose second
best lies within it is decided again by the truth, over all centroids within it. So a label depends on the row and the
centroids alone: not on the chunk, the place in the batch, the BLAS, the threads or the device.

A guess, the label of an earlier pass, makes the screen cheaper and moves no label: one minimum over the other centroids
says whether the guess still wins by more than the bound, and only rows where it does not look for their best.

Bound: a float32 sum of D products errs by at most D u times the sum of their magnitudes, whatever its order (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1), u = 2^-24, so |x|^2 - 2 x.c + |c|^2 errs by at most
(D + 4) u (|x| + |c|)^2; we take twice that and a little more. At K = 256, D = 128 it re-decides about 1 row in 1,000.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

faiss: Any
try:
    import faiss
except ImportError:  # torch alone is a little slower on CPUs
    faiss = None

SCORES = 1 << 25  # elements of a block of the N x K matrix
SCORE_ROWS = {"cpu": 1024}  # on CPUs: fewer cost calls, more leave the cache
# Elements of a block of elementwise float64 work. On CPUs it stays in the cache and below the size from which torch
# wakes its threads, whose barriers cost more than the work where cores are shared.
BLOCK = {"cpu": 1 << 14}
WIDE_BLOCK = 1 << 24  # on other devices


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


def assign(x_ND: Tensor, centroids_KD: Tensor, chunk: int = 65_536, guess_N: Tensor | None = None) -> Tensor:
    """int64 [N]: the nearest centroid of each row by the truth above.

    `x_ND` and `centroids_KD` are finite float32 on one device. Neither `chunk`, which bounds the rows screened at a time,
    nor `guess_N` (int64, labels that are probably right) changes a label. Equal centroids: the first has all the rows.
    """
    first_U, place_K = distinct(centroids_KD)
    distinct_UD = centroids_KD[first_U].contiguous()
    if len(first_U) == 1:
        return first_U.expand(len(x_ND)).clone()
    if guess_N is None:
        labels = [_assign_chunk(x_ND[s].contiguous(), distinct_UD) for s in blocks(len(x_ND), 1, chunk)]
    else:
        places_N = place_K[guess_N]
        labels = [_improve_chunk(x_ND[s], distinct_UD, places_N[s]) for s in blocks(len(x_ND), 1, chunk)]
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


def _assign_chunk(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    if faiss is None or x_ND.device.type != "cpu":
        return torch.cat([_assign_block(x_ND[s], centroids_KD) for s in _score_blocks(x_ND, centroids_KD)])
    index = faiss.IndexFlatL2(centroids_KD.shape[1])
    index.add(centroids_KD.numpy())
    near_N2, labels_N2 = index.search(x_ND.numpy(), 2)
    labels = torch.from_numpy(labels_N2[:, 0]).clone()
    gap = torch.from_numpy(near_N2[:, 1] - near_N2[:, 0])
    unsure = (~(gap > margin(x_ND, centroids_KD))).nonzero()[:, 0]  # so written, a NaN is unsure
    for s in _score_blocks(unsure, centroids_KD):
        labels[unsure[s]] = _assign_block(x_ND[unsure[s]], centroids_KD)
    return labels


def _score_blocks(x_ND: Tensor, centroids_KD: Tensor) -> Iterator[slice]:
    """Slices whose scores stay in the cache of a CPU, or within `SCORES` elsewhere."""
    return blocks(len(x_ND), 1, SCORE_ROWS.get(x_ND.device.type, max(1, SCORES // len(centroids_KD))))


def _scores(x_ND: Tensor, centroids_KD: Tensor, square_K: Tensor) -> Tensor:
    """float32 [N, K]: the squared distances less |x|^2."""
    with full_precision():
        return torch.addmm(square_K, x_ND, centroids_KD.T, alpha=-2)


def _assign_block(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    scores_NK = _scores(x_ND, centroids_KD, (centroids_KD * centroids_KD).sum(1))
    return _settle(x_ND, centroids_KD, scores_NK, margin(x_ND, centroids_KD))


def _improve_chunk(x_ND: Tensor, centroids_KD: Tensor, guess_N: Tensor) -> Tensor:
    """Keeps every guess that beats the second best by more than the margin."""
    labels, margin_N = guess_N.clone(), margin(x_ND, centroids_KD)
    square_K = (centroids_KD * centroids_KD).sum(1)
    for s in _score_blocks(x_ND, centroids_KD):
        guess_B1 = guess_N[s, None]
        scores_BK = _scores(x_ND[s], centroids_KD, square_K)
        own_B1 = scores_BK.gather(1, guess_B1)
        gap = scores_BK.scatter_(1, guess_B1, torch.inf).amin(1) - own_B1[:, 0]
        unsure = (~(gap > margin_N[s])).nonzero()[:, 0]
        if len(unsure):
            again = scores_BK[unsure].scatter_(1, guess_B1[unsure], own_B1[unsure])
            labels[s][unsure] = _settle(x_ND[s][unsure], centroids_KD, again, margin_N[s][unsure])
    return labels


def _settle(x_ND: Tensor, centroids_KD: Tensor, scores_NK: Tensor, margin_N: Tensor) -> Tensor:
    """int64 [N]: the best score, or by the truth where a row has several centroids within the margin."""
    best, labels = scores_NK.min(1)
    near_NK = ~(scores_NK > (best + margin_N)[:, None])
    unsure = (near_NK.sum(1) > 1).nonzero()[:, 0]
    if len(unsure):
        labels[unsure] = _decide(x_ND[unsure], centroids_KD, near_NK[unsure])
    return labels


def margin(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """float32 [N]: a gap of two float32 distances above it has the sign of the true gap."""
    width = x_ND.shape[1]
    reach = x_ND.norm(dim=1) + centroids_KD.norm(dim=1).max()
    return 2 * ((width + 16) * 2.0**-23 * reach * reach + width * 2.0**-120)  # the last: products that underflow


def _decide(x_ND: Tensor, centroids_KD: Tensor, candidates_NK: Tensor) -> Tensor:
    """int64 [N]: the nearest candidate by the truth, the lowest index on ties."""
    row, column = candidates_NK.nonzero(as_tuple=True)
    parts = [squared_distances(x_ND[row[s]], centroids_KD[column[s]]) for s in row_blocks(x_ND, len(row))]
    distance = torch.cat(parts)
    best = distance.new_full((len(x_ND),), torch.inf).scatter_reduce_(0, row, distance, "amin")
    wins = distance == best[row]
    labels = column.new_full((len(x_ND),), len(centroids_KD))
    return labels.scatter_reduce_(0, row[wins], column[wins], "amin")


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in true float32: TF32 or bfloat16, where someone allowed them, would break the bound."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
