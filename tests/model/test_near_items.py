"""The nearest items equal brute force by the truth, ties and equal vectors included, in any batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import near_items
from model.near_items import first_few_of_equals, listed_items, nearest_items
from model.nearest import squared_distances


def by_sorting(x_ND: torch.Tensor, items_MD: torch.Tensor, k: int, own_N: torch.Tensor) -> list[list[int]]:
    found = []
    for row, own in zip(x_ND, own_N.tolist(), strict=True):
        distance = squared_distances(row.expand(len(items_MD), -1), items_MD).tolist()
        places = sorted((d, place) for place, d in enumerate(distance) if place != own)
        found.append(([place for _, place in places] + [-1] * k)[:k])
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Few values, so that equal vectors and equal distances abound; and values where float32 products tell too little."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    items, width = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    values = rng.integers(-2, 3, (items, width)) * draw(st.sampled_from([1.0, 1e-3, 3e4]))
    vectors = torch.tensor(values + draw(st.sampled_from([0.0, 1e4])), dtype=torch.float32)
    if draw(st.booleans()):
        return vectors, vectors, draw(st.integers(1, 8)), torch.arange(items)
    own = torch.from_numpy(rng.integers(-1, items, 7))
    rows = vectors[torch.from_numpy(rng.integers(0, items, 7))] + torch.from_numpy(rng.integers(0, 2, (7, 1))).float()
    return rows, vectors, draw(st.integers(1, 8)), own


@given(cases(), st.sampled_from([1, 50, 1 << 25]))
@settings(max_examples=150, deadline=None)
def test_exact_search_is_brute_force(case: tuple[torch.Tensor, torch.Tensor, int, torch.Tensor], scores: int) -> None:
    held, near_items.SCORES = near_items.SCORES, scores  # the elements of a block change no answer
    try:
        assert nearest_items(*case).tolist() == by_sorting(*case)
    finally:
        near_items.SCORES = held


@given(cases())
@settings(max_examples=50, deadline=None)
def test_lists_that_are_all_probed_find_what_exact_search_finds(
    case: tuple[torch.Tensor, torch.Tensor, int, torch.Tensor],
) -> None:
    x_ND, items_MD, k, own_N = case
    distinct = torch.unique(items_MD, dim=0)
    items_MD, own_N = distinct, own_N.clamp(max=len(distinct) - 1)
    centroids_KD = torch.cat([distinct[:3], distinct[:1]])  # one of them twice, as seeds of few items are
    found = listed_items(x_ND, items_MD, k, own_N, centroids_KD, probes=4)
    truth = squared_distances(x_ND.repeat_interleave(len(distinct), 0), distinct.repeat(len(x_ND), 1)).view(len(x_ND), -1)
    for row, places in enumerate(by_sorting(x_ND, items_MD, k, own_N)):
        got = [p for p in found[row].tolist() if p >= 0]
        assert int(own_N[row]) not in got and len(set(got)) == len(got) == sum(p >= 0 for p in places)
        assert got == sorted(got, key=lambda p: (truth[row, p].item(), p))


def test_fewer_lists_find_a_part_and_nothing_else() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    own, exact = torch.arange(400), nearest_items(x, x, 10, torch.arange(400))
    shares = []
    for probes in (1, 4, 20):
        found = listed_items(x, x, 10, own, x[:20], probes)
        shares.append(float((found[:, :, None] == exact[:, None]).any(2)[exact >= 0].float().mean()))
        assert not (found == own[:, None]).any()
    assert shares[0] < shares[1] < shares[2] == 1.0


def test_no_more_equals_are_kept_than_can_be_nearest() -> None:
    items = torch.tensor([[1.0], [2.0], [1.0], [1.0], [3.0], [1.0], [2.0]])
    assert first_few_of_equals(items, 2).tolist() == [0, 1, 2, 4, 6]
