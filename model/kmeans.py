"""Exact Lloyd over shards of rows, with bit-identical centroids and labels for any number of shards and order of rows.

Every rank owns some rows and runs this same program. What crosses ranks is K x D int64 sums and K counts an iteration
(8,192 codes of 512 dimensions: 34 MB), never rows. Rounding cannot tell the shards apart: a row's values are put
once on a fixed-point grid (a power of two chosen from the largest magnitude and the number of rows, such that no sum
reaches 2^62), so sums are integers and associative; labels come from `model.nearest`, seeds from `model.seeding`.
Integers can also be taken back: after the first look only rows whose label changed move between sums, and the inertia
follows from the sums, so an iteration costs little more than its assignment.
With 10^8 rows of magnitude 1 the grid is 2^-34 fine, finer than float32 holds values above 2^-10.

Empty clusters: the i-th empty cluster takes the farthest point (the lowest item id on ties) of the i-th largest cluster
(the lowest index on ties) that has two distinct points. Empty clusters without such a donor stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.nearest import Guess, assign, fixed_sum, label_distances, row_blocks, squared_distances
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
    inertia: list[float]  # sum of squared distances over all ranks, at each iteration; see `Spread`


@dataclass(frozen=True)
class Grid:
    """Fixed points for coordinates and for squared distances."""

    coordinate: float
    distance: float


@dataclass(frozen=True)
class Pass:
    """One look at all rows with given centroids."""

    labels_N: Tensor  # int64
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
    first_KD: Tensor | None = None,
) -> Clusters:
    """K-means of the rows of all ranks. `x_ND` float32 (this rank's rows, possibly none), `ids_N` int64, distinct; the
    first centroids are `first_KD`, the same on all ranks, or drawn by `salt`.

    Stops after `iterations` updates, or when an update moves nothing or improves the inertia by at most `tolerance` of it.
    Raises ContractViolation where there are no rows or a value is not finite.
    """
    reducer = reducer or Alone()
    shard = Shard(x_ND, grid_of(x_ND, reducer), chunk, reducer)
    centroids_KD = seed_centroids(x_ND, ids_N, k, salt, reducer) if first_KD is None else first_KD
    seen = shard.look(centroids_KD)
    inertia = [seen.inertia]
    for _ in range(iterations):
        moved_KD = _update(x_ND, ids_N, centroids_KD, seen, shard.grid, reducer)
        if torch.equal(moved_KD, centroids_KD):
            break
        centroids_KD = moved_KD
        seen = shard.look(centroids_KD)
        inertia.append(seen.inertia)
        if inertia[-2] - inertia[-1] <= tolerance * inertia[-2]:
            break
    return Clusters(centroids_KD, seen.labels_N, seen.counts_K, inertia)


def grid_of(x_ND: Tensor, reducer: Reducer) -> Grid:
    """The grid on which no sum over the rows of all ranks overflows."""
    rows = int(reducer.reduce(torch.tensor([len(x_ND)], device=x_ND.device), "sum"))
    local = torch.stack(x_ND.aminmax()).abs().max() if x_ND.numel() else x_ND.new_zeros(())
    local = torch.where(local.isfinite(), local.double(), torch.inf)  # a NaN would be lost in a maximum
    largest = float(reducer.reduce(local.reshape(1), "max"))
    if largest == float("inf"):
        raise ContractViolation("A vector in table item_embeddings holds a value that is not finite; rerun stage embed.")
    farthest = 4 * x_ND.shape[1] * largest**2  # centroids lie within the hull of the rows
    return Grid(fixed_point_scale(rows, largest), fixed_point_scale(rows, farthest))


class Shard:
    """One rank's rows, and its sums and counts of the last look, which the next one corrects where a label changed."""

    def __init__(self, x_ND: Tensor, grid: Grid, chunk: int, reducer: Reducer) -> None:
        self.x_ND, self.grid, self.chunk, self.reducer = x_ND, grid, chunk, reducer
        self.guess: Guess | None = None
        self.spread: Spread | None = None

    def look(self, centroids_KD: Tensor) -> Pass:
        labels_N = assign(self.x_ND, centroids_KD, self.chunk, self.guess)
        if self.guess is None:
            self.norm_N = self.x_ND.norm(dim=1)
            self.sums_KD = torch.zeros(centroids_KD.shape, dtype=torch.int64, device=self.x_ND.device)
            for s in row_blocks(self.x_ND):
                self.sums_KD.index_add_(0, labels_N[s], self._fixed(self.x_ND[s]))
        else:
            self._move(labels_N, self.guess.labels_N, (labels_N != self.guess.labels_N).nonzero()[:, 0])
        self.guess = Guess(labels_N, self.norm_N)
        counts_K = self.reducer.reduce(torch.bincount(labels_N, minlength=len(centroids_KD)), "sum")
        sums_KD = self.reducer.reduce(self.sums_KD.clone(), "sum")  # ours changes in place
        self.spread = self.spread or spread_of(self.x_ND, sums_KD.sum(0), counts_K.sum(), self.grid, self.reducer)
        return Pass(labels_N, sums_KD, counts_K, self.spread.inertia(centroids_KD, sums_KD, counts_K, self.grid))

    def _move(self, to_N: Tensor, from_N: Tensor, rows: Tensor) -> None:
        """Moves the given rows between the sums."""
        for s in row_blocks(self.x_ND, len(rows)):
            fixed_BD = self._fixed(self.x_ND[rows[s]])
            self.sums_KD.index_add_(0, to_N[rows[s]], fixed_BD)
            self.sums_KD.index_add_(0, from_N[rows[s]], fixed_BD, alpha=-1)

    def _fixed(self, x_BD: Tensor) -> Tensor:
        """int64: the values, cut to the grid."""
        return (x_BD.double() * self.grid.coordinate).long()


@dataclass(frozen=True)
class Spread:
    """What turns sums and counts into the inertia: sum |y - c|^2 = sum |y|^2 - sum_k c_k (2 S_k - n_k c_k), y = x - mean.

    Taken about the mean, the terms cancel no more than the clusters explain: the error is below 2^-40 of `total`.
    """

    mean_D: Tensor  # int64, of all rows, on the grid
    total: float  # sum of squared distances from the mean

    def inertia(self, centroids_KD: Tensor, sums_KD: Tensor, counts_K: Tensor, grid: Grid) -> float:
        around_KD = (sums_KD - counts_K[:, None] * self.mean_D).double() / grid.coordinate
        shifted_KD = centroids_KD.double() - self.mean_D.double() / grid.coordinate
        explained_K = fixed_sum(shifted_KD * (2 * around_KD - counts_K[:, None] * shifted_KD))
        return max(0.0, self.total - float(fixed_sum(explained_K[None])))


def spread_of(x_ND: Tensor, sum_D: Tensor, rows: Tensor, grid: Grid, reducer: Reducer) -> Spread:
    """Of the rows of all ranks, whose sum on the grid and number are given."""
    mean_D = torch.div(sum_D, rows, rounding_mode="floor")
    centre_1D = (mean_D.double() / grid.coordinate)[None]
    parts = [(squared_distances(x_ND[s], centre_1D) * grid.distance).long().sum() for s in row_blocks(x_ND)]
    local = torch.stack(parts).sum() if parts else sum_D.new_zeros(())
    return Spread(mean_D, int(reducer.reduce(local.reshape(1), "sum")) / grid.distance)


def means_of(sums_KD: Tensor, counts_K: Tensor, centroids_KD: Tensor, grid: Grid) -> Tensor:
    """float32 [K, D]: sums on the grid by their counts; a cluster without rows keeps its centroid."""
    mean_KD = (sums_KD.double() / counts_K.clamp(min=1)[:, None] / grid.coordinate).float()
    return torch.where(counts_K[:, None] > 0, mean_KD, centroids_KD)


def _update(x_ND: Tensor, ids_N: Tensor, centroids_KD: Tensor, seen: Pass, grid: Grid, reducer: Reducer) -> Tensor:
    """float32 [K, D]: the means, and the split of the largest clusters where others are empty."""
    moved_KD = means_of(seen.sums_KD, seen.counts_K, centroids_KD, grid)
    empty = (seen.counts_K == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return moved_KD
    distance_N = label_distances(x_ND, centroids_KD, seen.labels_N)
    donors, points_ED = _farthest_points(x_ND, ids_N, seen, distance_N, len(empty), reducer)
    moved_KD[empty[: len(donors)]] = points_ED
    return moved_KD


def _farthest_points(
    x_ND: Tensor, ids_N: Tensor, seen: Pass, distance_N: Tensor, wanted: int, reducer: Reducer
) -> tuple[Tensor, Tensor]:
    """Up to `wanted` donor clusters in order, and the farthest point of each: int64 [E], float32 [E, D]."""
    zeros_K = distance_N.new_zeros(len(seen.counts_K))
    far_K = reducer.reduce(zeros_K.scatter_reduce(0, seen.labels_N, distance_N, "amax"), "max")
    is_far = distance_N == far_K[seen.labels_N]
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
