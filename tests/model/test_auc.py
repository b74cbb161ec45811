"""AUC and GAUC equal counting pairs, with users drawn several times or not at all; histories equal brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.auc import aucs, drawn_users, gaucs
from model.recent_positives import recent_positives


def by_counting(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    won = total = 0.0
    for i in np.flatnonzero(labels):
        for j in np.flatnonzero(~labels):
            pair = weights[i] * weights[j]
            won += pair * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
            total += pair
    return won / total if total else np.nan


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_aucs_count_pairs(seed: int, impressions: int, users: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, impressions).astype(np.float32)
    labels, user = rng.random(impressions) < 0.4, rng.integers(0, users, impressions)
    weight_BU = drawn_users(users, 3, seed)
    assert weight_BU[0].tolist() == [1] * users and (weight_BU.sum(1) == users).all()
    expected = [by_counting(scores, labels, weights[user]) for weights in weight_BU]
    np.testing.assert_allclose(aucs(scores, labels, user, weight_BU), expected)
    own = [by_counting(scores[user == u], labels[user == u], np.ones(impressions)) for u in range(users)]
    known = [u for u in range(users) if not np.isnan(own[u])]
    for weights, found in zip(weight_BU, gaucs(scores, labels, user, weight_BU), strict=True):
        sizes = [weights[u] * (user == u).sum() for u in known]
        mean = np.average([own[u] for u in known], weights=sizes) if sum(sizes) else np.nan
        assert found == pytest.approx(mean, nan_ok=True)


@given(st.integers(0, 10_000), st.integers(0, 25), st.integers(0, 10), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_histories_end_strictly_before_the_moment(seed: int, positives: int, moments: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    users_P, ts_P, items_P = rng.integers(0, 4, positives), rng.integers(0, 8, positives), rng.permutation(positives)
    users_I, before_I = rng.integers(0, 5, moments), rng.integers(-1, 10, moments)
    found = recent_positives(users_I, before_I, users_P, ts_P, items_P, length)
    for user, before, row in zip(users_I, before_I, found.tolist(), strict=True):
        earlier = [(ts_P[p], p) for p in range(positives) if users_P[p] == user and ts_P[p] < before]
        newest = [int(items_P[p]) for _, p in sorted(earlier, reverse=True)][:length]
        assert row == newest + [-1] * (length - len(newest))
