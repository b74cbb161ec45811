from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chunked_cross_entropy import ChunkedCrossEntropy, chunked_cross_entropy, weighed_cross_entropy
from model.positives import Positives
from model.sasrec import Sasrec, SasrecRanker, SasrecSize
from model.sequence_windows import cut_windows
from pipelines.baselines import Fitting, fit_sasrec
from schemas.config import EvaluateConfig
from tests.model.handmade_requests import LIKED, POSITIVE, SEEN, requests_by_hand

ITEMS, LENGTH = 12, 6
SIZE = SasrecSize(ITEMS, width=16, layers=2, heads=2, length=LENGTH, dropout=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of tiny steps: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Sasrec(SIZE).eval()


def positives(sequences, num_items=ITEMS):
    users = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    ts_us = np.concatenate([np.arange(len(s)) for s in sequences])
    return Positives.of(users, ts_us, np.concatenate(sequences).astype(np.int64), num_items)


@torch.no_grad()
def test_a_later_item_changes_no_earlier_output(model):
    items = torch.tensor([3, 1, 4, 1, 5, 9])
    before = model(items, torch.tensor([0, 6]))
    for place in range(1, 6):
        changed = items.clone()
        changed[place] = 7
        after = model(changed, torch.tensor([0, 6]))
        torch.testing.assert_close(after[:place], before[:place])
        assert not torch.allclose(after[place:], before[place:])


@torch.no_grad()
def test_neighbours_in_the_batch_and_their_padding_change_nothing(model):
    alone = model(torch.tensor([3, 1]), torch.tensor([0, 2]))
    beside = model(torch.tensor([8, 3, 1, 4, 4, 2, 6, 7, 7]), torch.tensor([0, 1, 3, 9]))
    torch.testing.assert_close(beside[1:3], alone)


def random_classifier(seed: int, predictions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator]:
    """Hidden states, weights of nine classes, labels, and what goes on drawing."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(predictions, 5, generator=generator, requires_grad=True)
    weight = torch.randn(9, 5, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(0, 9, (predictions,), generator=generator), generator


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    kept, ChunkedCrossEntropy.CHUNK = ChunkedCrossEntropy.CHUNK, rows
    try:
        yield
    finally:
        ChunkedCrossEntropy.CHUNK = kept


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_chunked_loss_equals_cross_entropy_in_value_and_gradient(seed, predictions):
    hidden, weight, labels, _ = random_classifier(seed, predictions)
    expected = F.cross_entropy(hidden @ weight.T, labels) * 3
    wanted = torch.autograd.grad(expected, (hidden, weight))
    with chunks_of(7):
        found = chunked_cross_entropy(hidden, weight, labels) * 3
    torch.testing.assert_close(found, expected)
    for got, want in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 40))
def test_rows_are_weighed_by_what_their_log_probabilities_ask_for(seed, predictions):
    hidden, weight, labels, generator = random_classifier(seed, predictions)
    signs = torch.randint(-1, 2, (predictions,), generator=generator)
    expected_log_probs = -F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = -(signs * expected_log_probs.detach().exp() * expected_log_probs).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    with chunks_of(7):
        found, log_probs = weighed_cross_entropy(hidden, weight, labels, lambda log, rows: signs[rows] * log.exp())
    torch.testing.assert_close(log_probs, expected_log_probs.detach())
    torch.testing.assert_close(found, expected)
    for got, want in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_rounded_chunked_loss_is_that_of_rounded_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, 16, generator=generator).bfloat16().float().requires_grad_() for rows in (300, 50)
    )  # products of such numbers are rounded, the factors are not
    labels = torch.randint(0, 50, (300,), generator=generator)
    expected = F.cross_entropy(hidden @ weight.T, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, weight, labels)
    assert found.dtype == torch.float32 and found != expected
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for got, want in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 50))
def test_windows_predict_every_positive_but_a_users_first_exactly_once(lengths, length, predictions):
    num_items = sum(lengths)
    ends = np.cumsum(lengths)
    sequences = [np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]  # every item occurs once
    places = torch.cat([torch.arange(n) for n in lengths])  # of every item in its sequence
    windows = cut_windows(positives(sequences, num_items), length)
    predicted = []
    for chosen in windows.batches(predictions, np.random.default_rng(0)):
        items, offsets, at, following = windows.batch(chosen)
        assert torch.equal(following, items + 1)
        assert offsets.diff().max() <= length
        seen = torch.arange(len(items)) - torch.repeat_interleave(offsets[:-1], offsets.diff())
        earlier = places[items]
        least = torch.minimum(earlier, torch.tensor(length - max(1, length // 2)))
        assert (seen <= earlier).all() and (seen >= least)[at].all()
        predicted += following[at].tolist()
    wanted = [int(item) for sequence in sequences for item in sequence[1:]]
    assert sorted(predicted) == wanted
    assert windows.predictions == len(wanted)


def test_an_epoch_has_the_same_windows_in_another_order():
    windows = cut_windows(positives([np.arange(9) % ITEMS] * 20), LENGTH)
    generator = np.random.default_rng(0)
    first, second = (np.concatenate(list(windows.batches(16, generator))) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first), np.sort(second))


def fitted_on_successors():
    generator = np.random.default_rng(0)
    successor = generator.permutation(ITEMS)
    sequences = []
    for _ in range(60):
        sequence = [int(generator.integers(ITEMS))]
        for _ in range(8):
            sequence.append(int(successor[sequence[-1]]))
        sequences.append(np.array(sequence))
    config = EvaluateConfig(
        sasrec_width=32, sasrec_length=LENGTH, sasrec_epochs=15, sasrec_batch_tokens=64, sasrec_dropouts=(0.1,)
    )
    validation = [requests_by_hand([[item] for item in range(ITEMS)], [[int(n)] for n in successor])]
    return successor, fit_sasrec(Fitting(positives(sequences), validation, POSITIVE, config))


def test_sasrec_learns_a_deterministic_successor_and_repeats_itself():
    successor, fitted = fitted_on_successors()
    first = fitted.system.rank(requests_by_hand([[item] for item in range(ITEMS)]), 1)[:, 0]
    assert first.tolist() == successor.tolist()
    assert fitted.chosen["validation"]["recall@10"] == 1.0
    _, again = fitted_on_successors()
    assert again.curves == fitted.curves


def test_fitting_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    config = EvaluateConfig(sasrec_width=8, sasrec_epochs=1)
    fit_sasrec(Fitting(positives([np.arange(5)]), [], POSITIVE, config))
    assert torch.equal(torch.rand(1), expected)


def test_ranking_reads_liked_history_masks_all_of_it_and_falls_back_without(model):
    ranker = SasrecRanker(model, POSITIVE, torch.arange(ITEMS).float())
    mixed = requests_by_hand([[1, 2, 3]], feedback=[[LIKED, SEEN, LIKED]])
    assert torch.equal(ranker.rank(mixed, ITEMS), ranker.rank(requests_by_hand([[1, 3]]), ITEMS))
    assert not set(ranker.rank(mixed, ITEMS, True)[0].tolist()) & {1, 2, 3}
    assert ranker.rank(requests_by_hand([[], [4]]), 3)[0].tolist() == [ITEMS - 1, ITEMS - 2, ITEMS - 3]


def test_only_the_newest_items_are_read(model):
    ranker = SasrecRanker(model, POSITIVE, torch.zeros(ITEMS))
    long = [5, 6, *range(LENGTH)]
    torch.testing.assert_close(
        ranker.scores(requests_by_hand([long])), ranker.scores(requests_by_hand([list(range(LENGTH))]))
    )
