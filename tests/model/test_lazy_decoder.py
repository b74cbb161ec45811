"""The lazy decoder: parameters, loss by hand, compression of the common context, padding, learning."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.decoder import code_nll
from model.lazy_decoder import LazyDecoder
from model.requests import Requests
from tests.model.requests import ENGAGED, SMALL, catalogue, only_row, random_requests, small_decoder

ITEMS = catalogue(30)


def test_cross_attention_holds_two_square_matrices() -> None:
    for block in small_decoder(g_kv=1).blocks:
        assert sum(p.numel() for p in block.cross.parameters()) == 2 * SMALL.d_model**2


def test_blocks_hold_the_parameters_that_the_papers_names_imply() -> None:
    decoder = small_decoder()
    matrices = sum(p.numel() for p in decoder.blocks.parameters() if p.dim() == 2)
    assert matrices == (2 + 4 + 12) * SMALL.d_model**2 * SMALL.layers


def test_kv_layers_are_shared_by_consecutive_blocks() -> None:
    decoder = small_decoder(layers=4, l_kv=2)
    assert [decoder.kv_index(layer) for layer in range(4)] == [0, 0, 1, 1]


def test_loss_is_equation_ten() -> None:
    requests = random_requests(5, 30)
    decoder = small_decoder().eval()
    loss = decoder.loss(requests, ITEMS)
    total, count = 0.0, 0
    for row in range(len(requests)):
        for target in range(int(requests.target_offsets[row + 1] - requests.target_offsets[row])):
            alone = only_row(requests, row, target)
            codes = ITEMS.codes[alone.target_items[0]]
            logits = decoder(alone, ITEMS).logits
            total -= sum(torch.log_softmax(logits[i][0], 0)[codes[i]].item() for i in range(3)) / 3
            count += 1
    assert loss.targets == count
    assert loss.total.item() == pytest.approx(total / count, abs=1e-5)
    assert loss.per_level.mean().item() == pytest.approx(loss.total.item(), abs=1e-5)


def test_recomputed_activations_give_the_same_gradients() -> None:
    requests, gradients = random_requests(5, 30), []
    for recompute in (False, True):
        decoder = small_decoder(dropout=0.3)
        decoder.recompute = recompute
        torch.manual_seed(3)
        decoder.loss(requests, ITEMS).total.backward()
        gradients.append([p.grad for p in decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_empty_history_without_attributes_gives_finite_scores_and_gradients() -> None:
    nothing = torch.empty(0, dtype=torch.long)
    zeros = torch.zeros(3, dtype=torch.long)
    requests = Requests(
        torch.tensor([1, 2]), torch.tensor([5, 6]), zeros, nothing, zeros, *([nothing] * 6),
        torch.tensor([0, 1, 1]), torch.tensor([4]), torch.tensor([1]), torch.tensor([9]),
    )  # fmt: skip
    decoder = small_decoder()
    loss = decoder.loss(requests, ITEMS).total
    loss.backward()
    assert loss.isfinite() and decoder.context.static.empty.grad.abs().sum() > 0


def test_history_items_enter_no_loss() -> None:
    """The logits of all targets are all that the loss reads, and they are as many as the newest impressions."""
    requests = random_requests(5, 30)
    decoder = small_decoder()
    logits = decoder(requests, ITEMS).logits
    assert [tuple(level.shape) for level in logits] == [(len(requests.target_items), 8)] * 3
    for level in logits:
        level.retain_grad()
    code_nll(logits, ITEMS.codes[requests.target_items]).mean().backward()
    assert all((level.grad.abs().sum(1) > 0).all() for level in logits)


def test_an_unknown_item_in_the_history_has_an_embedding_of_its_own() -> None:
    requests = only_row(random_requests(6, 30, seed=3), 2)
    decoder = small_decoder().eval()
    with torch.no_grad():
        known = decoder.loss(requests, ITEMS).total
        history = torch.full_like(requests.history_items, -1)
        unknown = dataclasses.replace(requests, history_items=history)
        changed = decoder.loss(unknown, ITEMS).total
        rows = torch.arange(3) * 9 + 8
        decoder.context.fields.small.weight[rows] += 1
        assert not torch.equal(known, changed)
        assert not torch.equal(changed, decoder.loss(unknown, ITEMS).total)


def test_it_learns_twenty_requests_by_heart() -> None:
    torch.manual_seed(0)
    requests = random_requests(20, 30, targets=1)
    config = dataclasses.replace(SMALL, d_model=32, embed_dim=8)
    decoder = LazyDecoder(config, (8, 8, 8), ENGAGED)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    for _ in range(150):
        loss = decoder.loss(requests, ITEMS).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
