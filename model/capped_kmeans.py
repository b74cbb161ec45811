"""K-means in which no cluster exceeds a cap, at the sizes and with the exactness of `model.kmeans`.

Lloyd first; where a cluster exceeds the cap, rounds of capped labels and means follow. In a round every row wishes for the
centroid of least squared distance + price, and a cluster keeps the nearest of the rows that wish for it, the lowest id on
ties, up to its room; the rows turned away wish for the nearest centroid with room left, and so on. Where `MOVES` times
were not enough (many equal rows), the rest fill the free places in order of id.

The price of a cluster starts at zero. It rises where more rows wish for the cluster than its aim, half-way from the mean
to the cap, and falls, not below zero, where fewer do (the subgradient of the dual of the transport problem), by a step of
its own that grows while the sign stays and shrinks when it turns (as in Rprop). So chains of clusters pass rows on, and
fewer rows are turned away. One more dimension makes the choice a plain nearest centroid: |(x, 0) - (c, sqrt(price))|^2.

Ranks agree on the last row that a cluster keeps by bisection over the bits of distances: K counts a step, never rows. So
a move costs some 64 messages of 8 K bytes, and memory beyond the rows is a few numbers a row and one chunk. Distances are
the truth of `model.nearest`: the outcome depends on the set of rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.balanced_kmeans import inertia_of, means
from model.kmeans import Clusters, grid_of, lloyd
from model.nearest import assign, blocks, row_blocks, squared_distances
from model.reduction import Alone, Reducer

MOVES = 16  # times that rows turned away look for the nearest room; about 7 are enough on ordinary data
FIRST_STEP, LEAST_STEP = 0.1, 0.001  # of a price, in mean squared distances
GROW, SHRINK = 1.2, 0.5
PATIENCE = 5  # rounds without a better outcome
LOWEST, HIGHEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def cap_of(rows: int, k: int, slack: float) -> int:
    """The most rows a cluster may have: (1 + slack) rows / k, but so many that all rows find a place."""
    return max(math.floor((1 + slack) * rows / k), math.ceil(rows / k))


def capped_kmeans(
    x_ND: Tensor,
    ids_N: Tensor,
    k: int,
    *,
    slack: float = 0.1,
    salt: int = 0,
    iterations: int = 30,
    tolerance: float = 1e-4,
    chunk: int = 65_536,
    reducer: Reducer | None = None,
) -> Clusters:
    """Arguments as for `lloyd`, `slack` as for `cap_of`. Up to `iterations` rounds of Lloyd and as many capped ones.

    Where Lloyd stays within the cap this is Lloyd. Otherwise it is the best of the capped rounds, by steps of `tolerance`
    of its inertia: centroids are the means of their own rows, a row may lie nearer to another one, and `inertia` goes on
    from Lloyd's to the outcome's. A cluster left without rows keeps its centroid. Raises as `lloyd` does.
    """
    reducer = reducer or Alone()
    plain = lloyd(x_ND, ids_N, k, salt=salt, iterations=iterations, tolerance=tolerance, chunk=chunk, reducer=reducer)
    rows = int(plain.counts_K.sum())
    cap = cap_of(rows, k, slack)
    if int(plain.counts_K.max()) <= cap:
        return plain
    grid = grid_of(x_ND, reducer)
    prices, inertia = Prices(k, (cap + rows / k) / 2, plain.inertia[-1] / rows, x_ND.device), list(plain.inertia)
    best, centroids_KD, wish_N, wishes_K = plain, plain.centroids_KD, plain.labels_N, plain.counts_K
    for _ in range(max(1, iterations)):
        labels_N = within_cap(x_ND, ids_N, centroids_KD, wish_N, cap, chunk, reducer)
        centroids_KD, counts_K = means(x_ND, labels_N, centroids_KD, grid, reducer)
        inertia.append(inertia_of(x_ND, labels_N, centroids_KD, grid, reducer))
        if best is plain or inertia[-1] < (1 - tolerance) * best.inertia[-1]:
            best = Clusters(centroids_KD, labels_N, counts_K, list(inertia))
        elif len(inertia) - len(best.inertia) == PATIENCE:
            break
        if int(wishes_K.max()) > cap:
            prices.move(wishes_K)
        wish_N = priced_labels(x_ND, centroids_KD, prices.price_K, chunk)
        wishes_K = _counts(wish_N, k, reducer)
    return best


class Prices:
    """Prices of clusters, squared distances in float64; computed from counts over all ranks, so all have the same."""

    def __init__(self, k: int, aim: float, scale: float, device: torch.device) -> None:
        """`aim` rows a cluster; `scale` is the mean squared distance of a row."""
        self.aim = aim
        self.price_K = torch.zeros(k, dtype=torch.float64, device=device)
        self.step_K = torch.full_like(self.price_K, FIRST_STEP * scale)
        self.least_step, self.sign_K = LEAST_STEP * scale, torch.zeros_like(self.price_K)

    def move(self, wishes_K: Tensor) -> None:
        """One step: `wishes_K` int64, the rows of all ranks that wish for each cluster at the present prices."""
        excess_K = (wishes_K.double() / self.aim - 1).clamp(-1, 1)
        turn_K = excess_K.sign() * self.sign_K
        grown_K = torch.where(turn_K > 0, self.step_K * GROW, self.step_K)
        self.step_K = torch.where(turn_K < 0, self.step_K * SHRINK, grown_K).clamp(min=self.least_step)
        self.sign_K = excess_K.sign()
        self.price_K = (self.price_K + self.step_K * excess_K).clamp(min=0)


def priced_labels(x_ND: Tensor, centroids_KD: Tensor, price_K: Tensor, chunk: int) -> Tensor:
    """int64 [N]: argmin of squared distance + price, prices being squares of float32; the first of equals."""
    extra_K = (price_K - price_K.min()).sqrt().float()
    priced_KE = torch.cat([centroids_KD, extra_K[:, None]], 1)
    parts = [x_ND.new_zeros(0, dtype=torch.int64)]
    for s in blocks(len(x_ND), 1, chunk):
        parts.append(assign(torch.cat([x_ND[s], x_ND.new_zeros(s.stop - s.start, 1)], 1), priced_KE, chunk))
    return torch.cat(parts)


def within_cap(
    x_ND: Tensor, ids_N: Tensor, centroids_KD: Tensor, wish_N: Tensor, cap: int, chunk: int, reducer: Reducer
) -> Tensor:
    """int64 [N]: `wish_N` with rows moved until no cluster exceeds `cap` over all ranks; K cap >= rows."""
    labels_N = torch.full_like(wish_N, -1)
    room_K = torch.full((len(centroids_KD),), cap, device=x_ND.device)
    waiting_W, wish_W = torch.arange(len(x_ND), device=x_ND.device), wish_N
    for _ in range(MOVES):
        keys = [_bits(_distances(x_ND, waiting_W, centroids_KD, wish_W)), ids_N[waiting_W]]
        kept_W = _kept(keys, wish_W, room_K, reducer)
        labels_N[waiting_W[kept_W]] = wish_W[kept_W]
        room_K = room_K - _counts(wish_W[kept_W], len(room_K), reducer)
        waiting_W = waiting_W[~kept_W]
        if int(reducer.reduce(torch.tensor([len(waiting_W)], device=x_ND.device), "sum")) == 0:
            return labels_N
        open_O = (room_K > 0).nonzero()[:, 0]
        parts = [assign(x_ND[waiting_W[s]], centroids_KD[open_O], chunk) for s in blocks(len(waiting_W), 1, chunk)]
        wish_W = open_O[torch.cat([waiting_W[:0], *parts])]
    labels_N[waiting_W] = _dealt_out(ids_N[waiting_W], room_K, reducer)
    return labels_N


def _distances(x_ND: Tensor, waiting_W: Tensor, centroids_KD: Tensor, wish_W: Tensor) -> Tensor:
    slices = row_blocks(x_ND, len(waiting_W))
    parts = [squared_distances(x_ND[waiting_W[s]], centroids_KD[wish_W[s]]) for s in slices]
    return torch.cat([x_ND.new_zeros(0, dtype=torch.float64), *parts])


def _bits(distance_W: Tensor) -> Tensor:
    """int64 in the order of the float64, none of which is negative."""
    return distance_W.view(torch.int64)


def _counts(cluster_W: Tensor, k: int, reducer: Reducer) -> Tensor:
    return reducer.reduce(torch.bincount(cluster_W, minlength=k), "sum")


def _kept(keys: list[Tensor], wish_W: Tensor, room_K: Tensor, reducer: Reducer) -> Tensor:
    """bool [W]: of the rows of all ranks that wish for a cluster the first it has room for, by `keys` (int64 [W] each).

    All keys together are distinct. Ranks with no such row take part.
    """
    wishes_K = _counts(wish_W, len(room_K), reducer)
    kept_W = (wishes_K <= room_K)[wish_W]
    contested_K = wishes_K > room_K
    if not contested_K.any():
        return kept_W
    rank_K = torch.where(contested_K, room_K, 0)
    limit_W = _smallest(keys[0][~kept_W], wish_W[~kept_W], rank_K, reducer)[wish_W]
    inside_W, level_W = ~kept_W & (keys[0] < limit_W), ~kept_W & (keys[0] == limit_W)
    rank_K = rank_K - _counts(wish_W[inside_W], len(room_K), reducer)
    kept_W |= inside_W
    kept_W[level_W] = _kept([key[level_W] for key in keys[1:]], wish_W[level_W], rank_K, reducer)
    return kept_W


def _smallest(value_W: Tensor, cluster_W: Tensor, rank_K: Tensor, reducer: Reducer) -> Tensor:
    """int64 [K]: the rank_k-th smallest value of cluster k over all ranks (which have so many); anything for rank 0."""

    def up_to(limit_K: Tensor) -> Tensor:
        return torch.bincount(cluster_W[value_W <= limit_K[cluster_W]], minlength=len(rank_K))

    return _bisected(value_W, up_to, rank_K, reducer)


def _dealt_out(ids_W: Tensor, room_K: Tensor, reducer: Reducer) -> Tensor:
    """int64 [W]: the rows of all ranks in order of id fill the free places in order of cluster."""
    rows = reducer.reduce(torch.tensor([len(ids_W)], device=ids_W.device), "sum")
    sorted_W, open_O = ids_W.sort().values, (room_K > 0).nonzero()[:, 0]
    rank_O = room_K[open_O].cumsum(0).minimum(rows)
    last_O = _bisected(ids_W, lambda limit_O: torch.searchsorted(sorted_W, limit_O, right=True), rank_O, reducer)
    return open_O[torch.searchsorted(last_O, ids_W)]


def _bisected(value_W: Tensor, up_to: Callable[[Tensor], Tensor], rank_K: Tensor, reducer: Reducer) -> Tensor:
    """int64 [K]: the least limits up to which all ranks together have `rank_K` of the values or more.

    `up_to` counts this rank's (int64 [K] to int64 [K]). The ranks have the same bounds, so they end together.
    """
    least = reducer.reduce(torch.cat([value_W, value_W.new_tensor([HIGHEST])]).min().reshape(1), "min")
    most = reducer.reduce(torch.cat([value_W, value_W.new_tensor([LOWEST])]).max().reshape(1), "max")
    low_K, high_K = least.repeat(len(rank_K)), most.repeat(len(rank_K))
    while bool((low_K < high_K).any()):
        middle_K = (low_K & high_K) + ((low_K ^ high_K) >> 1)  # their mean, rounded down, without overflow
        enough_K = reducer.reduce(up_to(middle_K), "sum") >= rank_K
        high_K = torch.where(enough_K, middle_K, high_K)
        low_K = torch.where(enough_K, low_K, middle_K + 1)
    return high_K
