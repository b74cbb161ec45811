"""A long history as at most `tokens` representatives: hierarchical K-means of one user's events over their items' vectors
(OneRec-V1, section 2.2, after TWIN-V2). Arrays in, arrays out; no Spark, no files, one thread of the caller.

A set of S events splits into at most floor(cube root of S) clusters by Lloyd, and so on, until a cluster has at most
`max_cluster` events (the paper leaves that number open). Sets split largest first, the last one into no more than is
left, so there are never more than `tokens`, whatever the history: the bound grows by itself where the budget is short.
The event nearest the centre represents; ids and feedback bits come from it, times and durations are means (floor;
of plays and durations those that are known, -1 where none is). Weights are the cluster's events and sum to the history.

What makes the result a function of the set of events, not of their order: events are put in (ts, impression_id) order;
items with equal vectors are one point, which never splits, its weight their events; first centres are the points whose
items have the smallest hash; distances are float64, the first centre wins a tie of labels, and among events whose
distance from the centre is the same to within 1e-9 the newest represents. An item without a vector is taken at the
origin, so that such items share a point. Equal input gives equal bytes on one kind of machine; elsewhere, labels tied
within rounding (1e-15) may fall otherwise.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from schemas.config import LifelongConfig

CATEGORICAL = ("item_ids", "author_ids", "feedback")
KNOWN_MEANS = ("play_ms", "duration_ms")
UNKNOWN = -1
TIE = 1e-9  # relative: squared distances closer than this are equal
BLOCK = 1 << 18  # elements of a block of distances: they stay in the cache
DENSE = 1 << 13  # memberships: so few are multiplied as a matrix sooner than a sparse one is made

Arrays = dict[str, np.ndarray]
KMeans = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


@dataclass(frozen=True)
class Points:
    """The distinct vectors of a history, in the order of the smallest hash among their items."""

    x_PD: np.ndarray  # float64
    weights_P: np.ndarray  # int64, events at each
    of_event_N: np.ndarray  # int64, the point of each event


def compress(
    events: Mapping[str, np.ndarray],
    vectors: Mapping[str, np.ndarray],
    settings: LifelongConfig,
    kmeans: KMeans | None = None,
) -> Arrays:
    """The newest `history` events as arrays [T] of lifelong_sequences, T <= tokens, in time order, weights int32.

    `events` has parallel arrays [N] in any order: impression_ids, item_ids, author_ids, ts_us, play_ms, duration_ms
    (int64), feedback (int32). `vectors` has item_ids int64 [I], distinct, and vectors float [I, D]. `kmeans` splits one
    set (default: `lloyd`).
    """
    order = np.lexsort((events["impression_ids"], events["ts_us"]))[-settings.history :]
    events = {name: values[order] for name, values in events.items()}
    if len(order) <= settings.tokens:
        kept = {name: values for name, values in events.items() if name != "impression_ids"}
        return kept | {"weights": np.ones(len(order), np.int32)}
    points = points_of(events["item_ids"], vectors["item_ids"], vectors["vectors"])
    labels_P = hierarchy(points.x_PD, points.weights_P, settings, kmeans)
    return merged(events, labels_P[points.of_event_N], representatives(points, labels_P))


def points_of(item_ids_N: np.ndarray, known_I: np.ndarray, vectors_ID: np.ndarray) -> Points:
    """The points of the events of `item_ids_N` (int64 [N])."""
    items, item_N = np.unique(item_ids_N, return_inverse=True)
    x_UD = np.zeros((len(items), vectors_ID.shape[1]), np.float32)
    _, place, source = np.intersect1d(items, known_I, assume_unique=True, return_indices=True)
    x_UD[place] = vectors_ID[source] + np.float32(0)  # a negative zero is a zero
    by_hash = np.argsort(hash64(items), kind="stable")
    first, point = distinct_rows(x_UD[by_hash])
    rank = np.argsort(np.argsort(first))  # of each distinct vector, by its first item in the order of the hashes
    point_U = np.empty(len(items), np.int64)
    point_U[by_hash] = rank[point]
    of_event_N = point_U[item_N]
    return Points(x_UD[by_hash[np.sort(first)]].astype(np.float64), np.bincount(of_event_N), of_event_N)


def distinct_rows(x_UD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [V], [U]: the first row of each distinct one, and which of those each row is, by comparing bytes."""
    if x_UD.shape[1] == 0:
        return np.zeros(1, np.int64), np.zeros(len(x_UD), np.int64)
    bytes_U = np.ascontiguousarray(x_UD).view(np.dtype((np.void, x_UD.itemsize * x_UD.shape[1])))[:, 0]
    return np.unique(bytes_U, return_index=True, return_inverse=True)[1:]


def hash64(values: np.ndarray) -> np.ndarray:
    """uint64 [N]: splitmix64 of each value."""
    mixed = values.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hierarchy(
    x_PD: np.ndarray, weights_P: np.ndarray, settings: LifelongConfig, kmeans: KMeans | None = None
) -> np.ndarray:
    """int64 [P]: the cluster of each of the distinct points, numbered from 0; at most `tokens` clusters.

    Sets of equal size split in the order in which they came to be.
    """
    kmeans = kmeans or lloyd
    serial = itertools.count()
    growing = [(-int(weights_P.sum()), next(serial), np.arange(len(x_PD)))]
    whole: list[np.ndarray] = []  # cannot split
    while growing and -growing[0][0] > settings.max_cluster and len(growing) + len(whole) < settings.tokens:
        size, _, members = heapq.heappop(growing)
        wanted = min(max(2, cube_root(-size)), settings.tokens - len(growing) - len(whole), len(members))
        labels = kmeans(x_PD[members], weights_P[members], wanted, settings.iterations) if wanted > 1 else members * 0
        parts = parts_of(members, labels, weights_P)
        if len(parts) == 1:
            whole.append(members)
            continue
        for part, events in parts:
            heapq.heappush(growing, (-events, next(serial), part))
    found = np.empty(len(x_PD), np.int64)
    for cluster, members in enumerate([*whole, *(members for _, _, members in growing)]):
        found[members] = cluster
    return found


def cube_root(size: int) -> int:
    """floor(size ** (1/3)), exactly."""
    root = round(size ** (1 / 3))
    return root if root**3 <= size else root - 1


def parts_of(members: np.ndarray, labels: np.ndarray, weights_P: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """The members of each label that has any, in their order, and the events of each part."""
    order = np.argsort(labels, kind="stable")
    sorted_members, sorted_labels = members[order], labels[order]
    starts = np.append(0, np.flatnonzero(sorted_labels[1:] != sorted_labels[:-1]) + 1)
    sizes = np.add.reduceat(weights_P[sorted_members], starts).tolist()
    bounds = [*starts.tolist(), len(order)]
    return [(sorted_members[s:e], size) for s, e, size in zip(bounds[:-1], bounds[1:], sizes, strict=True)]


def lloyd(x_PD: np.ndarray, weights_P: np.ndarray, k: int, iterations: int) -> np.ndarray:
    """int64 [P]: K-means labels below `k` of distinct points float64 [P, D] of integer weights, from the first `k`
    points as centres; at most `iterations` moves. A centre that has lost its points stays where it is."""
    centres_KD = x_PD[:k]
    labels_P = nearest(x_PD, centres_KD)
    for _ in range(iterations):
        centres_KD = means(x_PD, weights_P, labels_P, centres_KD)
        moved_P = nearest(x_PD, centres_KD)
        if np.array_equal(moved_P, labels_P):
            break
        labels_P = moved_P
    return labels_P


def nearest(x_PD: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """int64 [P]: the nearest centre of each point, the first on ties."""
    norms_K = np.einsum("kd,kd->k", centres_KD, centres_KD)
    turned_DK = -2.0 * centres_KD.T
    step = max(1, BLOCK // len(centres_KD))
    blocks = range(0, len(x_PD), step)
    return np.concatenate([(x_PD[s : s + step] @ turned_DK + norms_K).argmin(axis=1) for s in blocks])


def means(x_PD: np.ndarray, weights_P: np.ndarray, labels_P: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """float64 [K, D]: the weighted mean of each label's points; the given centre where it has none."""
    clusters = len(centres_KD)
    if clusters * len(x_PD) <= DENSE:
        member_KP: Any = (labels_P == np.arange(clusters)[:, None]) * weights_P.astype(np.float64)
    else:
        columns = np.arange(len(x_PD) + 1)
        member_KP = sp.csc_array((weights_P.astype(np.float64), labels_P, columns), shape=(clusters, len(x_PD)))
    weight_K1 = np.bincount(labels_P, weights_P, minlength=clusters)[:, None]
    return np.where(weight_K1 > 0, (member_KP @ x_PD) / np.maximum(weight_K1, 1.0), centres_KD)


def representatives(points: Points, labels_P: np.ndarray) -> np.ndarray:
    """int64 [T]: the event that represents each cluster, the newest of those nearest its centre."""
    clusters = int(labels_P.max()) + 1
    centres_TD = means(points.x_PD, points.weights_P, labels_P, np.zeros((clusters, points.x_PD.shape[1])))
    distance_P = np.concatenate(
        [
            np.square(points.x_PD[s : s + 4096] - centres_TD[labels_P[s : s + 4096]]).sum(axis=1)
            for s in range(0, len(labels_P), 4096)
        ]
    )
    least_T = np.full(clusters, np.inf)
    np.minimum.at(least_T, labels_P, distance_P)
    chosen_P = distance_P <= least_T[labels_P] * (1 + TIE) + np.finfo(np.float64).tiny
    event_T = np.zeros(clusters, np.int64)
    candidates = np.flatnonzero(chosen_P[points.of_event_N])
    event_T[labels_P[points.of_event_N[candidates]]] = candidates  # ascending: the newest is written last
    return event_T


def merged(events: Mapping[str, np.ndarray], labels_N: np.ndarray, event_T: np.ndarray) -> Arrays:
    """The arrays [T] of the clusters `labels_N` of events in time order, represented by `event_T`; in order of their mean
    time, then of the representative's place."""
    order = np.argsort(labels_N, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(labels_N[order]) != 0))
    sizes = np.diff(np.append(starts, len(order)))
    first = events["ts_us"][0]
    result = {name: events[name][event_T] for name in CATEGORICAL}
    result["ts_us"] = first + floor_means(events["ts_us"][order] - first, starts, sizes)
    for name in KNOWN_MEANS:
        values = events[name][order]
        known = values != UNKNOWN
        counts = np.add.reduceat(known.astype(np.int64), starts)
        averages = floor_means(np.where(known, values, 0), starts, np.maximum(counts, 1))
        result[name] = np.where(counts > 0, averages, UNKNOWN)
    result["weights"] = sizes.astype(np.int32)
    in_time = np.lexsort((event_T, result["ts_us"]))
    return {name: values[in_time] for name, values in result.items()}


def floor_means(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [T]: floor(sum / count) of each run of `values`, exactly, without a sum that could overflow."""
    each = np.repeat(counts, np.diff(np.append(starts, len(values))))
    return np.add.reduceat(values // each, starts) + np.add.reduceat(values % each, starts) // counts
