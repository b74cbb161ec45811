"""ItemKNN: items that the same users liked, scored by the items of the history (Sarwar et al., 2001).

Similarity is the cosine of co-occurrence, c_ij / (sqrt(n_i n_j) + shrinkage), where a pair of positives of a user
counts `DISTANCE_DECAY ** (distance - 1)` up to `WINDOW` positives apart, so that the work grows with the log and not
with the square of a history. `directed` counts only pairs in which j came after i; on sequential data it is by far the
stronger (Ludewig and Jannach, 2018, call it sequential rules). Which one is used is chosen on validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from model.popularity import Popularity
from model.positives import Positives, ScoreRanker, history_positives
from model.requests import Requests, row_of

WINDOW = 20
DISTANCE_DECAY = 0.9
HISTORY = 100  # newest positives of a request that are read
FALLBACK = 1e-6  # weight of popularity in (0, 1]: orders ties and items without a similar one


@dataclass(frozen=True)
class KnnSettings:
    """`recency`: weight of a history item is recency ** age, 0 being the newest."""

    neighbours: int = 200
    recency: float = 0.8
    shrinkage: float = 5.0
    directed: bool = False


def co_occurrence(positives: Positives, directed: bool) -> sparse.csr_array:
    """float64 [N, N]: (i, j) holds the weight of the pairs in which j came after i, or either way round."""
    rows = positives.rows
    shape = (positives.num_items, positives.num_items)
    total = sparse.csr_array(shape, dtype=np.float64)
    for distance in range(1, WINDOW + 1):
        same_user = rows[distance:] == rows[:-distance]
        earlier, later = positives.items[:-distance][same_user], positives.items[distance:][same_user]
        distinct = earlier != later
        weight = np.full(int(distinct.sum()), DISTANCE_DECAY ** (distance - 1))
        total = total + sparse.csr_array((weight, (earlier[distinct], later[distinct])), shape=shape)
    return total if directed else both_ways(total)


def both_ways(pairs: sparse.csr_array) -> sparse.csr_array:
    """Pairs whatever the order of their items."""
    return sparse.csr_array(pairs + pairs.T)


def nearest(pairs: sparse.csr_array, counts: np.ndarray, shrinkage: float, sizes: Sequence[int]) -> list[sparse.csr_array]:
    """For each of `sizes`, float32 [N, N]: each item's most similar ones, at most so many a row; sorted once for all.

    Ties go to the lower index.
    """
    pairs.sort_indices()
    entries = pairs.tocoo()
    first, second = entries.coords
    similarity = entries.data / (np.sqrt(counts[first] * counts[second]) + shrinkage)
    # One stable sort of one key is several times as fast as a lexicographic one: rows ascend, similarity descends.
    order = np.argsort(first + 1.0 - similarity / (1.001 * similarity.max(initial=1e-300)), kind="stable")
    first, second, values = first[order], second[order], similarity[order].astype(np.float32)
    place = np.arange(len(first)) - np.searchsorted(first, np.arange(len(counts)))[first]
    return [
        sparse.csr_array((values[place < size], (first[place < size], second[place < size])), shape=pairs.shape)
        for size in sizes
    ]


class ItemKnn(ScoreRanker):
    """Score of item j: the sum over history items i of recency ** age(i) * similarity(i, j)."""

    def __init__(self, similarity: sparse.csr_array, recency: float, popularity: Popularity, positive_mask: int) -> None:
        self.similarity, self.recency, self.positive_mask = similarity, recency, positive_mask
        self.fallback_N = popularity.places_N * (FALLBACK / popularity.num_items)

    @classmethod
    def fit(cls, positives: Positives, settings: KnnSettings, positive_mask: int) -> ItemKnn:
        pairs = co_occurrence(positives, settings.directed)
        similarity = nearest(pairs, positives.counts, settings.shrinkage, [settings.neighbours])[0]
        return cls(similarity, settings.recency, Popularity(positives), positive_mask)

    @property
    def num_items(self) -> int:
        return len(self.fallback_N)

    def scores(self, requests: Requests) -> Tensor:
        items, offsets = history_positives(requests, self.positive_mask)
        rows = row_of(offsets)
        age = offsets[1:][rows] - 1 - torch.arange(len(items))
        near = age < HISTORY
        weight = torch.pow(torch.tensor(self.recency, dtype=torch.float64), age[near]).to(torch.float32)
        entries = (weight.numpy(), (rows[near].numpy(), items[near].numpy()))
        history = sparse.csr_array(entries, shape=(len(requests), self.num_items))
        scores_RN = torch.from_numpy((history @ self.similarity).toarray())
        return scores_RN.add_(self.fallback_N)
