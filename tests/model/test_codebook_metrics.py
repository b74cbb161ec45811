"""Measures of a codebook against counting by hand, item by item."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.codebook_metrics import (
    LevelUse,
    collisions,
    hourglass,
    level_use,
    prefix_labels,
    prefix_use,
    purity,
    rebuilt,
    reconstruction,
)
from model.rq_kmeans import encode, fit
from schemas.config import TokenizeConfig

K = 6
CODES = st.integers(1, 3).flatmap(
    lambda levels: st.lists(st.tuples(*[st.integers(0, K - 1)] * levels), min_size=1, max_size=30)
)
TAGS = st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 3), max_size=3)), min_size=1, max_size=12)


def nats(counts: Counter) -> float:
    return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())


@given(CODES)
def test_use_of_a_level_agrees_with_counting(items: list[tuple[int, ...]]) -> None:
    codes = torch.tensor(items, dtype=torch.int32)
    for level in range(codes.shape[1]):
        use, counts = level_use(codes[:, level], K), Counter(item[level] for item in items)
        every = [counts[code] for code in range(K)]
        apart = sum(abs(a - b) for a, b in itertools.product(every, every))
        assert use.utilisation == pytest.approx(len(counts) / K)
        assert use.entropy == pytest.approx(nats(counts), abs=1e-12)
        assert use.perplexity == pytest.approx(math.exp(nats(counts)))
        assert use.gini == pytest.approx(apart / (2 * K * len(items)))  # half the mean difference over the mean
        assert use.top_share == pytest.approx(max(every) / len(items))  # 1 % of six codes is one


def test_the_top_percent_of_many_codes() -> None:
    codes = torch.tensor([7] * 50 + [8] * 30 + [9] * 20 + list(range(100)))
    assert level_use(codes, 100).top_share == pytest.approx(51 / 200)
    assert level_use(codes, 200).top_share == pytest.approx(82 / 200)


@given(CODES)
def test_prefixes_and_collisions_agree_with_counting(items: list[tuple[int, ...]]) -> None:
    codes = torch.tensor(items)
    labels = prefix_labels(codes)
    for length, use in enumerate(prefix_use(codes, [K] * codes.shape[1]), 1):
        counts = Counter(item[:length] for item in items)
        shorter = Counter(item[: length - 1] for item in items)
        sizes = sorted(counts.values())
        assert (use.prefixes, use.items_max) == (len(counts), sizes[-1])
        assert use.items_mean == pytest.approx(len(items) / len(counts))
        for percent, found in ((50, use.items_p50), (99, use.items_p99)):  # the least size that so many reach
            assert found == next(s for s in sizes if sum(z <= s for z in sizes) * 100 >= percent * len(sizes))
        given_before = -sum(n * math.log(n / shorter[p[:-1]]) for p, n in counts.items()) / len(items)
        assert use.conditional_entropy == pytest.approx(given_before, abs=1e-9)
        ceiling = sum(n * math.log(min(n, K)) for n in shorter.values()) / len(items)
        assert use.conditional_ceiling == pytest.approx(ceiling, abs=1e-9)
        assert use.conditional_entropy <= use.conditional_ceiling + 1e-9
        for a, b in itertools.product(range(len(items)), repeat=2):
            assert (labels[length - 1][a] == labels[length - 1][b]) == (items[a][:length] == items[b][:length])
    counts = Counter(items)
    shared = collisions(codes)
    assert shared.rate == pytest.approx(sum(n for n in counts.values() if n > 1) / len(items))
    assert (shared.distinct, shared.largest) == (len(counts), max(counts.values()))


def pairs_of(items: list[tuple[int, set[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Buckets, owners and tags of items given as (bucket, tags)."""
    pairs = [(place, tag) for place, (_, tags) in enumerate(items) for tag in sorted(tags)]
    owners, tags = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return torch.tensor([bucket for bucket, _ in items]), owners, tags


def by_hand(items: list[tuple[int, set[int]]]) -> float:
    """Purity, bucket by bucket."""
    tagged = [(bucket, tags) for bucket, tags in items if tags]
    buckets = {bucket for bucket, _ in tagged}
    most = [max(Counter(t for b, tags in tagged if b == bucket for t in tags).values()) for bucket in buckets]
    return sum(most) / len(tagged)


@given(TAGS)
def test_purity_agrees_with_counting(items: list[tuple[int, set[int]]]) -> None:
    found = purity(*pairs_of(items))
    if not any(tags for _, tags in items):
        assert found is None
        return
    assert found is not None
    assert found.items == sum(bool(tags) for _, tags in items)
    assert found.share == pytest.approx(by_hand(items))
    assert 0 < found.chance <= 1 and found.adjusted <= 1


def test_chance_is_the_mean_over_all_shuffles() -> None:
    items = [(0, {0}), (0, {0, 1}), (0, {0}), (1, {1}), (1, {2}), (2, {3}), (2, set())]
    tagged = [(bucket, tags) for bucket, tags in items if tags]
    shuffled = [by_hand([(b, t) for (b, _), t in zip(tagged, o, strict=True)]) for o in permutations_of(tagged)]
    found = purity(*pairs_of(items), shuffles=3000)
    assert found is not None
    assert found.chance == pytest.approx(np.mean(shuffled), abs=0.01)
    assert found.adjusted == pytest.approx((found.share - found.chance) / (1 - found.chance))


def permutations_of(tagged: list[tuple[int, set[int]]]) -> list[tuple[set[int], ...]]:
    return list(itertools.permutations([tags for _, tags in tagged]))


def test_buckets_of_one_item_are_pure_by_chance_alone() -> None:
    labels, tags = torch.arange(40), torch.arange(40) % 4
    alone = purity(labels, torch.arange(40), tags)
    assert alone is not None and (alone.share, alone.chance, alone.adjusted) == (1.0, 1.0, 0.0)
    topics = purity(tags, torch.arange(40), tags)
    assert topics is not None and topics.share == topics.adjusted == 1.0 and topics.chance < 0.6


def use(perplexity: float, top_share: float) -> LevelUse:
    return LevelUse(1.0, math.log(perplexity), perplexity, 0.0, top_share)


def test_an_hourglass_is_a_middle_level_both_narrow_and_concentrated() -> None:
    wide = use(200, 0.02)
    assert hourglass([wide, use(1, 1.0)]) is None
    for middle, found in ((use(150, 0.1), True), (use(150, 0.02), False), (use(170, 0.1), False)):
        verdict = hourglass([wide, middle, wide])
        assert verdict is not None
        assert (verdict.level, verdict.found, verdict.waist) == (2, found, pytest.approx(middle.perplexity / 200))
    falling = hourglass([use(300, 0.01), use(150, 0.1), use(100, 0.2)])  # narrows all the way: no waist
    assert falling is not None and not falling.found
    later = hourglass([use(300, 0.01), wide, use(100, 0.2), wide])
    assert later is not None and later.found and later.level == 3


def test_reconstruction_is_the_loss_that_the_fit_ended_with() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 7, generator=generator) * torch.arange(1, 8)
    settings = TokenizeConfig(levels=3, codes=9, iterations=8)
    result = fit(x.clone(), torch.arange(300), settings)
    for level in range(1, 4):
        found = reconstruction(x, rebuilt(result.codebook.centroids[:level], result.codes_NL))
        assert found.loss == pytest.approx(result.inertia[level - 1][-1] / 300, rel=1e-4)
        assert found.variance == pytest.approx(float(x.numpy().var(axis=0).sum()), rel=1e-5)
        assert found.relative == pytest.approx(found.loss / found.variance)
    assert torch.equal(rebuilt(result.codebook.centroids, encode(result.codebook, x)[:5]), rebuilt_alone(result, 5))
    nothing = reconstruction(torch.ones(3, 2), torch.ones(3, 2))
    assert (nothing.loss, nothing.relative) == (0, 0)
    assert reconstruction(torch.ones(3, 2), torch.zeros(3, 2)).relative == math.inf


def rebuilt_alone(result, rows: int) -> Tensor:
    centroids = result.codebook.centroids
    parts = [sum(c[result.codes_NL[row, level]] for level, c in enumerate(centroids)) for row in range(rows)]
    return torch.stack(parts)
