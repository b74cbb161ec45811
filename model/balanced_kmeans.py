"""K-means with clusters of equal size: Algorithm 1 of OneRec (arXiv 2502.18965), exactly, over shards of rows.

From given centroids, again and again until no assignment changes: all rows are free; cluster after cluster takes the w
nearest free rows, and their mean is its centroid. The paper leaves open what happens where K does not divide the rows:
here the first N mod K clusters take one more. Rows at equal distance go by item id. It starts from the seeds of
`model.seeding`, and distances, their screen in float32 and the sums are those of `model.nearest` and `model.kmeans`, so
that the outcome depends on the set of rows alone. The greedy order is the paper's: an early cluster takes what a later one
lies nearer to, the last ones take what is left over, and the inertia need not fall from pass to pass.

A pass takes N K / 2 products of D terms and selects K times among up to N rows, so N is limited to `MOST_ROWS`: every rank
holds the rows of all (4 N D bytes) and does the whole work. `model.capped_kmeans` has no such limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kmeans import Clusters, Grid, grid_of, means_of
from model.nearest import blocks, label_distances, margin, row_blocks, screen_scores, squared_distances
from model.reduction import Alone, Reducer
from model.seeding import seed_centroids
from schemas.errors import ContractViolation

MOST_ROWS = 100_000
SCORES = 1 << 22  # distances screened at a time: few enough that rows taken meanwhile cost little


def equal_kmeans(
    x_ND: Tensor, ids_N: Tensor, k: int, *, salt: int = 0, iterations: int = 30, reducer: Reducer | None = None
) -> Clusters:
    """`x_ND` float32 and `ids_N` int64, distinct, of this rank; every cluster has N // k or N // k + 1 of all N rows.

    Ends when no assignment changes, or after `iterations` passes (at least one). Centroids are the means of their own
    rows, and a row may lie nearer to another one. A cluster without a row (N < k) keeps its seed. Raises ContractViolation
    for more than `MOST_ROWS` rows over all ranks, for none, and where a value is not finite.
    """
    reducer = reducer or Alone()
    rows = int(reducer.reduce(torch.tensor([len(x_ND)], device=x_ND.device), "sum"))
    if rows > MOST_ROWS:
        raise ContractViolation(
            f"tokenize.balance equal handles up to {MOST_ROWS:,} items, and table item_embeddings has {rows:,}; "
            "set tokenize.balance to capped, which works at any size."
        )
    grid = grid_of(x_ND, reducer)
    centroids_KD = seed_centroids(x_ND, ids_N, k, salt, reducer)
    all_ids, order = reducer.gather(ids_N).sort()
    all_ND = reducer.gather(x_ND)[order]
    sizes_K = torch.full((k,), rows // k) + (torch.arange(k) < rows % k)
    labels_N, inertia = torch.full_like(all_ids, -1), list[float]()
    for _ in range(max(1, iterations)):
        dealt_N = _deal(all_ND, centroids_KD, sizes_K.tolist())
        if torch.equal(dealt_N, labels_N):
            break
        labels_N = dealt_N
        centroids_KD, counts_K = means(all_ND, labels_N, centroids_KD, grid, Alone())
        inertia.append(inertia_of(all_ND, labels_N, centroids_KD, grid, Alone()))
    return Clusters(centroids_KD, labels_N[torch.searchsorted(all_ids, ids_N)], counts_K, inertia)


def means(x_ND: Tensor, labels_N: Tensor, centroids_KD: Tensor, grid: Grid, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """float32 [K, D] and int64 [K]: means and sizes over all ranks; a cluster without rows keeps its centroid."""
    sums_KD = torch.zeros(centroids_KD.shape, dtype=torch.int64, device=x_ND.device)
    for s in row_blocks(x_ND):
        sums_KD.index_add_(0, labels_N[s], (x_ND[s].double() * grid.coordinate).long())  # cut to the grid
    sums_KD = reducer.reduce(sums_KD, "sum")
    counts_K = reducer.reduce(torch.bincount(labels_N, minlength=len(centroids_KD)), "sum")
    return means_of(sums_KD, counts_K, centroids_KD, grid), counts_K


def inertia_of(x_ND: Tensor, labels_N: Tensor, centroids_KD: Tensor, grid: Grid, reducer: Reducer) -> float:
    """The sum of squared distances to the own centroids over all ranks."""
    total = (label_distances(x_ND, centroids_KD, labels_N) * grid.distance).long().sum().reshape(1)
    return int(reducer.reduce(total, "sum")) / grid.distance


def _deal(x_ND: Tensor, centroids_KD: Tensor, sizes: list[int]) -> Tensor:
    """int64 [N]: one pass of the algorithm. Rows are in the order of their ids."""
    labels_N = torch.full((len(x_ND),), -1, device=x_ND.device)
    unsure = float(margin(x_ND.norm(dim=1), centroids_KD).max())
    for part in blocks(len(sizes), len(x_ND), SCORES):
        free_F = (labels_N < 0).nonzero()[:, 0]
        scores_BF = screen_scores(centroids_KD[part], x_ND[free_F])
        is_free_F = torch.ones_like(free_F, dtype=torch.bool)
        for scores_F, centroid_D, code in zip(scores_BF, centroids_KD[part], range(part.start, part.stop), strict=True):
            if sizes[code] == 0:
                break
            scores_F.masked_fill_(~is_free_F, torch.inf)
            taken = _nearest_free(scores_F, is_free_F, sizes[code], unsure, x_ND, free_F, centroid_D)
            labels_N[free_F[taken]] = code
            is_free_F[taken] = False
    return labels_N


def _nearest_free(
    scores_F: Tensor, is_free_F: Tensor, wanted: int, unsure: float, x_ND: Tensor, free_F: Tensor, centroid_D: Tensor
) -> Tensor:
    """int64 [wanted]: places of the free rows nearest to the centroid by the truth, the lowest on ties.

    The screened score of the last one taken is within half the margin of the true one, so a row further than the margin
    from it is decided; the others are, by their true distances. So written, a NaN is undecided.
    """
    limit = scores_F.kthvalue(wanted).values
    inside_F = is_free_F & (scores_F < limit - unsure)
    near = (is_free_F & ~inside_F & ~(scores_F > limit + unsure)).nonzero()[:, 0]
    inside = inside_F.nonzero()[:, 0]
    if len(inside) + len(near) > wanted:
        rows_PD = x_ND[free_F[near]]
        distance_P = torch.cat([squared_distances(rows_PD[s], centroid_D[None]) for s in row_blocks(rows_PD)])
        near = near[distance_P.sort(stable=True).indices[: wanted - len(inside)]]
    return torch.cat([inside, near])
