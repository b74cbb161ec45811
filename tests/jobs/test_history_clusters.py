"""Compression of one history: against brute force where an answer is defined, as invariants where it is chosen."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.history_clusters import CATEGORICAL, Arrays, compress, cube_root, hierarchy, lloyd, means, nearest, points_of
from schemas.config import LifelongConfig

NEAR = 1e-9
SEEDS = st.integers(0, 2**32 - 1)


def random_history(seed: int, most: int = 60) -> tuple[Arrays, Arrays]:
    """Events in any order with tied times, repeated items, unknown plays; items of which some share a vector, on a coarse
    grid full of equal distances, and some have none."""
    rng = np.random.default_rng(seed)
    events, items = int(rng.integers(1, most)), int(rng.integers(1, 40))
    item_ids = rng.permutation(1000)[:items]
    known = np.flatnonzero(rng.random(items) < 0.8)
    history = {
        "impression_ids": rng.permutation(10**6)[:events],
        "item_ids": item_ids[rng.integers(0, items, events)],
        "author_ids": rng.integers(-1, 5, events),
        "ts_us": 1_700_000_000_000_000 + rng.integers(0, 30, events) * 10**13,
        "play_ms": np.where(rng.random(events) < 0.4, -1, rng.integers(0, 10**6, events)),
        "duration_ms": np.where(rng.random(events) < 0.4, -1, rng.integers(1, 10**6, events)),
        "feedback": rng.integers(0, 512, events).astype(np.int32),
    }
    return history, {"item_ids": item_ids[known], "vectors": rng.integers(-2, 3, (len(known), 3)).astype(np.float32)}


def in_order(history: Arrays, newest: int) -> list[dict[str, int]]:
    rows = [dict(zip(history, map(int, values), strict=True)) for values in zip(*history.values(), strict=True)]
    return sorted(rows, key=lambda row: (row["ts_us"], row["impression_ids"]))[-newest:]


def vector_of(vectors: Arrays, item: int) -> tuple[float, ...]:
    place = np.flatnonzero(vectors["item_ids"] == item)
    return tuple(vectors["vectors"][place[0]].tolist()) if len(place) else (0.0, 0.0, 0.0)


def floor_mean(values: list[int]) -> int:
    known = [value for value in values if value != -1]
    return sum(known) // len(known) if known else -1


@given(SEEDS, st.integers(1, 30), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_a_compressed_history_is_that_of_brute_force_over_its_clusters(seed: int, tokens: int, max_cluster: int) -> None:
    """Given which points stand together: representatives, means, weights, order and the events that count."""
    history, vectors = random_history(seed)
    chosen = LifelongConfig(history=45, tokens=tokens, max_cluster=max_cluster, iterations=3)
    made = compress(history, vectors, chosen)
    rows = in_order(history, chosen.history)
    assert made["weights"].sum() == len(rows)
    assert len(made["weights"]) <= tokens
    assert made["weights"].dtype == made["feedback"].dtype == np.int32
    expected = reference(rows, vectors, chosen)
    assert [list(row) for row in zip(*(made[name].tolist() for name in made), strict=True)] == [
        [row[name] for name in made] for row in expected
    ]


def reference(rows: list[dict[str, int]], vectors: Arrays, chosen: LifelongConfig) -> list[dict[str, int]]:
    if len(rows) <= chosen.tokens:
        return [row | {"weights": 1} for row in rows]
    points = points_of(np.array([row["item_ids"] for row in rows]), vectors["item_ids"], vectors["vectors"])
    labels = hierarchy(points.x_PD, points.weights_P, chosen)
    clusters = defaultdict(list)
    for place, row in enumerate(rows):
        clusters[labels[points.of_event_N[place]]].append((place, row))
    made = []
    for members in clusters.values():
        x = np.array([vector_of(vectors, row["item_ids"]) for _, row in members])
        away = ((x - x.mean(axis=0)) ** 2).sum(axis=1)
        place, row = max(members[i] for i in np.flatnonzero(away <= away.min() + NEAR))
        average = {name: floor_mean([r[name] for _, r in members]) for name in ("ts_us", "play_ms", "duration_ms")}
        made.append((average["ts_us"], place, row | average | {"weights": len(members)}))
    return [row for _, _, row in sorted(made, key=lambda entry: entry[:2])]


@given(SEEDS, st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_the_order_of_events_and_of_vectors_changes_nothing(seed: int, tokens: int) -> None:
    history, vectors = random_history(seed)
    rng = np.random.default_rng(seed + 1)
    shuffled, turned = rng.permutation(len(history["ts_us"])), rng.permutation(len(vectors["item_ids"]))
    chosen = LifelongConfig(history=45, tokens=tokens)
    one = compress(history, vectors, chosen)
    other = compress({n: v[shuffled] for n, v in history.items()}, {n: v[turned] for n, v in vectors.items()}, chosen)
    assert {name: values.tolist() for name, values in one.items()} == {n: v.tolist() for n, v in other.items()}


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_events_share_a_point_exactly_where_their_vectors_are_equal(seed: int) -> None:
    history, vectors = random_history(seed)
    points = points_of(history["item_ids"], vectors["item_ids"], vectors["vectors"])
    wanted = [vector_of(vectors, item) for item in history["item_ids"]]
    assert [tuple(row) for row in points.x_PD[points.of_event_N].tolist()] == wanted
    assert len(points.x_PD) == len(set(wanted))
    assert points.weights_P.tolist() == np.bincount(points.of_event_N).tolist()


@given(SEEDS, st.integers(2, 40), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_a_set_splits_until_it_is_small_enough_or_the_budget_is_spent(seed: int, tokens: int, max_cluster: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.unique(rng.integers(-3, 4, (int(rng.integers(2, 40)), 2)), axis=0).astype(np.float64)
    weights = rng.integers(1, 6, len(x))
    labels = hierarchy(x, weights, LifelongConfig(tokens=tokens, max_cluster=max_cluster))
    sizes, points = np.bincount(labels, weights), np.bincount(labels)
    assert points.min() >= 1  # numbered without a gap
    assert len(sizes) <= tokens
    assert len(sizes) == tokens or ((sizes <= max_cluster) | (points == 1)).all()


@given(SEEDS, st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_every_point_ends_with_its_nearest_mean(seed: int, k: int) -> None:
    """Labels and means by brute force over all pairs, and that Lloyd stops at a fixed point."""
    rng = np.random.default_rng(seed)
    x = np.unique(rng.integers(-4, 5, (40, 2)), axis=0).astype(np.float64) / 3
    weights = rng.integers(1, 5, len(x))
    labels = lloyd(x, weights, k, iterations=200)
    centres = means(x, weights, labels, x[:k])
    for cluster in set(labels.tolist()):
        repeated = np.repeat(x[labels == cluster], weights[labels == cluster], axis=0)
        assert np.allclose(centres[cluster], repeated.mean(axis=0), rtol=0, atol=NEAR)
    assert len(set(labels.tolist())) > 1
    away = ((x[:, None] - centres[None]) ** 2).sum(axis=2)
    least = away[:, sorted(set(labels.tolist()))].min(axis=1)
    assert (away[np.arange(len(x)), labels] <= least + NEAR).all()
    block = rng.integers(-4, 5, (7, 2)).astype(np.float64)
    whole = np.rint(x * 3)
    assert nearest(whole, block).tolist() == ((whole[:, None] - block[None]) ** 2).sum(axis=2).argmin(axis=1).tolist()


def test_a_long_history_of_one_item_is_one_token() -> None:
    events = 5_000
    history = {name: np.full(events, 7) for name in ("author_ids", "play_ms", "duration_ms", "item_ids")}
    history |= {"ts_us": np.arange(events) * 10**12, "impression_ids": np.arange(events), "feedback": np.arange(events)}
    for vectors in (np.ones((1, 4), np.float32), np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32)):
        made = compress(history, {"item_ids": np.full(len(vectors), 7), "vectors": vectors}, LifelongConfig())
        assert {name: values.tolist() for name, values in made.items()} == {
            **{name: [7] for name in ("author_ids", "play_ms", "duration_ms", "item_ids")},
            "feedback": [events - 1],  # of the newest
            "ts_us": [sum(range(events)) * 10**12 // events],
            "weights": [events],
        }


def test_separate_topics_never_share_a_token() -> None:
    """Vectors of six topics far apart, from half of the events to a fiftieth."""
    rng = np.random.default_rng(3)
    topic = rng.choice(6, 3_000, p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02])
    vectors = (100 * np.eye(6)[topic] + rng.normal(size=(3_000, 6))).astype(np.float32)
    history = {name: np.arange(3_000) for name in ("impression_ids", "item_ids", "ts_us", "play_ms", "duration_ms")}
    history |= {"author_ids": topic, "feedback": np.zeros(3_000, np.int32)}
    made = compress(history, {"item_ids": np.arange(3_000), "vectors": vectors}, LifelongConfig(tokens=300))
    weight = {author: int(made["weights"][made["author_ids"] == author].sum()) for author in range(6)}
    assert weight == dict(enumerate(np.bincount(topic).tolist()))
    assert set(made) == {*CATEGORICAL, "ts_us", "play_ms", "duration_ms", "weights"}


@pytest.mark.parametrize("root", [1, 2, 3, 10, 46, 100, 1000])
def test_the_cube_root_is_exact(root: int) -> None:
    assert [cube_root(root**3 - 1), cube_root(root**3), cube_root(root**3 + 1)] == [root - 1, root, root]
