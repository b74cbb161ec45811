"""The aligner masks what is missing, its loss is the definition's, and pairs bend content so that new items follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.item_aligner import (
    Objective,
    Reconstruction,
    aligned_vectors,
    blocks_present,
    build_aligner,
    contrastive_nll,
    one_vector,
)
from schemas.item_alignment import ItemAlignmentConfig

WIDTHS = (5, 3)
SMALL = ItemAlignmentConfig(width=8, hidden=16, heads=2, queries=2, block_tokens=2, dropout=0.0)
MODELS = [SMALL, dataclasses.replace(SMALL, model="qformer")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer in two threads than in one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def content(rows: int, seed: int = 0) -> torch.Tensor:
    """Rows with both blocks, the first, the second and none in turn."""
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, sum(WIDTHS)))).float()
    x[1::4, WIDTHS[0] :] = 0
    x[2::4, : WIDTHS[0]] = 0
    x[3::4] = 0
    return x


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(6, 9), st.booleans()), min_size=1, max_size=8),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_contrastive_loss_is_its_definition(pairs: list[tuple[int, int, bool]], corrected: bool, seed: int) -> None:
    """`filled` columns stand for no item; an item drawn twice is no negative of its own partner."""
    random = np.random.default_rng(seed)
    query_items = np.array([p[0] for p in pairs])
    items = np.array([-1 if p[2] else p[1] for p in pairs])
    queries, candidates = random.normal(size=(2, len(pairs), 3))
    log_chance = random.normal(size=len(pairs))
    rows = np.flatnonzero(items >= 0)
    found = contrastive_nll(
        torch.from_numpy(queries[rows]),
        torch.from_numpy(candidates),
        torch.from_numpy(rows),
        torch.from_numpy(query_items[rows]),
        torch.from_numpy(items),
        0.5,
        torch.from_numpy(log_chance) if corrected else None,
    )
    for row, value in zip(rows, found.tolist(), strict=True):
        logits = candidates @ queries[row] / 0.5 - (log_chance if corrected else 0)
        allowed = [c for c in range(len(pairs)) if c == row or (items[c] >= 0 and items[c] != items[row])]
        assert value == pytest.approx(math.log(sum(math.exp(logits[c] - logits[row]) for c in allowed)), abs=1e-9)


def test_a_query_is_no_negative_of_itself() -> None:
    vectors = torch.eye(2)
    same = contrastive_nll(vectors[:1], vectors, torch.tensor([0]), torch.tensor([7]), torch.tensor([3, 7]), 1.0)
    other = contrastive_nll(vectors[:1], vectors, torch.tensor([0]), torch.tensor([7]), torch.tensor([3, 8]), 1.0)
    assert same.item() == 0 < other.item()


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.model)
def test_a_missing_block_is_not_read(config: ItemAlignmentConfig) -> None:
    """Other weights for the second block change every vector that has it, and no other."""
    torch.manual_seed(0)
    aligner, x = build_aligner(WIDTHS, config).eval(), content(12)
    before = aligned_vectors(aligner, x)
    with torch.no_grad():
        if config.model == "qformer":
            aligner.unfold[1].weight.normal_()
            aligner.unfold[1].bias.normal_()
        else:
            aligner.first.weight[:, WIDTHS[0] : sum(WIDTHS)].normal_()
    after = aligned_vectors(aligner, x)
    has_second = blocks_present(x, WIDTHS)[:, 1]
    assert torch.equal(before[~has_second], after[~has_second])
    assert ((before - after).abs().amax(1)[has_second] > 1e-3).all()


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.model)
def test_vectors_have_length_one_or_are_zero(config: ItemAlignmentConfig) -> None:
    aligner, x = build_aligner(WIDTHS, config).eval(), content(13)
    vectors = aligned_vectors(aligner, x)
    assert vectors.shape == (13, config.width)
    torch.testing.assert_close(vectors.norm(dim=1), x.any(1).float())
    torch.testing.assert_close(aligned_vectors(aligner, x, chunk=5), vectors)
    assert aligned_vectors(aligner, x[:0]).shape == (0, config.width)


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.model)
def test_gradients_are_finite_without_content(config: ItemAlignmentConfig) -> None:
    objective, x = Objective(build_aligner(WIDTHS, config), Reconstruction(WIDTHS, config)), content(8)
    vectors, lost = objective(torch.arange(8), x)
    assert lost[x.any(1)].min() > 0
    assert lost[3::4].tolist() == [0, 0]
    (vectors.sum() + lost.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_the_content_loss_rises_with_what_is_lost() -> None:
    """1 - cosine, the mean of the blocks that the item has: 0 if rebuilt, 2 if reversed, whatever fills a missing block."""
    loss, x = Reconstruction(WIDTHS, SMALL), content(2)
    with torch.no_grad():
        loss.second.weight.zero_()
    for sign, expected in ((3.0, 0.0), (-1.0, 2.0)):
        loss.second.bias.data = sign * x[1] + torch.cat([torch.zeros(WIDTHS[0]), torch.ones(WIDTHS[1])])
        assert loss(torch.randn(1, 1, 8), torch.tensor([1]), x[1:]).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c.model)
def test_pairs_bend_content_and_unseen_items_follow(config: ItemAlignmentConfig) -> None:
    """Pairs join items that agree in two of sixteen dimensions, which cosine of the raw content hardly sees."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    topic = random.integers(0, 4, 600)
    x = torch.from_numpy(random.normal(size=(600, 16))).float()
    x[:, :2] = 1.5 * torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]])[topic] + 0.1 * torch.randn(600, 2)
    x = torch.nn.functional.normalize(x, dim=1)
    aligner = build_aligner((16,), config)
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=3e-3)
    for _ in range(60):  # the last 200 items are never seen
        first = random.integers(0, 400, 64)
        second = np.array([random.choice(np.flatnonzero(topic[:400] == topic[i])) for i in first])
        rows = torch.from_numpy(first), torch.from_numpy(second)
        vectors = [one_vector(aligner(x[r])) for r in rows]
        contrastive_nll(*vectors, torch.arange(64), *rows, 0.2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def agreement(vectors: torch.Tensor) -> float:
        near = (vectors[400:] @ vectors[:400].T).topk(10).indices.numpy()
        return float((topic[near] == topic[400:, None]).mean())

    assert agreement(aligned_vectors(aligner.eval(), x)) > max(0.8, agreement(x) + 0.2)
