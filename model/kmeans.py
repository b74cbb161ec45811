"""Exact Lloyd over shards of rows, with bit-identical centroids and labels for any number of shards and order of rows.

Every rank owns some rows and runs this same program. What crosses ranks is K x D int64 sums and K counts an iteration
(8,192 codes of 512 dimensions: 34 MB), never rows. Rounding cannot tell the shards apart: a row's values are put
once on a fixed-point grid (a power of two chosen from the largest magnitude and the number of rows, such that no sum
reaches 2^62), so sums are integers and associative; labels come from `model.nearest`, seeds from `model.seeding`.
With 10^8 rows of magnitude 1 the grid is 2^-34 fine, finer than float32 holds values above 2^-10.

Empty clusters: the i-th empty cluster takes the farthest point (the lowest item id on ties) of the i-th largest cluster
(the lowest index on ties) that has two distinct points. Empty clusters without such a donor stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.nearest import assign, label_distances, row_blocks
from model.reduction import Alone, Reducer
from model.seeding import fixed_point_scale, seed_centroids
from schemas.errors import ContractViolation

NO_ID = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Clusters:
    """The outcome on one rank: `centroids_KD` and `inertia` are the same on all."""

    centroids_KD: Tensor  # float32
    labels_N: Tensor  # int64, of this rank's rows, for exactly these centroids
    counts_K: Tensor  # int64, over all ranks
    inertia: list[float]  # sum of squared distances over all ranks, at each iteration


@dataclass(frozen=True)
class Grid:
    """Fixed points for coordinates and for squared distances."""

    coordinate: float
    distance: float


@dataclass(frozen=True)
class Pass:
    """One look at all rows with given centroids."""

    labels_N: Tensor  # int64
    distance_N: Tensor  # float64
    sums_KD: Tensor  # int64, on the grid, over all ranks
    counts_K: Tensor  # int64, over all ranks
    inertia: float


def lloyd(
    x_ND: Tensor,
    ids_N: Tensor,
    k: int,
    *,
    salt: int = 0,
    iterations: int = 30,
    tolerance: float = 1e-4,
    chunk: int = 65_536,
    reducer: Reducer | None = None,
) -> Clusters:
    """K-means of the rows of all ranks. `x_ND` float32 (this rank's rows, possibly none), `ids_N` int64, distinct.

    Stops after `iterations` updates, or when an update moves nothing or improves the inertia by at most `tolerance` of it.
    Raises ContractViolation where there are no rows or a value is not finite.
    """
    reducer = reducer or Alone()
    grid = grid_of(x_ND, reducer)
    centroids_KD = seed_centroids(x_ND, ids_N, k, salt, reducer)
    seen = _look(x_ND, centroids_KD, grid, chunk, reducer)
    inertia = [seen.inertia]
    for _ in range(iterations):
        moved_KD = _update(x_ND, ids_N, centroids_KD, seen, grid, reducer)
        if torch.equal(moved_KD, centroids_KD):
            break
        centroids_KD = moved_KD
        seen = _look(x_ND, centroids_KD, grid, chunk, reducer)
        inertia.append(seen.inertia)
        if inertia[-2] - inertia[-1] <= tolerance * inertia[-2]:
            break
    return Clusters(centroids_KD, seen.labels_N, seen.counts_K, inertia)


def grid_of(x_ND: Tensor, reducer: Reducer) -> Grid:
    """The grid on which no sum over the rows of all ranks overflows."""
    rows = int(reducer.reduce(torch.tensor([len(x_ND)], device=x_ND.device), "sum"))
    local = x_ND.abs().max().double() if x_ND.numel() else torch.zeros((), dtype=torch.float64, device=x_ND.device)
    local = torch.where(local.isfinite(), local, torch.inf)  # a NaN would be lost in a maximum
    largest = float(reducer.reduce(local.reshape(1), "max"))
    if largest == float("inf"):
        raise ContractViolation("A vector in table item_embeddings holds a value that is not finite; rerun stage embed.")
    farthest = 4 * x_ND.shape[1] * largest**2  # centroids lie within the hull of the rows
    return Grid(fixed_point_scale(rows, largest), fixed_point_scale(rows, farthest))


def _look(x_ND: Tensor, centroids_KD: Tensor, grid: Grid, chunk: int, reducer: Reducer) -> Pass:
    labels_N = assign(x_ND, centroids_KD, chunk)
    distance_N = label_distances(x_ND, centroids_KD, labels_N)
    sums_KD = torch.zeros(centroids_KD.shape, dtype=torch.int64, device=x_ND.device)
    for s in row_blocks(x_ND):
        sums_KD.index_add_(0, labels_N[s], (x_ND[s].double() * grid.coordinate).long())  # cut to the grid
    counts_K = torch.bincount(labels_N, minlength=len(centroids_KD))
    total = (distance_N * grid.distance).long().sum().reshape(1)
    return Pass(
        labels_N,
        distance_N,
        reducer.reduce(sums_KD, "sum"),
        reducer.reduce(counts_K, "sum"),
        int(reducer.reduce(total, "sum")) / grid.distance,
    )


def _update(x_ND: Tensor, ids_N: Tensor, centroids_KD: Tensor, seen: Pass, grid: Grid, reducer: Reducer) -> Tensor:
    """float32 [K, D]: the means, and the split of the largest clusters where others are empty."""
    count_K1 = seen.counts_K.clamp(min=1)[:, None]
    mean_KD = (seen.sums_KD.double() / count_K1 / grid.coordinate).float()
    moved_KD = torch.where(seen.counts_K[:, None] > 0, mean_KD, centroids_KD)
    empty = (seen.counts_K == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return moved_KD
    donors, points_ED = _farthest_points(x_ND, ids_N, seen, len(empty), reducer)
    moved_KD[empty[: len(donors)]] = points_ED
    return moved_KD


def _farthest_points(x_ND: Tensor, ids_N: Tensor, seen: Pass, wanted: int, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """Up to `wanted` donor clusters in order, and the farthest point of each: int64 [E], float32 [E, D]."""
    zeros_K = seen.distance_N.new_zeros(len(seen.counts_K))
    far_K = reducer.reduce(zeros_K.scatter_reduce(0, seen.labels_N, seen.distance_N, "amax"), "max")
    is_far = seen.distance_N == far_K[seen.labels_N]
    none_K = seen.counts_K.new_full((len(seen.counts_K),), NO_ID)
    id_K = reducer.reduce(none_K.scatter_reduce(0, seen.labels_N[is_far], ids_N[is_far], "amin"), "min")
    by_size = torch.sort(seen.counts_K, descending=True, stable=True).indices
    donors = by_size[far_K[by_size] > 0][:wanted]
    points_ED = x_ND.new_zeros(len(donors), x_ND.shape[1])
    place_K = torch.full_like(none_K, -1)
    place_K[donors] = torch.arange(len(donors), device=x_ND.device)
    place_N = torch.where(is_far & (ids_N == id_K[seen.labels_N]), place_K[seen.labels_N], -1)
    mine = (place_N >= 0).nonzero()[:, 0]
    points_ED[place_N[mine]] = x_ND[mine] + 0.0  # no negative zero: the sum over ranks would lose its sign
    return donors, reducer.reduce(points_ED, "sum")
