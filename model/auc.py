"""AUC and GAUC of click models, and both under resampled users.

AUC: the chance that a positive scores above a negative, half for equal scores (Mann and Whitney, 1947). GAUC: the mean of
the AUC within each user who has both, weighted by the user's impressions (Zhu et al., KDD 2017). Weights of users draw them
anew, as in `model.ranking_metrics`: all systems share the draws, so that a difference has a paired interval.

Shapes: I impressions, U users, B resamples, G groups of equal scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from model.ranking_metrics import user_weights

CHUNK_ELEMENTS = 10_000_000  # resamples x impressions held at a time


def aucs(scores_I: np.ndarray, labels_I: np.ndarray, users_I: np.ndarray, weight_BU: np.ndarray) -> np.ndarray:
    """float64 [B]: the AUC with every impression weighted by its user's weight; `users_I` are places in U, `labels_I` bool.

    NaN where the weights leave no positive or no negative.
    """
    order_I = np.argsort(scores_I, kind="stable")
    starts_G = run_starts(scores_I[order_I])
    users_I, labels_I = users_I[order_I], labels_I[order_I].astype(np.float64)
    found = []
    for part_BU in chunks(weight_BU, len(users_I)):
        weight_BI = part_BU[:, users_I].astype(np.float64)
        up_BG = np.add.reduceat(weight_BI * labels_I, starts_G, axis=1)
        down_BG = np.add.reduceat(weight_BI * (1 - labels_I), starts_G, axis=1)
        below_BG = np.cumsum(down_BG, axis=1) - down_BG / 2
        with np.errstate(invalid="ignore"):
            found.append((up_BG * below_BG).sum(1) / (up_BG.sum(1) * down_BG.sum(1)))
    return np.concatenate(found)


def gaucs(scores_I: np.ndarray, labels_I: np.ndarray, users_I: np.ndarray, weight_BU: np.ndarray) -> np.ndarray:
    """float64 [B]: the mean of the users' own AUCs, each weighted by impressions times the user's weight."""
    auc_U, size_U = user_aucs(scores_I, labels_I, users_I, weight_BU.shape[1])
    known_U = ~np.isnan(auc_U)
    weight_BU = weight_BU[:, known_U] * size_U[known_U]
    with np.errstate(invalid="ignore"):
        return (weight_BU @ auc_U[known_U]) / weight_BU.sum(1)


def user_aucs(
    scores_I: np.ndarray, labels_I: np.ndarray, users_I: np.ndarray, num_users: int
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [U] the AUC of each user, NaN without a positive or a negative, and int64 [U] impressions."""
    order_I = np.lexsort((scores_I, users_I))
    scores_I, labels_I, users_I = scores_I[order_I], labels_I[order_I].astype(np.int64), users_I[order_I]
    size_U = np.bincount(users_I, minlength=num_users)
    up_U = np.bincount(users_I, labels_I, minlength=num_users)
    starts_G = np.union1d(run_starts(scores_I), run_starts(users_I))
    lengths_G = np.diff(np.append(starts_G, len(users_I)))
    first_U = np.cumsum(size_U) - size_U
    rank_G = starts_G - first_U[users_I[starts_G]] + (lengths_G + 1) / 2  # mean rank of equal scores, from 1
    ranks_U = np.bincount(users_I, np.repeat(rank_G, lengths_G) * labels_I, minlength=num_users)
    down_U = size_U - up_U
    with np.errstate(invalid="ignore", divide="ignore"):
        auc_U = (ranks_U - up_U * (up_U + 1) / 2) / (up_U * down_U)
    return np.where(up_U * down_U > 0, auc_U, np.nan), size_U


def drawn_users(num_users: int, resamples: int, seed: int) -> np.ndarray:
    """int16 [1 + B, U]: how often each user is in a resample; the first row is the sample itself."""
    generator = np.random.default_rng(seed)
    drawn = user_weights(generator, resamples, num_users)
    return np.concatenate([np.ones((1, num_users)), drawn]).astype(np.int16)


def run_starts(sorted_I: np.ndarray) -> np.ndarray:
    """int64 [G]: where each run of equal values begins."""
    return np.flatnonzero(np.append(True, sorted_I[1:] != sorted_I[:-1])[: len(sorted_I)])


def chunks(weight_BU: np.ndarray, impressions: int) -> Iterator[np.ndarray]:
    step = max(1, CHUNK_ELEMENTS // max(1, impressions))
    return (weight_BU[start : start + step] for start in range(0, len(weight_BU), step))
