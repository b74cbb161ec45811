import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ranking_metrics import MISS, bootstrap_means, columns_of, estimates, ndcg_at, recall_at, target_ranks

ITEMS, DEPTH = 9, 5


@st.composite
def ranked_targets(draw):
    """Lists of distinct items, padded by -1, and targets of them; -1 is an unknown item."""
    lists, rows, items = [], [], []
    for row in range(draw(st.integers(1, 4))):
        order = draw(st.permutations(range(ITEMS)))[: draw(st.integers(0, DEPTH))]
        lists.append(order + [-1] * (DEPTH - len(order)))
        targets = draw(st.lists(st.integers(-1, ITEMS - 1), max_size=3))
        rows += [row] * len(targets)
        items += targets
    return lists, rows, items


@settings(max_examples=80, deadline=None)
@given(ranked_targets(), st.integers(1, DEPTH))
def test_metrics_equal_a_count_by_hand(case, k):
    lists, rows, items = case
    ranks = target_ranks(torch.tensor(lists), torch.tensor(rows, dtype=torch.long), torch.tensor(items, dtype=torch.long))
    for row, item, rank, recall, ndcg in zip(rows, items, ranks, recall_at(ranks, k), ndcg_at(ranks, k), strict=True):
        place = lists[row].index(item) if item >= 0 and item in lists[row] else None
        assert rank == (MISS if place is None else place)
        hit = place is not None and place < k
        assert recall == float(hit)
        assert ndcg == pytest.approx(1 / math.log2(place + 2) if hit else 0.0)


def test_an_unknown_target_never_meets_the_padding():
    ranks = target_ranks(torch.tensor([[4, -1, -1]]), torch.tensor([0]), torch.tensor([-1]))
    assert recall_at(ranks, 3).sum() == ndcg_at(ranks, 3).sum() == 0


def test_columns_are_named_by_metric_and_cutoff():
    columns = columns_of(np.array([0, 7, MISS]), (5, 10))
    assert list(columns) == ["recall@5", "recall@10", "ndcg@5", "ndcg@10"]
    assert columns["recall@10"].tolist() == [1, 1, 0]


def test_bootstrap_equals_a_loop_over_drawn_users():
    generator = np.random.default_rng(1)
    users = generator.integers(100, 107, 40)
    values = generator.random((40, 2))
    found = bootstrap_means(values, users, resamples=150, seed=5)  # more than a chunk
    distinct = np.unique(users)
    replay = np.random.default_rng(5)
    drawn = np.concatenate([replay.integers(len(distinct), size=(n, len(distinct))) for n in (100, 50)])
    for mean, places in zip(found, drawn, strict=True):
        rows = np.concatenate([np.flatnonzero(users == distinct[place]) for place in places])
        np.testing.assert_allclose(mean, values[rows].mean(0))


def test_same_seed_same_intervals_and_row_order_does_not_matter():
    generator = np.random.default_rng(2)
    users, values = generator.integers(0, 30, 200), generator.random((200, 3))
    order = generator.permutation(200)
    first = bootstrap_means(values, users, 50, seed=9)
    np.testing.assert_allclose(first, bootstrap_means(values[order], users[order], 50, seed=9))
    assert not np.allclose(first, bootstrap_means(values, users, 50, seed=10))


def test_no_difference_covers_zero_and_pairing_narrows():
    generator = np.random.default_rng(3)
    users = np.repeat(np.arange(400), 2)
    taste = np.repeat(generator.random(400), 2)  # users differ much more than systems
    a = taste + 0.05 * generator.standard_normal(800)
    b = taste + 0.05 * generator.standard_normal(800)
    paired = bootstrap_means(np.column_stack([a, b]), users, 1000, seed=0)
    apart = bootstrap_means(b[:, None], users, 1000, seed=1)
    gap = estimates((a - b)[:, None], paired[:, :1] - paired[:, 1:], 0.95)[0]
    loose = estimates((a - b)[:, None], paired[:, :1] - apart, 0.95)[0]
    assert gap.low < 0 < gap.high
    assert gap.high - gap.low < (loose.high - loose.low) / 3


def test_users_are_resampled_and_not_targets():
    """Copies of one user's target carry no information: the interval stays as wide as with one each."""
    once = np.arange(50) % 2.0
    single = bootstrap_means(once[:, None], np.arange(50), 500, seed=4)
    copied = bootstrap_means(np.repeat(once, 20)[:, None], np.repeat(np.arange(50), 20), 500, seed=4)
    np.testing.assert_allclose(single, copied)


def test_the_interval_covers_a_known_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(6)
    covered = 0
    for trial in range(100):
        values = generator.random((120, 1)) < 0.3
        found = estimates(values * 1.0, bootstrap_means(values * 1.0, np.arange(120), 200, seed=trial), 0.9)[0]
        covered += found.low <= 0.3 <= found.high
    assert 80 <= covered <= 98
