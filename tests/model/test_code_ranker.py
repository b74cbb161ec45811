"""The ranker of benchmarks: what shares a code, what padding must not do, and that codes tell of items never seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.auc import aucs
from model.code_ranker import (
    CodeRanker,
    Impressions,
    ItemFeatures,
    Kind,
    Place,
    RankerSettings,
    fit_ranker,
    predict,
    shared_prefixes,
)

SETTINGS = RankerSettings(width=8, hidden=(16,), buckets=200, dropout=0.0, batch=200, epochs=3, learning_rate=0.03)
ALL: tuple[Kind, ...] = ("vector", "vq", "rq")
TASTES, ITEMS = 4, 120


def items_of(rng: np.random.Generator) -> ItemFeatures:
    """Nothing but the first RQ code, the VQ code and the vector tells an item's topic, which is its index modulo TASTES."""
    index = torch.arange(ITEMS)
    topic = index % TASTES
    rq = torch.stack([1 + topic, 1 + TASTES + torch.from_numpy(rng.integers(0, 3, ITEMS))], 1)
    vectors = torch.nn.functional.one_hot(topic, TASTES).float()
    vq = 1 + (topic[:, None] + TASTES * torch.arange(3))  # of the same topic, and seen in training
    none = torch.zeros(ITEMS, dtype=torch.int64)
    return ItemFeatures(1 + index, none, none[:, None], none, vectors, vq, rq)


def impressions_of(rng: np.random.Generator, first: int, last: int, count: int) -> Impressions:
    """A user likes the topic of the newest positive; items are among [first, last)."""
    items = torch.from_numpy(rng.integers(first, last, count))
    history = torch.from_numpy(rng.integers(0, 80, (count, 3)))
    likes = (items % TASTES == history[:, 0] % TASTES) & torch.from_numpy(rng.random(count) < 0.9)
    history[:, 1:] = torch.where(torch.from_numpy(rng.random((count, 1)) < 0.5), history[:, 1:], -1)
    return Impressions(torch.ones(count, dtype=torch.int64), items, history, likes.float()[:, None])


def test_codes_tell_of_items_that_training_has_not_seen() -> None:
    rng = np.random.default_rng(0)
    items = items_of(rng)
    train, validation, test = (impressions_of(rng, *range_) for range_ in ((0, 80, 2400), (80, 100, 500), (80, 120, 1000)))
    labels, users = test.labels_IY[:, 0].numpy() > 0, np.zeros(len(test), np.int64)
    found = {}
    for kinds in ((), ("vq",), ("rq",)):
        settings = dataclasses.replace(SETTINGS, kinds=kinds)
        model, curve = fit_ranker(items, train, validation, settings, seed=1)
        scores = predict(model, test)
        assert len(curve) <= SETTINGS.epochs
        found[kinds] = aucs(scores[:, 0].numpy(), labels, users, np.ones((1, 1)))[0]
    again = predict(fit_ranker(items, train, validation, settings, seed=1)[0], test)
    assert torch.equal(scores, again)
    assert found[()] < 0.6 < 0.75 < min(found[("rq",)], found[("vq",)])


@pytest.mark.parametrize("places", [("target",), ("sequence",), ("cross",), ("target", "sequence", "cross")])
def test_neither_the_batch_nor_padding_changes_a_score(places: tuple[Place, ...]) -> None:
    rng = np.random.default_rng(1)
    torch.manual_seed(0)
    model = CodeRanker(items_of(rng), 1, dataclasses.replace(SETTINGS, kinds=ALL, places=places)).eval()
    batch = impressions_of(rng, 0, ITEMS, 40)
    scores = predict(model, batch)
    torch.testing.assert_close(predict(model, batch.take(torch.tensor([7]))), scores[7:8])
    longer = torch.nn.functional.pad(batch.history_IH, (0, 5), value=-1)
    torch.testing.assert_close(predict(model, dataclasses.replace(batch, history_IH=longer)), scores)


def test_a_row_without_positives_and_an_item_without_codes_have_finite_scores_and_gradients() -> None:
    rng = np.random.default_rng(2)
    items = items_of(rng)
    items = dataclasses.replace(items, vq_NK=items.vq_NK * 0, rq_NL=items.rq_NL * (torch.arange(ITEMS) > 5)[:, None])
    model = CodeRanker(items, 1, dataclasses.replace(SETTINGS, kinds=ALL))
    scores = model(torch.ones(2, dtype=torch.int64), torch.tensor([1, 9]), torch.full((2, 3), -1))
    scores.sum().backward()
    assert scores.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@given(st.integers(0, 1000))
def test_a_positive_shares_a_prefix_where_every_code_of_it_agrees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.from_numpy(rng.integers(0, 3, shape))  # noqa: E731
    target, positive, known = draw(4, 3), draw(4, 5, 3), draw(4, 5) > 0
    found: list[Tensor] = shared_prefixes(target, positive, known)
    for length, same in zip((1, 2), found, strict=True):
        for b in range(4):
            for h in range(5):
                codes = target[b, :length].tolist()
                agrees = bool(known[b, h]) and 0 not in codes and codes == positive[b, h, :length].tolist()
                assert bool(same[b, h]) == agrees
