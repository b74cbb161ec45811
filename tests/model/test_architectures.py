"""What holds for every architecture behind the interface: the lazy decoder in its variants, and its peers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.attention import QueryLayout
from model.beam import beam_search, rank_items
from model.requests import Requests
from model.trie import Trie
from schemas.model_config import MoeConfig
from tests.model.requests import catalogue, only_row, random_requests, small_decoder
from tests.model.test_trie_beam import exact_scores

ITEMS = catalogue(30)
EXPERTS = MoeConfig(experts=4, active=2, width=8, first_dense=1)
ENCODER_DECODER = {"architecture": "encoder_decoder", "encoder_layers": 2}
QUERIES = {"lifelong_length": 5, "lifelong_queries": 3}
SHAPES: dict[str, dict[str, object]] = {
    "lazy": {},
    "lazy, grouped": {"g_kv": 1},
    "lazy, separate values": {"s_kv": 2},
    "lazy, two pairs": {"l_kv": 2, "layers": 4},
    "lazy, two separate pairs, grouped": {"s_kv": 2, "l_kv": 2, "g_kv": 1},
    "lazy with experts": {"moe": EXPERTS},
    "encoder-decoder": ENCODER_DECODER,
    "encoder-decoder, grouped": ENCODER_DECODER | {"g_kv": 1},
    "encoder-decoder with experts": ENCODER_DECODER | {"moe": dataclasses.replace(EXPERTS, encoder=True)},
    "decoder-only": {"architecture": "decoder_only"},
    "decoder-only, grouped": {"architecture": "decoder_only", "g_kv": 1},
    "lazy, lifelong": {"lifelong_length": 5},
    "lazy, lifelong queries": QUERIES,
    "encoder-decoder, lifelong queries": ENCODER_DECODER | QUERIES,
    "decoder-only, lifelong": {"architecture": "decoder_only", "lifelong_length": 5},
}
SESSIONS = {f"{name}, session": change | {"target": "session"} for name, change in SHAPES.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_targets_together_equal_targets_one_by_one(name: str) -> None:
    requests = random_requests(8, 30, seed=2, least=0)
    decoder = small_decoder(**SHAPES[name]).eval()
    together = decoder(requests, ITEMS).logits
    at = 0
    for row in range(len(requests)):
        for target in range(int(requests.target_offsets[row + 1] - requests.target_offsets[row])):
            alone = decoder(only_row(requests, row, target), ITEMS).logits
            for level in range(3):
                assert torch.allclose(together[level][at], alone[level][0], atol=1e-5)
            at += 1
    assert at == len(requests.target_items)
    decoder.loss(requests, ITEMS).total.backward()
    unused = {n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not unused


def forget_items(requests: Requests) -> None:
    """No code of a target is in the context any more."""
    requests.history_items = torch.full_like(requests.history_items, -1)
    requests.lifelong_items = torch.full_like(requests.lifelong_items, -1)


@pytest.mark.parametrize("name", SHAPES)
def test_a_code_is_predicted_from_the_codes_before_it_alone(name: str) -> None:
    requests = random_requests(1, 30, targets=1)
    forget_items(requests)
    decoder = small_decoder(**SHAPES[name]).eval()
    for changed in range(3):
        codes = ITEMS.codes.clone()
        codes[requests.target_items[0], changed] = (codes[requests.target_items[0], changed] + 1) % 8
        other = dataclasses.replace(ITEMS, codes=codes)
        pairs = zip(decoder(requests, ITEMS).logits, decoder(requests, other).logits, strict=True)
        assert [torch.equal(a, b) for a, b in pairs] == [level <= changed for level in range(3)]


@pytest.mark.parametrize("name", SHAPES)
def test_garbage_in_padding_changes_no_score(name: str) -> None:
    requests = random_requests(6, 30, history=9)
    decoder = small_decoder(**SHAPES[name]).eval()
    kv = decoder.encode(requests, ITEMS)
    layout, codes = QueryLayout(len(requests), 1, None), torch.zeros(len(requests), 2, dtype=torch.long)
    clean, _ = decoder.hidden(decoder.embed(codes), kv, layout)
    padding = (kv.bias_R11T[:, 0, 0] < 0)[:, None, :, None]
    kv.pairs = [(k.masked_fill(padding, 1e4), v.masked_fill(padding, -1e4)) for k, v in kv.pairs]
    assert padding.any() and torch.equal(clean, decoder.hidden(decoder.embed(codes), kv, layout)[0])


@pytest.mark.parametrize("name", ["encoder-decoder", "decoder-only", *(name for name in SHAPES if "lifelong" in name)])
def test_a_request_in_a_batch_is_as_alone(name: str) -> None:
    requests = random_requests(6, 30, history=9)
    decoder = small_decoder(**SHAPES[name]).eval()
    whole = decoder(requests, ITEMS).logits
    firsts = requests.target_offsets[:-1]
    for row in range(6):
        alone = decoder(only_row(requests, row), ITEMS).logits
        assert torch.allclose(whole[2][firsts[row]], alone[2][0], atol=1e-5)


@pytest.mark.parametrize("name", [*SHAPES, *SESSIONS])
def test_a_beam_as_wide_as_the_catalogue_ranks_exactly(name: str) -> None:
    table = catalogue(40)
    changes = (SHAPES | SESSIONS)[name]
    decoder = small_decoder(**changes).eval()
    trie = Trie(table.codes[:-1], torch.arange(40), [8] * 3)
    requests = random_requests(3, 40)
    ranked, scores, _ = rank_items(beam_search(decoder, decoder.encode(requests, table), trie, 64), trie, 40)
    for row in range(3):
        if decoder.joined:  # item by item: a session of one
            exact = torch.cat([one_score(decoder, requests, table, row, item) for item in range(40)])
        else:
            exact = exact_scores(decoder, requests, table, row)
        assert torch.allclose(scores[row], exact[ranked[row]], atol=1e-5)
        assert torch.allclose(scores[row], exact.sort(descending=True).values, atol=1e-5)


def one_score(decoder, requests, table, row: int, item: int) -> torch.Tensor:
    alone = only_row(requests, row, 0)
    alone.target_items = torch.tensor([item])
    with torch.no_grad():
        return decoder.target_log_probs(alone, table).sum(1)


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_reads_the_items_before_and_none_after(name: str) -> None:
    requests = random_requests(4, 30, seed=5, targets=3, least=3)
    forget_items(requests)
    decoder = small_decoder(**SESSIONS[name]).eval()
    plain = decoder(requests, ITEMS).logits
    for changed in range(3):
        other = dataclasses.replace(requests, target_items=requests.target_items.clone())
        other.target_items[changed] = (other.target_items[changed] + 1) % 30  # in request 0
        moved = [
            [not torch.equal(a[i], b[i]) for i in range(12)]
            for a, b in zip(plain, decoder(other, ITEMS).logits, strict=True)
        ]
        assert not moved[0][changed]  # its own first code knows nothing of it
        assert all(level[later] for level in moved for later in range(changed + 1, 3))
        assert not any(level[i] for level in moved for i in range(12) if i < changed or i >= 3)
