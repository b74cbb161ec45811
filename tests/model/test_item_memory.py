"""The item head's memory: ItemKNN's scores as evidence, mixed with the head's belief."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from model.fused_ranking import HeadScores, best_by_head
from model.item_memory import FLATNESS, SHARPNESS, usual_evidence
from model.positives import take_rows
from model.ranker import Ranker
from model.trie import Trie
from schemas.model_config import ModelConfig
from tests.model.requests import catalogue, random_requests, small_decoder

N, OWN = 40, 25
ITEMS = catalogue(N)
HEAD = {"item_head": True, "fields": ("item",), "item_rows": 30}
RECENCY, USUAL = 0.7, 2.5


def similarities(seed: int = 0) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    return sparse.csr_array(rng.random((N, N)) * (rng.random((N, N)) < 0.2))


def filled(weight: float, neighbours: int = N):
    """A decoder whose memory knows the first OWN items alone."""
    decoder = small_decoder(**HEAD, item_neighbours=neighbours).eval()
    table, memory = decoder.context.fields.items, decoder.item_head.memory
    table.give_rows(ITEMS.ids[:OWN].flip(0))
    memory.fill(similarities(), RECENCY, table.own_rows(ITEMS.ids[:-1]))
    memory.usual.fill_(USUAL)
    memory.weight.fill_(weight)
    return decoder


def ranker_of(decoder) -> Ranker:
    return Ranker(decoder, ITEMS, Trie(ITEMS.codes[:-1], torch.arange(N), [8] * 3))


def head_log_probs(decoder, requests, recalled) -> torch.Tensor:
    """[R, N], by item."""
    ranker = ranker_of(decoder)
    queries = decoder.item_queries(requests, decoder.encode(requests, ITEMS), ranker.vectors_NE)
    every = torch.arange(N).expand(len(requests), N)
    return best_by_head(HeadScores(queries, ranker.vectors_NE, recalled), N, every, None, None)[2]


@torch.no_grad()
@pytest.mark.parametrize("neighbours", [N, 2])
def test_the_memory_is_itemknn_as_evidence(neighbours: int) -> None:
    decoder, requests = filled(0.3, neighbours), random_requests(9, N, history=15)
    similarity = similarities().toarray()
    similarity[OWN:], similarity[:, OWN:] = 0, 0
    for row in similarity:
        row[np.argsort(-row)[neighbours:]] = 0
    own = head_log_probs(decoder, requests, None).exp()
    belief = own.pow(FLATNESS) / own.pow(FLATNESS).sum(1, keepdim=True)
    mixed = head_log_probs(decoder, requests, decoder.recalled(requests, decoder.own_rows(ITEMS))).exp()
    totals = []
    for row in range(len(requests)):
        start, end = requests.history_offsets[row : row + 2].tolist()
        events = zip(requests.history_items[start:end], requests.history_feedback[start:end], strict=True)
        engaged = [int(item) for item, bits in events if int(bits) & decoder.engaged_mask]
        newest = engaged[-decoder.config.positive_length :][::-1]
        scores = sum((RECENCY**age * similarity[item] for age, item in enumerate(newest) if item >= 0), np.zeros(N))
        evidence = torch.from_numpy(scores).float() ** SHARPNESS / USUAL
        wanted = (0.3 * evidence + 0.7 * belief[row]) / (0.3 * evidence.sum() + 0.7)
        assert torch.allclose(mixed[row], wanted if scores.sum() else own[row], atol=1e-6)
        if scores.sum():
            totals.append(float(evidence.sum()) * USUAL)
    assert 0 < len(totals) < len(requests)
    ranker = ranker_of(decoder)
    scores = (each for rows in torch.arange(9).split(2) for each in ranker.recalled_scores(take_rows(requests, rows)))
    assert usual_evidence(scores) == pytest.approx(np.sort(totals)[(len(totals) - 1) // 2])


@torch.no_grad()
def test_weights_tried_together_rank_as_one_by_one() -> None:
    decoder, requests = filled(0.0), random_requests(9, N, history=15)
    decoder.item_head.share.fill_(1.0)
    ranker, weights = ranker_of(decoder), (0.0, 0.4, 0.9)
    together = ranker.rank_by_memory_weights(requests, weights, N + 2, exclude_history=True)
    assert not torch.equal(together[0], together[2])
    for weight, found in zip(weights, together, strict=True):
        decoder.item_head.memory.weight.fill_(weight)
        assert torch.equal(found, ranker.rank(requests, N + 2, beam=4, exclude_history=True))


def test_nothing_recalled_has_an_evidence_of_one() -> None:
    assert usual_evidence([]) == usual_evidence([torch.zeros(3, N)]) == 1


@torch.no_grad()
def test_without_weight_or_neighbours_the_head_keeps_its_own() -> None:
    requests = random_requests(9, N, history=15)
    for decoder in (filled(0.0), small_decoder(**HEAD, item_neighbours=3).eval()):
        recalled = decoder.recalled(requests, decoder.own_rows(ITEMS))
        assert torch.allclose(head_log_probs(decoder, requests, recalled), head_log_probs(decoder, requests, None))
    assert ranker_of(small_decoder(**HEAD)).rows_N is None


@torch.no_grad()
def test_an_answer_does_not_depend_on_the_batch_and_survives_the_weights() -> None:
    decoder, requests = filled(0.4), random_requests(30, N, history=15)
    other = small_decoder(seed=1, **HEAD, item_neighbours=N).eval()
    other.load_state_dict(decoder.state_dict())
    queries, vectors = torch.randn(30, 4), torch.randn(N, 4)
    whole = HeadScores(queries, vectors, decoder.recalled(requests, decoder.own_rows(ITEMS))).log_probs(slice(0, 30))
    loaded = HeadScores(queries, vectors, other.recalled(requests, other.own_rows(ITEMS)))
    assert torch.allclose(torch.cat([loaded.log_probs(slice(s, s + 7)) for s in range(0, 30, 7)]), whole)


def test_a_memory_needs_a_head_and_rows() -> None:
    with pytest.raises(ValueError, match=r"model\.item_neighbours"):
        ModelConfig(item_head=True, fields=("item",), item_neighbours=3)
    with pytest.raises(ValueError, match=r"model\.item_neighbours"):
        ModelConfig(fields=("item",), item_rows=3, item_neighbours=3)
