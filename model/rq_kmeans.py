"""RQ-Kmeans: semantic ids by exact K-means on residuals (OneRec-V1, section 2.1; OneRec-V2 uses the same tokenizer).

Level l clusters R^(l) into K_l codes, s^(l) = argmin_k |R^(l) - c_k|, R^(l+1) = R^(l) - c_{s^(l)}, in float32. An item's
codes are a function of its vector and the codebook alone, so appending items moves no code, and `encode` repeats the
labels of the fit bit for bit.

`settings.balance: relaxed` starts each level's Lloyd from clusters of a largest size. Where few items a code lie in a high
dimension, Lloyd from drawn centroids ends with one code that has many items and many codes that have one or two: a mean of
few rows is far from all others, so the large codes win them over. Even codes do not fall into that trap, and Lloyd, which
never raises the loss, keeps most of them even. Codes are nearest centroids all the same.

With equal (OneRec, arXiv 2502.18965: clusters of equal size) or capped (of a largest size) s^(l) of a fitted item is the
balanced assignment, and the residual subtracts the centroid of that code. Such codes depend on all items of the fit: keep
them, since `encode` gives nearest centroids, the papers' formula, which for a fitted item may be other codes. The same fit
again gives the same codes, for any shards and order. Appended items get nearest centroids and move no code; they are not
balanced, and an item whose vector equals a fitted one may get other codes than it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.balanced_kmeans import equal_kmeans
from model.capped_kmeans import capped_kmeans
from model.kmeans import Clusters, lloyd
from model.nearest import assign
from model.reduction import Alone, Reducer
from schemas.config import RqConfig
from schemas.errors import ContractViolation

START_ROUNDS = 10  # of Lloyd, and as many of capped clusters, before `relaxed` lets go


@dataclass(frozen=True)
class Codebook:
    """The frozen centroids, level by level, coarse to fine."""

    centroids: list[Tensor]  # float32 [K, D] each
    # int64 [K] each: the codes in the order of the fit, by which the first of several nearest centroids has a row; None: as
    # they are.
    order: list[Tensor] | None = None

    def nearest(self, residual_ND: Tensor, level: int, chunk: int) -> Tensor:
        """int64 [N]: the code of each residual at `level`, as the fit gives it."""
        if self.order is None:
            return assign(residual_ND, self.centroids[level], chunk)
        order_K = self.order[level].to(residual_ND.device)
        return order_K[assign(residual_ND, self.centroids[level][order_K], chunk)]

    @property
    def levels(self) -> int:
        return len(self.centroids)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The codes of each level."""
        return tuple(len(values) for values in self.centroids)

    @property
    def codes(self) -> int:
        """The codes of the largest level: no code reaches it."""
        return max(self.sizes)

    @property
    def width(self) -> int:
        return self.centroids[0].shape[1]


@dataclass(frozen=True)
class Fit:
    """What `fit` gives on each rank; everything but `codes_NL` is the same on all."""

    codebook: Codebook
    codes_NL: Tensor  # int32, of this rank's rows
    inertia: list[list[float]]  # of each level, at each iteration


@dataclass(frozen=True)
class Levels:
    """The levels fitted so far, from which a fit continues: residuals and nearest codes follow from the centroids."""

    centroids: list[Tensor]  # float32 [K, D] each
    inertia: list[list[float]]
    # int32 [N] each, of the items of all ranks by rising id: balanced codes, which no centroid tells; else empty.
    labels: list[Tensor] = field(default_factory=list)

    def upto(self, count: int) -> Levels:
        """The first `count` of them."""
        return Levels(self.centroids[:count], self.inertia[:count], self.labels[:count])


def fit(
    residual_ND: Tensor,
    ids_N: Tensor,
    settings: RqConfig,
    reducer: Reducer | None = None,
    earlier: Levels | None = None,
    after_level: Callable[[Levels], None] | None = None,
) -> Fit:
    """Fits the levels on the rows of all ranks. `residual_ND` float32 is consumed: it ends as the last residual.

    `ids_N` int64 are distinct over all ranks. A fit continues after the levels in `earlier`, the same on all ranks, and
    gives what one fit without a break gives; `after_level` is called where a further level is done. Raises
    ContractViolation without rows, with values that are not finite, and for more rows than `balance: equal` handles.
    """
    reducer, levels, codes = reducer or Alone(), earlier or Levels([], []), []
    ids, order = (ids_N, None) if settings.nearest else reducer.gather(ids_N).sort()
    for level in range(settings.levels):
        if level < len(levels.centroids):
            balanced = None if order is None else levels.labels[level][torch.searchsorted(ids, ids_N)].long()
            labels_N = assign(residual_ND, levels.centroids[level], settings.chunk) if balanced is None else balanced
        else:
            clusters = _clusters(residual_ND, ids_N, settings, level, reducer)
            labels_N = clusters.labels_N
            labels = [] if order is None else [*levels.labels, reducer.gather(labels_N.int())[order]]
            levels = Levels([*levels.centroids, clusters.centroids_KD], [*levels.inertia, clusters.inertia], labels)
            if after_level is not None:
                after_level(levels)
        residual_ND.sub_(levels.centroids[level][labels_N])
        codes.append(labels_N.int())
    return Fit(Codebook(levels.centroids), torch.stack(codes, 1), levels.inertia)


def _clusters(x_ND: Tensor, ids_N: Tensor, settings: RqConfig, level: int, reducer: Reducer) -> Clusters:
    """One level, by the way of `settings.balance`."""
    k, salt = settings.sizes[level], settings.seed * 1_000_003 + level
    if settings.balance == "equal":
        return equal_kmeans(x_ND, ids_N, k, salt=salt, iterations=settings.iterations, reducer=reducer)
    common: dict[str, Any] = {"tolerance": settings.tolerance, "chunk": settings.chunk, "reducer": reducer}
    capped = partial(capped_kmeans, x_ND, ids_N, k, slack=settings.balance_tolerance, salt=salt, **common)
    if settings.balance == "capped":
        return capped(iterations=settings.iterations)
    if settings.balance == "none":
        return lloyd(x_ND, ids_N, k, salt=salt, iterations=settings.iterations, **common)
    start = capped(iterations=min(START_ROUNDS, settings.iterations))
    found = lloyd(x_ND, ids_N, k, iterations=settings.iterations, first_KD=start.centroids_KD, **common)
    return replace(found, inertia=[*start.inertia, *found.inertia])


def encode(codebook: Codebook, x_ND: Tensor, chunk: int = 65_536) -> Tensor:
    """int32 [N, L]: nearest codes, level by level, of each row of `x_ND` (float32, left as it is).

    Raises ContractViolation at another width.
    """
    if x_ND.shape[1] != codebook.width:
        raise ContractViolation(
            f"Vectors of {x_ND.shape[1]} dimensions do not fit a codebook of {codebook.width}; "
            "run stages embed and tokenize with --force, so that both come from one configuration."
        )
    codes_NL = torch.empty(len(x_ND), codebook.levels, dtype=torch.int32, device=x_ND.device)
    for start in range(0, len(x_ND), chunk):
        residual_CD = x_ND[start : start + chunk].clone()
        for level, centroids_KD in enumerate(codebook.centroids):
            labels = codebook.nearest(residual_CD, level, chunk)
            residual_CD -= centroids_KD[labels]
            codes_NL[start : start + chunk, level] = labels.int()
    return codes_NL
