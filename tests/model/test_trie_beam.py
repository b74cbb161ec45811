"""The trie against sets of prefixes, beam search against enumeration, and items in their order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.beam import beam_search, legality, rank_items
from model.item_table import build_item_table
from model.ranker import Ranker
from model.trie import Trie
from tests.model.requests import catalogue, only_row, random_requests, small_decoder

SIZES = (5, 7, 6)  # codes of each level
CODES = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40)


@given(CODES, st.sampled_from([0, 2**20]))
@settings(max_examples=60, deadline=None)
def test_a_trie_knows_the_prefixes_and_items_of_its_catalogue(codes: list[tuple[int, ...]], cells: int) -> None:
    ranks = [codes[:i].count(c) for i, c in enumerate(codes)]
    trie = Trie(torch.tensor(codes), torch.tensor(ranks), SIZES, table_cells=cells)
    prefixes = [sorted({c[:level] for c in codes}) for level in range(4)]
    assert trie.sizes == tuple(len(p) for p in prefixes)
    for level in range(3):
        nodes = torch.arange(len(prefixes[level]))
        mask = trie.children_mask(level, torch.cat([nodes, torch.tensor([-1])]))
        wanted = [[(*p, k) in prefixes[level + 1] for k in range(SIZES[level])] for p in prefixes[level]]
        assert mask[:-1].tolist() == wanted and not mask[-1].any()
    every = torch.tensor(list(itertools.product(*map(range, SIZES))))
    leaves = trie.find(every)
    for triple, leaf in zip(every.tolist(), leaves.tolist(), strict=True):
        assert leaf == (prefixes[3].index(tuple(triple)) if tuple(triple) in prefixes[3] else -1)
        members = sorted((rank, i) for i, (c, rank) in enumerate(zip(codes, ranks, strict=True)) if c == tuple(triple))
        assert trie.items(torch.tensor([leaf]))[0].tolist() == [i for _, i in members]


@given(CODES, st.integers(1, 12), st.integers(0, 5), st.sampled_from([(8, 8, 8), SIZES]))
@settings(max_examples=25, deadline=None)
def test_every_generated_triple_is_a_real_item(
    codes: list[tuple[int, ...]], beam: int, seed: int, sizes: tuple[int, ...]
) -> None:
    decoder = small_decoder(seed, sizes).eval()
    table = build_item_table(
        torch.arange(len(codes)),
        torch.tensor(codes),
        torch.zeros(len(codes)).long(),
        torch.zeros(len(codes), 3).long(),
        torch.ones(len(codes), 3).bool(),
        sizes,
        50,
    )
    trie = Trie(torch.tensor(codes), torch.zeros(len(codes)), sizes)
    requests = random_requests(4, len(codes), seed)
    beams = beam_search(decoder, decoder.encode(requests, table), trie, beam)
    filled = beams.leaves >= 0
    assert torch.equal(filled, beams.scores.isfinite())
    assert {tuple(c) for c in beams.codes[filled].tolist()} <= set(codes)
    assert (filled.sum(1) == min(filled.shape[1], len(set(codes)))).all() or beam < len(set(codes))
    assert torch.equal(trie.find(beams.codes)[filled], beams.leaves[filled])
    for row in beams.codes.tolist():
        kept = [tuple(c) for c, real in zip(row, filled[0].tolist(), strict=True) if real]
        assert len(kept) == len(set(kept))


@pytest.mark.parametrize("changes", [{}, {"g_kv": 1}, {"s_kv": 2, "l_kv": 2}])
def test_a_beam_as_wide_as_the_catalogue_ranks_exactly(changes: dict) -> None:
    table = catalogue(40)
    decoder = small_decoder(**changes).eval()
    trie = Trie(table.codes[:-1], torch.arange(40), [8] * 3)
    requests = random_requests(5, 40)
    ranked, scores, _ = rank_items(beam_search(decoder, decoder.encode(requests, table), trie, 64), trie, 40)
    for row in range(5):
        exact = exact_scores(decoder, requests, table, row)
        assert sorted(ranked[row].tolist()) == list(range(40))
        assert torch.allclose(scores[row], exact[ranked[row]], atol=1e-5)
        assert torch.allclose(scores[row], exact.sort(descending=True).values, atol=1e-5)


def exact_scores(decoder, requests, table, row: int) -> torch.Tensor:
    """The log-probability of every item of the catalogue as the next one of a request, by teacher forcing."""
    alone = only_row(requests, row)
    alone.target_items = torch.arange(len(table))
    alone.target_offsets = torch.tensor([0, len(table)])
    with torch.no_grad():
        return decoder.target_log_probs(alone, table).sum(1)


def test_items_that_share_codes_follow_by_rank_and_exclusions_are_left_out() -> None:
    codes = torch.tensor([[1, 2, 3]] * 3 + [[4, 5, 6]])
    absent = torch.ones(4, 3).bool()
    table = build_item_table(torch.arange(4), codes, torch.zeros(4).long(), torch.zeros(4, 3).long(), absent, [8] * 3, 50)
    trie = Trie(codes, torch.tensor([2, 0, 1, 0]), [8] * 3)
    requests = random_requests(6, 4, history=4)
    ranker = Ranker(small_decoder(), table, trie)
    ranked = ranker.rank(requests, k=5, beam=3)
    for row in ranked.tolist():
        assert row in ([1, 2, 0, 3, -1], [3, 1, 2, 0, -1])
    fresh = ranker.rank(requests, k=5, beam=3, exclude_history=True)
    for row in range(6):
        start, end = requests.history_offsets[row : row + 2].tolist()
        seen = set(requests.history_items[start:end].tolist())
        wanted = [item for item in ranked[row].tolist() if item >= 0 and item not in seen]
        assert [item for item in fresh[row].tolist() if item >= 0] == wanted
    withheld = ranker.ranking(requests, k=4, beam=3, withheld=torch.tensor([False, True, False, False]))
    assert not (withheld.items == 1).any()
    assert torch.allclose(withheld.log_probs.sum(-1)[:, :3], withheld.scores[:, :3], atol=1e-5)


def test_free_generation_reports_the_share_of_real_items() -> None:
    table = catalogue(10)
    trie = Trie(table.codes[:-1], torch.zeros(10), [8] * 3)
    ranker = Ranker(small_decoder(), table, trie)
    beams = ranker.search(random_requests(3, 10), beam=512, free=True)
    assert beams.codes.shape == (3, 512, 3)  # 8^3: everything there is
    assert legality(beams.codes, trie) == pytest.approx(len(table.codes[:-1].unique(dim=0)) / 512)
    assert legality(ranker.search(random_requests(3, 10), beam=4).codes, trie) == 1
