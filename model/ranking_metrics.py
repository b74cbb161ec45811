"""Recall and NDCG of ranked lists, and how sure one can be of them.

Every positive target is one observation with one relevant item: recall@k is 1 if the item is among the first k,
NDCG@k is 1 / log2(rank + 2) there, rank counted from 0 (the ideal gain is 1). Intervals resample users, not targets,
since the targets of one user are not independent; all systems are resampled together, so that the interval of a
difference is a paired one (Efron and Tibshirani, 1993, percentile method).

Shapes: R requests, K list depth, T targets, C columns (a system's metric each), U users, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MISS = np.iinfo(np.int64).max
CHUNK = 100  # resamples whose user weights are held at a time


@dataclass(frozen=True)
class Estimate:
    """A mean with the bounds of its interval."""

    value: float
    low: float
    high: float


def target_ranks(ranked_RK: Tensor, target_rows_T: Tensor, target_items_T: Tensor) -> np.ndarray:
    """int64 [T]: the place of each target's item in its request's list, from 0; MISS where it is not there.

    An item of -1 (the catalogue does not know it) is always a miss, and never meets the lists' padding of -1.
    """
    hit_TK = (ranked_RK[target_rows_T] == target_items_T[:, None]) & (target_items_T >= 0)[:, None]
    place_T = hit_TK.to(torch.uint8).argmax(1)
    return torch.where(hit_TK.any(1), place_T, MISS).numpy()


def recall_at(ranks_T: np.ndarray, k: int) -> np.ndarray:
    """float64 [T]."""
    return (ranks_T < k).astype(np.float64)


def ndcg_at(ranks_T: np.ndarray, k: int) -> np.ndarray:
    """float64 [T]."""
    inside = np.minimum(ranks_T, k).astype(np.float64)  # MISS + 2 would overflow
    return np.where(ranks_T < k, 1.0 / np.log2(inside + 2.0), 0.0)


def columns_of(ranks_T: np.ndarray, cutoffs: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The per-target values of every metric, named recall@k and ndcg@k."""
    recall = {f"recall@{k}": recall_at(ranks_T, k) for k in cutoffs}
    return recall | {f"ndcg@{k}": ndcg_at(ranks_T, k) for k in cutoffs}


def bootstrap_means(values_TC: np.ndarray, users_T: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """float64 [B, C]: the mean of every column when the users are drawn anew, with replacement.

    A drawn user brings all his targets; all columns share the draws.
    """
    _, user_T = np.unique(users_T, return_inverse=True)
    num_users = int(user_T.max(initial=-1)) + 1
    order = np.argsort(user_T, kind="stable")
    starts = np.searchsorted(user_T[order], np.arange(num_users))
    with_count = np.column_stack([values_TC, np.ones(len(values_TC))])
    sums_UC = np.add.reduceat(with_count[order], starts, axis=0) if num_users else with_count[:0]
    generator = np.random.default_rng(seed)
    means = []
    for done in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - done)
        totals = user_weights(generator, size, num_users).astype(np.float64) @ sums_UC
        means.append(totals[:, :-1] / totals[:, -1:])
    return np.concatenate(means)


def user_weights(generator: np.random.Generator, resamples: int, num_users: int) -> np.ndarray:
    """int64 [B, U]: how often each user is drawn, with replacement, as many as there are."""
    drawn = generator.integers(num_users, size=(resamples, num_users)) + num_users * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * num_users).reshape(resamples, num_users)


def estimates(values_TC: np.ndarray, draws_BC: np.ndarray, confidence: float) -> list[Estimate]:
    """Mean and percentile interval of each column."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws_BC, [tail, 1 - tail], axis=0)
    return [Estimate(float(v), float(a), float(b)) for v, a, b in zip(values_TC.mean(0), low, high, strict=True)]
