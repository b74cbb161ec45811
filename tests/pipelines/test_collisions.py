"""The rules of collisions on made-up days: one id an item, appending moves nobody, days one by one equal one pass."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.rq_kmeans import Codebook, encode
from model.trie import Trie
from pipelines.collisions import HEADROOM, Coded, before_settling, id_sizes, settled
from schemas.config import TokenizeConfig

DAY = np.datetime64("2026-01-01")
RULES = ("rank", "level", "nearest_free")
Ids = dict[int, tuple[int, ...]]


class Days:
    """Items of a few days near few points, so that most of them collide, and a pass over some of the days."""

    def __init__(self, rule: str, sizes: list[int], codes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.settings = TokenizeConfig(levels=2, codes=codes, collisions=rule)  # type: ignore[arg-type]
        self.codebook = Codebook([torch.from_numpy(rng.normal(size=(codes, 3)).astype(np.float32)) for _ in range(2)])
        self.vectors = rng.integers(-1, 2, (sum(sizes), 3)).astype(np.float32)
        ids, places = rng.permutation(sum(sizes)), np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        self.place_of = {int(item): place for place, item in enumerate(ids)}
        self.parts = [
            Coded(
                ids[place].astype(np.int64),
                encode(self.codebook, torch.from_numpy(self.vectors[place])).numpy(),
                np.full(len(place), DAY + day),
                rng.integers(0, 3, len(place)) if day == 0 else np.zeros(len(place), np.int64),
            )
            for day, place in enumerate(places)
        ]
        self.sizes = id_sizes(self.settings, self.parts[0].codes)

    def settle(self, earlier: list[Coded], parts: list[Coded]) -> tuple[Coded, np.ndarray]:
        def vectors(day: np.datetime64, ids: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(self.vectors[[self.place_of[int(item)] for item in ids]])

        return settled(self.settings.collisions, self.codebook, self.sizes[-1], earlier, parts, vectors)

    def one_pass(self, days: int | None = None) -> Ids:
        return as_ids(*self.settle([], self.parts[:days]))

    def day_by_day(self) -> Ids:
        items, rank = self.settle([], self.parts[:1])
        for part in self.parts[1:]:
            codes, counts = before_settling(self.settings.collisions, items.codes, rank)
            # The table keeps no order of rows.
            earlier = dataclasses.replace(items, codes=codes, counts=counts)
            mixed = np.argsort(earlier.item_ids)
            earlier = Coded(*(getattr(earlier, f.name)[mixed] for f in dataclasses.fields(Coded)))
            items, rank = self.settle([earlier], [part])
        return as_ids(items, rank)


def as_ids(items: Coded, rank: np.ndarray) -> Ids:
    return {int(i): (*c, int(r)) for i, c, r in zip(items.item_ids, items.codes.tolist(), rank, strict=True)}


SIZES = st.lists(st.integers(1, 25), min_size=1, max_size=4)


@pytest.mark.parametrize("rule", RULES)
@given(sizes=SIZES, codes=st.integers(1, 6), seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_every_item_has_one_id_and_appending_moves_nobody(rule: str, sizes: list[int], codes: int, seed: int) -> None:
    days = Days(rule, sizes, codes, seed)
    whole = days.one_pass()
    assert sorted(whole) == list(range(sum(sizes)))
    assert len(set(whole.values())) == len(whole)
    assert days.day_by_day() == whole
    for count in range(1, len(sizes)):
        part = days.one_pass(count)
        assert part == {item: whole[item] for item in part}


@pytest.mark.parametrize("rule", RULES)
@given(sizes=SIZES, codes=st.integers(1, 6), seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_every_path_of_the_trie_leads_to_items_and_ranks_count_from_0(
    rule: str, sizes: list[int], codes: int, seed: int
) -> None:
    days = Days(rule, sizes, codes, seed)
    items, rank = days.settle([], days.parts)
    assert items.codes.shape[1] == len(days.sizes) and items.codes.min() >= 0
    assert (items.codes < days.sizes).all()
    trie = Trie(torch.from_numpy(items.codes), torch.from_numpy(rank), days.sizes)
    below, offsets = trie.items(torch.arange(trie.sizes[-1]))
    assert (offsets.diff() > 0).all() and sorted(below.tolist()) == list(range(len(items)))
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert rank[below[first:last].numpy()].tolist() == list(range(last - first))


@given(sizes=SIZES, codes=st.integers(1, 6), seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_nearest_free_shares_codes_only_when_all_are_held(sizes: list[int], codes: int, seed: int) -> None:
    """And who comes first at codes that nobody held before keeps them."""
    days = Days("nearest_free", sizes, codes, seed)
    items, rank = days.settle([], days.parts)
    assert len({tuple(c) for c in items.codes.tolist()}) == min(len(items), codes**2)
    assert (rank == 0).all() or len(items) > codes**2
    own = np.concatenate([part.codes for part in days.parts])
    first = days.parts[0]
    popular = {}
    for place in np.lexsort((first.item_ids, -first.counts)):
        popular.setdefault(tuple(own[place]), place)
    assert all(tuple(items.codes[place]) == code for code, place in popular.items())


@given(sizes=SIZES, codes=st.integers(1, 6), seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_a_further_level_holds_the_rank_up_to_its_last_code(sizes: list[int], codes: int, seed: int) -> None:
    days, plain = Days("level", sizes, codes, seed), Days("rank", sizes, codes, seed)
    ids, by_rank = days.one_pass(), plain.one_pass()
    for item, (*own, place) in by_rank.items():
        assert ids[item] == (*own, min(place, days.sizes[-1] - 1), max(0, place - days.sizes[-1] + 1))
    largest = max(place for *_, place in plain.one_pass(1).values()) + 1
    assert days.sizes == (codes, codes, max(codes, HEADROOM * largest))
    assert all(rank == 0 for *_, rank in days.one_pass(1).values())
