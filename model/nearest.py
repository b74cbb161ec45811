"""The nearest centroid of each row: as fast as float32, and with one answer everywhere.

The truth is the squared distance in float64, its terms added in one fixed order, and the lowest index on exact ties.
Float32 products of matrices (faiss on CPUs, else torch) only screen: their error has a bound, and every row whose second
best lies within it is decided again by the truth, over all centroids within it. So a label depends on the row and the
centroids alone: not on the chunk, the place in the batch, the BLAS, the threads or the device.

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
# Elements of a block of elementwise float64 work. On CPUs it stays in the cache and below the size from which torch
# wakes its threads, whose barriers cost more than the work where cores are shared.
BLOCK = {"cpu": 1 << 14}
WIDE_BLOCK = 1 << 24  # on other devices


def squared_distances(a_PD: Tensor, b_PD: Tensor) -> Tensor:
    """float64 [P]: |a - b|^2 of each pair of rows, by halving: the same bits on every device and in every batch."""
    terms = a_PD.double() - b_PD.double()
    terms = terms * terms
    while (width := terms.shape[1]) > 1:
        half = width // 2
        folded = terms[:, :half] + terms[:, half : 2 * half]
        terms = torch.cat([folded, terms[:, 2 * half :]], 1) if width % 2 else folded
    return terms[:, 0] if terms.shape[1] else terms.new_zeros(len(terms))


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


def assign(x_ND: Tensor, centroids_KD: Tensor, chunk: int = 65_536) -> Tensor:
    """int64 [N]: the nearest centroid of each row by the truth above.

    `x_ND` and `centroids_KD` are finite float32 on one device. `chunk` bounds the rows screened at a time and changes
    no label. Equal centroids: the first has all the rows.
    """
    first_U = first_of_equals(centroids_KD)
    distinct_UD = centroids_KD[first_U].contiguous()
    labels = [first_U[_assign_chunk(x_ND[s].contiguous(), distinct_UD)] for s in blocks(len(x_ND), 1, chunk)]
    return torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64, device=x_ND.device)


def first_of_equals(rows_ND: Tensor) -> Tensor:
    """int64 [U], ascending: the first of each set of equal rows."""
    _, inverse = torch.unique(rows_ND, dim=0, return_inverse=True)
    places = torch.arange(len(rows_ND), device=rows_ND.device)
    first = places.new_full((int(inverse.max()) + 1,), len(rows_ND)).scatter_reduce_(0, inverse, places, "amin")
    return first.sort().values


def _assign_chunk(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    if len(centroids_KD) == 1:
        return torch.zeros(len(x_ND), dtype=torch.int64, device=x_ND.device)
    if faiss is None or x_ND.device.type != "cpu":
        return torch.cat([_assign_block(x_ND[s], centroids_KD) for s in blocks(len(x_ND), len(centroids_KD), SCORES)])
    index = faiss.IndexFlatL2(centroids_KD.shape[1])
    index.add(centroids_KD.numpy())
    near_N2, labels_N2 = index.search(x_ND.numpy(), 2)
    labels = torch.from_numpy(labels_N2[:, 0]).clone()
    gap = torch.from_numpy(near_N2[:, 1] - near_N2[:, 0])
    unsure = (~(gap > margin(x_ND, centroids_KD))).nonzero()[:, 0]  # so written, a NaN is unsure
    for s in blocks(len(unsure), len(centroids_KD), SCORES):
        labels[unsure[s]] = _assign_block(x_ND[unsure[s]], centroids_KD)
    return labels


def _assign_block(x_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """Screens with one matrix product, then decides each row that has several centroids within the margin."""
    with full_precision():
        scores_NK = torch.addmm((centroids_KD * centroids_KD).sum(1), x_ND, centroids_KD.T, alpha=-2)
    best, labels = scores_NK.min(1)
    near_NK = ~(scores_NK > (best + margin(x_ND, centroids_KD))[:, None])
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
