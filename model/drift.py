"""Whether a frozen codebook still fits the items that are appended to it, by what it was fitted on.

Three measures of the appended items, each beside what no shift would give:
- residual norms after each level. Items of the fit pull their centroids towards themselves, so their own residuals are too
  small a yardstick: with N items on U codes the mean square of items not seen is about (N + U) / (N - U) times as large a
  level (the residual variance of a fit with U free means, and their errors). Where U = N there is no yardstick.
- the Jensen-Shannon divergence (nats, at most ln 2) of the use of each level's codes. Few items use few codes, so the mean
  of divergences by chance is taken off: those of as many items drawn from both sets together.
- the share of items whose codes an item of the fit has, beside the share of the fit's items that share theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.nearest import label_distances
from model.rq_kmeans import Codebook

DRAWS = 50  # by which the divergence by chance is known to a few per cent


@dataclass(frozen=True)
class CodebookUse:
    """What a set of items makes of a codebook."""

    items: int
    squares_L: np.ndarray  # float64 [L], squared residual norms after each level, summed over the items
    counts_LK: np.ndarray  # int64 [L, K], items a code


@dataclass(frozen=True)
class LevelDrift:
    """One level of a report."""

    residual: float  # root mean square of the residual norms
    expected: float  # of items not seen without a shift; infinite where the fit tells nothing
    divergence: float  # nats
    by_chance: float  # nats

    @property
    def growth(self) -> float:
        """The residual by what was expected."""
        return self.residual / self.expected if self.expected else 1.0

    @property
    def excess(self) -> float:
        """Divergence beyond chance, in nats."""
        return max(0.0, self.divergence - self.by_chance)


def codebook_use(codebook: Codebook, x_ND: Tensor, codes_NL: np.ndarray) -> CodebookUse:
    """Of rows `x_ND` (float32) with the codebook's codes."""
    residual_ND, squares = x_ND.clone(), []
    for centroids_KD, codes_N in zip(codebook.centroids, torch.from_numpy(codes_NL).long().unbind(1), strict=True):
        squares.append(float(label_distances(residual_ND, centroids_KD, codes_N).sum()))
        residual_ND -= centroids_KD[codes_N]
    return CodebookUse(len(x_ND), np.array(squares), code_counts(codes_NL, codebook.codes))


def code_counts(codes_NL: np.ndarray, k: int) -> np.ndarray:
    """int64 [L, K]: items a code."""
    return np.stack([np.bincount(codes_N, minlength=k) for codes_N in codes_NL.T])


def level_drifts(fitted: CodebookUse, appended: CodebookUse, seed: int = 0) -> list[LevelDrift]:
    """One a level; both sets have at least one item."""
    rng = np.random.default_rng(seed)
    found, growth = [], 1.0
    for level, (then_K, now_K) in enumerate(zip(fitted.counts_LK, appended.counts_LK, strict=True)):
        used = np.count_nonzero(then_K)
        growth *= (fitted.items + used) / (fitted.items - used) if used < fitted.items else np.inf
        seen = fitted.squares_L[level] / fitted.items
        found.append(
            LevelDrift(
                float(np.sqrt(appended.squares_L[level] / appended.items)),
                float(np.sqrt(seen * growth)) if np.isfinite(growth) else np.inf,
                divergence(then_K, now_K),
                divergence_by_chance(then_K, now_K, rng),
            )
        )
    return found


def divergence(a_K: np.ndarray, b_K: np.ndarray) -> float:
    """Jensen-Shannon divergence in nats of two counts over the same codes."""
    p, q = a_K / a_K.sum(), b_K / b_K.sum()
    mean = (p + q) / 2
    terms = [np.where(x > 0, x * np.log(np.where(x > 0, x, 1) / np.where(x > 0, mean, 1)), 0).sum() for x in (p, q)]
    return float(sum(terms) / 2)


def divergence_by_chance(then_K: np.ndarray, now_K: np.ndarray, rng: np.random.Generator) -> float:
    """The mean divergence of random parts of both sets together, one of them as large as the second set."""
    both_K = then_K + now_K
    draws = rng.multivariate_hypergeometric(both_K, int(now_K.sum()), size=DRAWS, method="marginals")
    return float(np.mean([divergence(both_K - draw_K, draw_K) for draw_K in draws]))


def known_codes(codes_NL: np.ndarray, held_ML: np.ndarray) -> np.ndarray:
    """bool [N]: whether any of `held_ML` has the same codes."""
    _, names = np.unique(np.concatenate([codes_NL, held_ML]), axis=0, return_inverse=True)
    names = names.reshape(-1)
    return np.isin(names[: len(codes_NL)], names[len(codes_NL) :])
