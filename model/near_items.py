"""The K nearest items of a vector: QARM's VQ code, whose codebook is the items themselves.

`nearest_items` is exact, with one answer everywhere: the truth and its float32 screen are those of `model.nearest`, and
of items at the same distance the first comes first. Work: rows x items x width, by products of matrices. `listed_items`
looks only at the items in some lists (faiss, inverted file) and then orders what it found by the same truth: for
catalogues where the product is too much.

Shapes: N rows, M items, U of them that can be anyone's nearest, P pairs of a row and an item, D width.
"""

from __future__ import annotations

import faiss
import torch
from torch import Tensor

from model.nearest import SCORES, blocks, distinct, margin, row_blocks, screen_scores, squared_distances


def nearest_items(x_ND: Tensor, items_MD: Tensor, k: int, own_N: Tensor) -> Tensor:
    """int64 [N, k]: the places of the nearest items, nearest first, equally near ones by place; -1 where there are no more.

    `x_ND` and `items_MD` are finite float32 on one device; `own_N` int64 is the place that a row must not get, or -1.
    """
    kept_U = first_few_of_equals(items_MD, k + 1)
    items_UD, own_N = items_MD[kept_U].contiguous(), places_in(own_N, kept_U)
    found_NK = torch.full((len(x_ND), k), -1, dtype=torch.int64, device=x_ND.device)
    for s in blocks(len(x_ND), len(items_UD), SCORES):
        row, column = _screen(x_ND[s], items_UD, k, own_N[s])
        place_NK = best_of_pairs(x_ND[s], items_UD, row, column, k)
        found_NK[s] = torch.where(place_NK >= 0, kept_U[place_NK.clamp(min=0)], -1)
    return found_NK


def listed_items(x_ND: Tensor, items_MD: Tensor, k: int, own_N: Tensor, centroids_KD: Tensor, probes: int) -> Tensor:
    """As `nearest_items`, of the items in the `probes` lists of centroids nearest to a row; each item is in one list.

    All on the CPU. Rows whose lists hold fewer than `k` items end with -1.
    """
    centroids_KD = centroids_KD[distinct(centroids_KD)[0]].contiguous()
    index = faiss.IndexIVFFlat(_flat(centroids_KD), centroids_KD.shape[1], len(centroids_KD), faiss.METRIC_L2)
    index.train(centroids_KD.numpy())  # finds the lists given, and leaves them
    index.add(items_MD.contiguous().numpy())
    index.nprobe = min(probes, len(centroids_KD))
    found = torch.from_numpy(index.search(x_ND.contiguous().numpy(), k + 1)[1])
    row, slot = ((found >= 0) & (found != own_N[:, None])).nonzero(as_tuple=True)
    column = found[row, slot]
    order = torch.argsort(row * len(items_MD) + column)
    return best_of_pairs(x_ND, items_MD, row[order], column[order], k)


def _flat(rows_ND: Tensor) -> faiss.IndexFlatL2:
    index = faiss.IndexFlatL2(rows_ND.shape[1])
    index.add(rows_ND.numpy())
    return index


def first_few_of_equals(items_MD: Tensor, count: int) -> Tensor:
    """int64 [U], ascending: the first `count` of each set of equal items. The others lie behind `count` nearer places of
    any row, so that a catalogue full of equal vectors costs no more than another."""
    _, group_M = torch.unique(items_MD, dim=0, return_inverse=True)
    order_M = group_M.argsort(stable=True)
    return order_M[_place_in_group(group_M[order_M]) < count].sort().values


def _place_in_group(sorted_P: Tensor) -> Tensor:
    """int64 [P]: how many before it have the same value, of sorted values."""
    return torch.arange(len(sorted_P), device=sorted_P.device) - torch.searchsorted(sorted_P, sorted_P)


def places_in(values_N: Tensor, sorted_U: Tensor) -> Tensor:
    """int64 [N]: the place of each value among sorted distinct ones, -1 where it is not there."""
    place_N = torch.searchsorted(sorted_U, values_N).clamp(max=len(sorted_U) - 1)
    return torch.where(sorted_U[place_N] == values_N, place_N, -1)


def _screen(x_ND: Tensor, items_UD: Tensor, k: int, own_N: Tensor) -> tuple[Tensor, Tensor]:
    """Row and item of every pair that may be among the row's nearest `k`, in order of (row, item)."""
    scores_NU = screen_scores(x_ND, items_UD)
    has_own = (own_N >= 0).nonzero()[:, 0]
    scores_NU[has_own, own_N[has_own]] = torch.inf
    last_N = scores_NU.topk(min(k, len(items_UD)), largest=False).values[:, -1]
    near_NU = ~(scores_NU > (last_N + margin(x_ND.norm(dim=1), items_UD))[:, None])  # so written, a NaN is near
    near_NU[has_own, own_N[has_own]] = False
    row, column = near_NU.nonzero(as_tuple=True)
    return row, column


def best_of_pairs(x_ND: Tensor, items_MD: Tensor, row_P: Tensor, column_P: Tensor, k: int) -> Tensor:
    """int64 [N, k]: of the items paired with each row the nearest `k` by the truth. Pairs come in order of (row, item)."""
    parts = [squared_distances(x_ND[row_P[s]], items_MD[column_P[s]]) for s in row_blocks(x_ND, len(row_P))]
    distance_P = torch.cat([x_ND.new_zeros(0, dtype=torch.float64), *parts])
    order_P = distance_P.argsort(stable=True)
    order_P = order_P[row_P[order_P].argsort(stable=True)]
    place_P = _place_in_group(row_P[order_P])
    found_NK = torch.full((len(x_ND), k), -1, dtype=torch.int64, device=x_ND.device)
    order_P, place_P = order_P[place_P < k], place_P[place_P < k]
    found_NK[row_P[order_P], place_P] = column_P[order_P]
    return found_NK
