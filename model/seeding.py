"""First centroids that depend on the set of rows alone, not on their order or their shards.

A pool of rows, those with the smallest hash of (salt, item id), is gathered to every rank in the order of the hashes.
From it seeds are drawn in rounds by D^2 weights, as in k-means|| (Bahmani et al., VLDB 2012): the first seed is the
first row, each round adds a quarter more. Weights and thresholds are integers, so that no sum is rounded, and a value
that is a seed already has weight zero, so that seeds are distinct. Where the pool has fewer distinct values than seeds
are asked for, the rest repeat seed 0: they win no row, and Lloyd's rule for empty clusters may use them later.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.nearest import assign, distinct, label_distances, rows_nearer
from model.reduction import Reducer
from schemas.errors import ContractViolation

POOL_ROWS_A_SEED = 16
POOL_ROWS = 4096  # at least


def hash64(values: np.ndarray, salt: int) -> np.ndarray:
    """int64 [N], not negative: splitmix64 of each value and the salt."""
    mixed = values.astype(np.int64).view(np.uint64) ^ _splitmix(np.array([salt], dtype=np.uint64))
    return (_splitmix(mixed) >> np.uint64(1)).view(np.int64)


def _splitmix(state: np.ndarray) -> np.ndarray:
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def fixed_point_scale(total: int, largest: float) -> float:
    """The power of two by which `total` values of magnitude at most `largest` sum below 2^62 in int64."""
    exponent = int(np.frexp(largest)[1])  # largest < 2^exponent
    return float(np.ldexp(1.0, 62 - exponent - total.bit_length()))


def seed_centroids(x_ND: Tensor, ids_N: Tensor, k: int, salt: int, reducer: Reducer) -> Tensor:
    """float32 [k, D] on every rank. `ids_N` are distinct over all ranks. Raises ContractViolation without rows."""
    pool_PD = gather_pool(x_ND, ids_N, max(POOL_ROWS, POOL_ROWS_A_SEED * k), salt, reducer)
    if len(pool_PD) == 0:
        raise ContractViolation("K-means was given no rows: table item_embeddings has none for its day; run stage embed.")
    seeds_SD = pool_PD[:1]
    first, last = (len(pool_PD) * rank // reducer.size for rank in (reducer.rank, reducer.rank + 1))
    mine_RD = pool_PD[first:last]  # every rank looks at its part of the pool
    distance_R = label_distances(mine_RD, seeds_SD, torch.zeros(last - first, dtype=torch.int64, device=pool_PD.device))
    for step in range(2 * k):  # an upper bound: every round adds at least one
        weights = _integer_weights(reducer.gather(distance_R).cpu().numpy())
        if len(seeds_SD) == k or not weights.any():
            break
        wanted = min(k - len(seeds_SD), max(1, len(seeds_SD) // 4))
        drawn = torch.from_numpy(_draw(weights, wanted, salt, step)).to(pool_PD.device)
        fresh_FD = pool_PD[drawn[distinct(pool_PD[drawn])[0]]]
        rows = rows_nearer(mine_RD, fresh_FD, distance_R)
        near_MD = mine_RD[rows]
        distance_M = label_distances(near_MD, fresh_FD, assign(near_MD, fresh_FD))
        distance_R[rows] = torch.minimum(distance_R[rows], distance_M)
        seeds_SD = torch.cat([seeds_SD, fresh_FD])
    return torch.cat([seeds_SD, seeds_SD[:1].expand(k - len(seeds_SD), -1)])


def gather_pool(x_ND: Tensor, ids_N: Tensor, size: int, salt: int, reducer: Reducer) -> Tensor:
    """float32 [min(size, all rows), D] on every rank: the rows of smallest (hash, id), in that order.

    The hashes travel first, so that no more than `size` rows do.
    """
    ids = ids_N.cpu().numpy()
    keys = np.stack([hash64(ids, salt), ids], axis=1)
    local = np.arange(len(ids))
    if len(ids) > size:  # a few may share the last hash
        local = local[keys[:, 0] <= np.partition(keys[:, 0], size - 1)[size - 1]]
    local = local[np.lexsort((keys[local, 1], keys[local, 0]))][:size]
    everyone = reducer.gather(torch.from_numpy(keys[local]).to(x_ND.device)).cpu().numpy()
    order = np.lexsort((everyone[:, 1], everyone[:, 0]))[:size]
    if len(order) == 0:
        return reducer.gather(x_ND)
    last_key, last_id = everyone[order[-1]]
    mine = keys[local]
    kept = local[(mine[:, 0] < last_key) | ((mine[:, 0] == last_key) & (mine[:, 1] <= last_id))]
    rows = reducer.gather(x_ND[torch.from_numpy(kept).to(x_ND.device)])
    sent = reducer.gather(torch.from_numpy(keys[kept]).to(x_ND.device)).cpu().numpy()
    return rows[torch.from_numpy(np.lexsort((sent[:, 1], sent[:, 0]))).to(x_ND.device)]


def _integer_weights(distances: np.ndarray) -> np.ndarray:
    """int64 [P]: distances on a grid on which they sum exactly; above zero where the distance is."""
    if not distances.any():
        return np.zeros(len(distances), dtype=np.int64)
    scale = fixed_point_scale(2 * len(distances), float(distances.max()))
    return np.maximum(np.rint(distances * scale).astype(np.int64), (distances > 0).astype(np.int64))


def _draw(weights: np.ndarray, count: int, salt: int, step: int) -> np.ndarray:
    """int64: up to `count` distinct places, each drawn with probability in proportion to its weight."""
    ends = np.cumsum(weights)
    points = hash64(np.arange(count) + (step << 32), salt ^ 0x5EED) % ends[-1]
    return np.unique(np.searchsorted(ends, points, side="right"))
