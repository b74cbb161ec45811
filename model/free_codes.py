"""Codes of its own for every item: those whose codes another item holds get the nearest free ones.

Rounds, coarser from one to the next: an item stays under the longest prefix of its own codes that still has a free place
below it, and goes down from there by the nearest code, level by level, whose subtree is not full. So no step turns back.
Within a round items come in the order given. Nearest is the truth of `model.nearest`: the float64 distance of the item's
residual at that level to the level's centroids, the lowest code on ties; float32 products only screen.
Cost: one row of K scores a moved item and level; work and memory grow with the moved items, and by 8 bytes an item held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from model.nearest import SCORES, blocks, margin, screen_scores, squared_distances
from model.rq_kmeans import Codebook


def free_codes(codebook: Codebook, x_MD: Tensor, codes_ML: np.ndarray, held_NL: np.ndarray) -> np.ndarray:
    """int32 [M, L]: free codes near each row of `x_MD` (float32), in the order of rows.

    `codes_ML` are the rows' own codes, `held_NL` what other items hold. Where all K^L are held a row keeps its own.
    """
    levels, k = codebook.levels, codebook.codes
    found_ML, left = codes_ML.astype(np.int32), np.arange(len(codes_ML))
    held = np.unique(keys_of(held_NL, k))
    for kept in reversed(range(levels)):
        if len(left) == 0 or len(held) == k**levels:
            break
        served = _round(codebook, x_MD, found_ML, left, kept, held)
        held = np.union1d(held, keys_of(found_ML[left[served]], k))
        left = left[~served]
    return found_ML


def keys_of(codes_NL: np.ndarray, k: int) -> np.ndarray:
    """int64 [N]: the codes as one number, in lexicographic order; K^L must lie below 2^63."""
    keys = np.zeros(len(codes_NL), np.int64)
    for codes_N in codes_NL.T:
        keys = keys * k + codes_N
    return keys


def _round(
    codebook: Codebook, x_MD: Tensor, found_ML: np.ndarray, left: np.ndarray, kept: int, held: np.ndarray
) -> np.ndarray:
    """bool [len(left)]: the rows that found a place below the first `kept` of their own codes, written to `found_ML`."""
    prefix = keys_of(found_ML[left, :kept], codebook.codes)
    order = np.argsort(prefix, kind="stable")
    served = np.zeros(len(left), bool)
    places: _Places | None = None
    for row, x_D, scores_K, reach in _screened(codebook, x_MD, found_ML, left[order], kept):
        place = order[row]
        if places is None or places.prefix != prefix[place]:
            places = _Places(int(prefix[place]), kept, codebook, held)
        codes = places.take(x_D, scores_K, reach)
        if codes is not None:
            found_ML[left[place], kept:], served[place] = codes, True
    return served


def _screened(
    codebook: Codebook, x_MD: Tensor, codes_ML: np.ndarray, rows: np.ndarray, kept: int
) -> Iterator[tuple[int, Tensor, np.ndarray, float]]:
    """Of each row its place, its residual after `kept` levels, and what `_nearest` screens by; made a block at a time."""
    centroids_KD = codebook.centroids[kept]
    for s in blocks(len(rows), len(centroids_KD), SCORES):
        residual_RD = x_MD[rows[s]].clone()
        for level in range(kept):
            residual_RD -= codebook.centroids[level][codes_ML[rows[s], level].astype(np.int64)]
        scores_RK, reach_R = _scores(residual_RD, centroids_KD)
        for place in range(s.stop - s.start):
            yield s.start + place, residual_RD[place], scores_RK[place], reach_R[place]


class _Places:
    """The free places below one prefix: of each node that a search has met, how many leaves below each code are held."""

    def __init__(self, prefix: int, kept: int, codebook: Codebook, held: np.ndarray) -> None:
        self.prefix, self.kept, self.codebook = prefix, kept, codebook
        below = codebook.codes ** (codebook.levels - kept)
        first, last = np.searchsorted(held, [prefix * below, (prefix + 1) * below])
        self.held = held[first:last]
        self.free = below - len(self.held)
        self.nodes: dict[tuple[int, int], np.ndarray] = {}
        self.taken: list[int] = []

    def take(self, residual_D: Tensor, scores_K: np.ndarray, reach: float) -> list[int] | None:
        """The codes from level `kept` on that lead to the nearest free place, which is then held; None where none is."""
        if self.free == 0:
            return None
        codes, node = [], self.prefix
        for level in range(self.kept, self.codebook.levels):
            centroids_KD = self.codebook.centroids[level]
            if level > self.kept:
                scores_1K, reach_1 = _scores(residual_D[None], centroids_KD)
                scores_K, reach = scores_1K[0], reach_1[0]
            counts_K = self._counts(level, node)
            full_K = counts_K == self.codebook.codes ** (self.codebook.levels - level - 1)
            code = _nearest(residual_D, centroids_KD, np.where(full_K, np.inf, scores_K), reach)
            counts_K[code] += 1
            codes.append(code)
            node = node * self.codebook.codes + code
            if level + 1 < self.codebook.levels:
                residual_D = residual_D - centroids_KD[code]
        self.taken.append(node)
        self.free -= 1
        return codes

    def _counts(self, level: int, node: int) -> np.ndarray:
        """int64 [K]: held leaves below each code of a node; made when first met, after which `take` keeps it up to date."""
        if (level, node) not in self.nodes:
            k, below = self.codebook.codes, self.codebook.codes ** (self.codebook.levels - level - 1)
            first, last = np.searchsorted(self.held, [node * k * below, (node + 1) * k * below])
            taken = [leaf for leaf in self.taken if leaf // (k * below) == node]
            leaves = np.concatenate([self.held[first:last], np.array(taken, np.int64)])
            self.nodes[level, node] = np.bincount(leaves // below % k, minlength=k)
        return self.nodes[level, node]


def _scores(x_RD: Tensor, centroids_KD: Tensor) -> tuple[np.ndarray, list[float]]:
    """float32 [R, K]: squared distances without the row's own square, and the gap [R] from which their order is sure."""
    return screen_scores(x_RD, centroids_KD).numpy(), margin(x_RD.norm(dim=1), centroids_KD).tolist()


def _nearest(x_D: Tensor, centroids_KD: Tensor, scores_K: np.ndarray, reach: float) -> int:
    """The nearest of the centroids whose score is finite."""
    near = np.flatnonzero(scores_K <= scores_K.min() + reach)
    if len(near) == 1:
        return int(near[0])
    return int(near[squared_distances(x_D.expand(len(near), -1), centroids_KD[near]).numpy().argmin()])
