import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.itemknn import DISTANCE_DECAY, WINDOW, ItemKnn, KnnSettings
from model.popularity import DAY_US, Popularity
from model.positives import Positives, take_rows
from tests.model.handmade_requests import LIKED, POSITIVE, SEEN, requests_by_hand

ITEMS = 7


def positives(sequences, num_items=ITEMS):
    users = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    ts_us = np.concatenate([np.arange(len(s)) for s in sequences])
    return Positives.of(users, ts_us, np.concatenate(sequences).astype(np.int64), num_items)


def brute_force_scores(sequences, history, settings, num_items=ITEMS):
    counts, pairs = np.zeros(num_items), np.zeros((num_items, num_items))
    for sequence in sequences:
        for j, later in enumerate(sequence):
            counts[later] += 1
            for i in range(max(0, j - WINDOW), j):
                if sequence[i] != later:
                    weight = DISTANCE_DECAY ** (j - i - 1)
                    pairs[sequence[i], later] += weight
                    if not settings.directed:
                        pairs[later, sequence[i]] += weight
    similarity = np.zeros_like(pairs)
    for i, j in zip(*pairs.nonzero(), strict=True):
        similarity[i, j] = pairs[i, j] / (math.sqrt(counts[i] * counts[j]) + settings.shrinkage)
    for row in similarity:
        row[np.argsort(-row, kind="stable")[settings.neighbours :]] = 0
    scores = np.zeros(num_items)
    for age, item in enumerate(reversed(history)):
        scores += settings.recency**age * similarity[item]
    return scores


sequences_of_items = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    sequences_of_items,
    st.lists(st.integers(0, ITEMS - 1), max_size=5),
    st.booleans(),
    st.sampled_from([0.5, 1.0]),
    st.integers(1, ITEMS),
)
def test_itemknn_equals_dense_brute_force(sequences, history, directed, recency, neighbours):
    chosen = KnnSettings(neighbours, recency, shrinkage=1.0, directed=directed)
    system = ItemKnn.fit(positives(sequences), chosen, POSITIVE)
    found = system.scores(requests_by_hand([[], history]))[1].numpy()
    np.testing.assert_allclose(found, brute_force_scores(sequences, history, chosen), atol=2e-6)


def test_ties_and_strangers_go_by_popularity():
    system = ItemKnn.fit(positives([[0, 1], [2, 3, 3], [4, 4, 4]]), KnnSettings(), POSITIVE)
    assert system.rank(requests_by_hand([[]]), 3).tolist() == [[4, 3, 0]]
    assert system.rank(requests_by_hand([[0]]), 3).tolist() == [[1, 4, 3]]


def test_only_liked_events_are_read_and_every_event_is_masked():
    system = ItemKnn.fit(positives([[0, 1], [0, 1], [2, 3], [2, 3], [2, 3]]), KnnSettings(), POSITIVE)
    requests = requests_by_hand([[0, 2]], feedback=[[LIKED, SEEN]])
    assert system.rank(requests, 1).tolist() == [[1]]  # 2 was not liked, so 3 does not come first
    masked = system.rank(requests, ITEMS, exclude_history=True)[0].tolist()
    assert set(masked) == {1, 3, 4, 5, 6, -1} and masked[-2:] == [-1, -1]


@settings(max_examples=40, deadline=None)
@given(sequences_of_items, st.lists(st.lists(st.integers(-1, ITEMS - 1), max_size=5), min_size=1, max_size=4))
def test_no_system_recommends_history(sequences, histories):
    requests = requests_by_hand(histories)
    for system in (Popularity(positives(sequences)), ItemKnn.fit(positives(sequences), KnnSettings(), POSITIVE)):
        for row, history in zip(system.rank(requests, ITEMS, True).tolist(), histories, strict=True):
            assert not set(row) & {item for item in history if item >= 0}
            assert len({item for item in row if item >= 0}) == ITEMS - len({item for item in history if item >= 0})


def test_chunks_change_nothing():
    system = ItemKnn.fit(positives([[0, 1, 2], [3, 2, 1], [5, 6]]), KnnSettings(), POSITIVE)
    requests = requests_by_hand([[0], [3, 5], [], [6, 1]])
    whole = system.rank(requests, 4, True)
    system.chunk_scores = 2 * ITEMS
    assert torch.equal(whole, system.rank(requests, 4, True))
    one_by_one = [system.rank(take_rows(requests, torch.tensor([row])), 4, True) for row in (3, 0)]
    assert torch.equal(whole[[3, 0]], torch.cat(one_by_one))


@settings(max_examples=60, deadline=None)
@given(arrays(np.int64, st.integers(1, 30), elements=st.integers(0, ITEMS - 1)))
def test_popularity_equals_a_count(items):
    system = Popularity(Positives.of(np.zeros(len(items), int), np.arange(len(items)), items, ITEMS))
    counts = [int((items == item).sum()) for item in range(ITEMS)]
    expected = sorted(range(ITEMS), key=lambda item: (-counts[item], item))
    assert system.rank(requests_by_hand([[]]), ITEMS)[0].tolist() == expected


def test_half_life_prefers_what_was_liked_lately():
    days = np.array([0, 0, 0, 4, 4])
    fitted = Positives.of(np.arange(5), days * DAY_US, np.array([1, 1, 1, 2, 2]), 3)
    assert Popularity(fitted).rank(requests_by_hand([[]]), 2).tolist() == [[1, 2]]
    assert Popularity(fitted, half_life_days=1.0).rank(requests_by_hand([[]]), 2).tolist() == [[2, 1]]


def test_positives_are_sorted_by_user_and_time_and_unknown_items_left_out():
    found = Positives.of(np.array([9, 4, 9, 4]), np.array([5, 2, 1, 2]), np.array([0, 1, 2, -1]), 3)
    assert found.items.tolist() == [1, 2, 0]
    assert found.offsets.tolist() == [0, 1, 3]
    assert found.counts.tolist() == [1, 1, 1]


def test_scores_are_finite_for_items_nobody_liked():
    system = ItemKnn.fit(positives([[0, 1]]), KnnSettings(shrinkage=0.0), POSITIVE)
    assert system.scores(requests_by_hand([[6]]))[0].isfinite().all()
    assert system.rank(requests_by_hand([[6]]), 10)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1, -1]
    assert pytest.approx(0, abs=1e-5) == float(system.scores(requests_by_hand([[6]])).max())
