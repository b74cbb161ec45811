"""Items scored directly: a full softmax over the catalogue, and the ranking of both scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.fused_ranking import fused_scores
from model.ranker import Ranker, best_of
from model.trie import Trie
from schemas.model_config import ModelConfig, MoeConfig
from tests.model.requests import catalogue, only_row, random_requests, small_decoder

ITEMS = catalogue(40)
HEAD = {"item_head": True, "fields": ("item", "author", "gap")}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "lazy": {},
    "session": {"target": "session"},
    "encoder-decoder": {"architecture": "encoder_decoder", "encoder_layers": 1},
    "decoder-only": {"architecture": "decoder_only"},
    "experts": {"moe": MoeConfig(experts=4, active=2, shared=1, width=16, first_dense=1)},
}


def trie_of(items) -> Trie:
    return Trie(items.codes[:-1], torch.arange(len(items)), [8] * 3)


def of_every_item(requests, score) -> torch.Tensor:
    """[R, N]: `score` of each request with each item as its only target."""
    alone = [only_row(requests, row, 0) for row in range(len(requests))]
    asked = [[replace(one, target_items=torch.tensor([item])) for item in range(len(ITEMS))] for one in alone]
    return torch.stack([torch.stack([score(one) for one in row]) for row in asked])


def item_log_probs(decoder, requests) -> torch.Tensor:
    return of_every_item(requests, lambda one: -decoder(one, ITEMS, scored=True).item_nll)


def code_log_probs(decoder, requests) -> torch.Tensor:
    return of_every_item(requests, lambda one: decoder.target_log_probs(one, ITEMS).sum())


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_beam_as_wide_as_the_catalogue_ranks_by_both(name: str, share: float) -> None:
    decoder = small_decoder(**HEAD, **ARCHITECTURES[name]).eval()
    decoder.item_head.share.fill_(share)
    requests = random_requests(4, 40)
    truth = share * item_log_probs(decoder, requests) + (1 - share) * code_log_probs(decoder, requests)
    ranking = Ranker(decoder, ITEMS, trie_of(ITEMS)).ranking(requests, 40, 64)
    for row in range(4):
        assert sorted(ranking.items[row].tolist()) == list(range(40))
        assert torch.allclose(ranking.scores[row], truth[row].sort(descending=True).values, atol=1e-4)
        assert torch.allclose(ranking.scores[row], truth[row, ranking.items[row]], atol=1e-4)


@torch.no_grad()
def test_candidates_come_once_with_both_scores_and_masks_hold_for_both_ways() -> None:
    decoder = small_decoder(**HEAD).eval()
    requests = random_requests(6, 40, history=9)
    ranker, withheld = Ranker(decoder, ITEMS, trie_of(ITEMS)), torch.arange(40) % 5 == 0
    items, codes = item_log_probs(decoder, requests), code_log_probs(decoder, requests)
    found = ranker.candidates(requests, 6, exclude_history=True, withheld=withheld)
    for row in range(6):
        start, end = requests.history_offsets[row : row + 2].tolist()
        out = set(requests.history_items[start:end].tolist()) | set(withheld.nonzero()[:, 0].tolist())
        chosen = [item for item in found.items[row].tolist() if item >= 0]
        assert len(set(chosen)) == len(chosen) and not out & set(chosen)
        allowed = torch.tensor([item for item in range(40) if item not in out])
        best = allowed[items[row, allowed].topk(6).indices]
        assert set(best.tolist()) <= set(chosen)  # the head's own best are all there
        there = found.items[row] >= 0
        assert torch.allclose(found.item_log_probs[row, there], items[row, found.items[row, there]], atol=1e-4)
        assert torch.allclose(found.code_log_probs[row, there].sum(1), codes[row, found.items[row, there]], atol=1e-4)
    assert torch.isneginf(fused_scores(found, 0.0)[found.items < 0]).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_codes_that_cannot_matter_are_left_out_and_the_best_are_the_same(name: str) -> None:
    decoder = small_decoder(**HEAD, **ARCHITECTURES[name]).eval()
    for head in decoder.heads:
        head.weight.mul_(8)  # codes that differ: else every candidate could be among the best
    decoder.item_head.share.fill_(0.3)
    requests, ranker = random_requests(12, 40, history=9), Ranker(decoder, ITEMS, trie_of(ITEMS))
    everything, needed = ranker.candidates(requests, 6), ranker.candidates(requests, 6, best=4)
    left_out = (everything.code_log_probs != needed.code_log_probs).any(2)
    assert left_out.any() and torch.equal(everything.items, needed.items)
    assert (needed.code_log_probs >= everything.code_log_probs - 1e-5).all()
    whole, ranking = best_of(everything, fused_scores(everything, 0.3), 4), ranker.ranking(requests, 4, 6)
    assert torch.equal(ranking.items, whole.items)
    assert torch.allclose(ranking.log_probs, whole.log_probs, atol=1e-5)


def test_a_model_of_which_the_length_is_a_scalar_is_read() -> None:
    earlier = small_decoder(**HEAD)
    earlier.item_head.length.data.fill_(7.0)
    saved = earlier.state_dict()
    saved["item_head.length"] = saved["item_head.length"][0]
    decoder = small_decoder(1, **HEAD)
    decoder.load_state_dict(saved)
    assert decoder.item_head.length.tolist() == [7.0]


def test_the_head_alone_ranks_as_the_search_with_codes_that_count_for_nothing() -> None:
    decoder = small_decoder(**HEAD).eval()
    decoder.item_head.share.fill_(1.0)
    requests, ranker = random_requests(6, 40, history=9), Ranker(decoder, ITEMS, trie_of(ITEMS))
    for k, exclude in ((5, False), (5, True), (50, True)):
        found = ranker.candidates(requests, 50, exclude)
        searched = best_of(found, fused_scores(found, 1.0), k)
        ranking = ranker.ranking(requests, k, 50, exclude)
        assert torch.equal(ranker.rank(requests, k, 50, exclude), searched.items)
        assert torch.equal(ranking.items, searched.items)
        assert torch.allclose(ranking.log_probs, searched.log_probs, atol=1e-4)


def test_the_loss_is_a_full_softmax_and_teaches_the_tables_of_the_context() -> None:
    decoder = small_decoder(**HEAD)
    requests = random_requests(8, 40)
    decoder(requests, ITEMS, scored=True).item_nll.backward()
    found = decoder.context.fields.items.weight.grad.clone()
    decoder.zero_grad()
    states = []
    handle = decoder.item_head.norm.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    decoder(requests, ITEMS, scored=True)
    handle.remove()
    vectors = decoder.item_vectors(ITEMS)
    liked = decoder.liked(requests, vectors)[requests.target_rows()]
    logits = (decoder.item_head.query(states[0]) + liked) @ vectors.T
    F.cross_entropy(logits, requests.target_items).backward()
    assert torch.allclose(decoder.context.fields.items.weight.grad, found, atol=1e-6)
    rows = decoder.context.fields.items.places(ITEMS.ids[:-1])
    assert (found[rows].abs().sum(1) > 0).all()  # a softmax over all items moves all of them


def test_an_items_vector_is_its_id_and_unless_left_out_its_codes() -> None:
    decoder, alone = small_decoder(**HEAD), small_decoder(**HEAD, item_head_codes=False)
    ids = decoder.context.fields.items(ITEMS.ids[:-1])
    starts, small = decoder.context.fields.starts, decoder.context.fields.small
    codes = sum(small(ITEMS.codes[:-1, level] + starts[level]) for level in range(3))
    assert torch.allclose(decoder.item_vectors(ITEMS), ids + codes, atol=1e-6)
    assert torch.equal(alone.item_vectors(ITEMS), alone.context.fields.items(ITEMS.ids[:-1]))


def test_what_was_liked_is_the_newest_engaged_items_by_age() -> None:
    decoder = small_decoder(**HEAD).eval()
    head, requests = decoder.item_head, random_requests(6, 40, history=30)
    vectors = decoder.item_vectors(ITEMS)
    for row, liked in enumerate(decoder.liked(requests, vectors)):
        start, end = requests.history_offsets[row : row + 2].tolist()
        events = zip(requests.history_items[start:end], requests.history_feedback[start:end], strict=True)
        engaged = [int(item) for item, bits in events if int(bits) & decoder.engaged_mask]
        newest = [item for item in engaged[-decoder.config.positive_length :] if item >= 0][::-1]
        total = sum((head.ages[age] * vectors[item] for age, item in enumerate(newest)), torch.zeros(vectors.shape[1]))
        assert torch.allclose(liked, head.recent(head.length * F.normalize(total, dim=0)), atol=1e-5)


def test_an_item_head_needs_the_items_field() -> None:
    with pytest.raises(ValueError, match="needs `item` among"):
        ModelConfig(item_head=True)
    assert small_decoder().item_head is None
    assert small_decoder()(random_requests(2, 40), ITEMS, scored=True).item_nll is None
