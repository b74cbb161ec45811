"""Context tokens and their keys and values: who influences what, equations 1 to 4, and padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.context import context_tokens
from model.context_processor import ContextProcessor
from model.lifelong import weight_bucket
from model.pathways import duration_bucket, gap_bucket, ratio_bucket
from model.requests import Requests, row_of
from tests.model.requests import ENGAGED, SMALL, catalogue, random_requests, small_decoder

ITEMS = catalogue(30)


def packed_kv(decoder, requests: Requests) -> torch.Tensor:
    """Keys of the first pair as [N, C], in the order of the packed tokens."""
    tokens, layout = decoder.context(requests, ITEMS)
    keys = decoder.processor(tokens, layout).pairs[0][0]
    return keys.transpose(1, 2).reshape(layout.rows * layout.width, -1)[layout.places]


def test_tokens_are_the_static_one_the_newest_events_and_the_newest_engaged_ones() -> None:
    requests = random_requests(40, 30, history=15)
    decoder = small_decoder()
    for pathway, mask in ((decoder.context.short, None), (decoder.context.positive, ENGAGED)):
        index, offsets = pathway.select(requests)
        for row in range(len(requests)):
            start, end = requests.history_offsets[row : row + 2].tolist()
            events = [i for i in range(start, end) if mask is None or requests.history_feedback[i] & mask]
            assert index[offsets[row] : offsets[row + 1]].tolist() == events[-pathway.length :]


def test_one_event_changes_only_its_own_keys_and_values() -> None:
    requests = random_requests(6, 30, seed=3)
    decoder = small_decoder().eval()
    before = packed_kv(decoder, requests)
    event = int(requests.history_offsets[3]) - 1  # the newest of row 2
    assert row_of(requests.history_offsets)[event] == 2
    changed = requests.history_items.clone()
    changed[event] = (changed[event] + 1) % 30
    after = packed_kv(decoder, dataclasses.replace(requests, history_items=changed))
    moved = (before != after).any(1)
    readers = sum(
        int((pathway.select(requests)[0] == event).sum()) for pathway in (decoder.context.short, decoder.context.positive)
    )
    assert int(moved.sum()) == readers >= 1


def test_context_dropout_thins_tokens_in_training_alone() -> None:
    requests = random_requests(40, 30)
    plain, thinned = small_decoder(), small_decoder(context_dropout=0.5)
    tokens, _ = plain.train().context(requests, ITEMS)
    assert (tokens != 0).all()
    left = thinned.train().context(requests, ITEMS)[0] != 0
    assert 0.4 < left.float().mean() < 0.6
    assert torch.equal(thinned.eval().context(requests, ITEMS)[0], tokens)


@pytest.mark.parametrize(("s_kv", "l_kv", "g_kv"), [(1, 1, 2), (2, 1, 2), (1, 2, 1), (2, 2, 1)])
def test_equations_one_to_four(s_kv: int, l_kv: int, g_kv: int) -> None:
    config = dataclasses.replace(SMALL, s_kv=s_kv, l_kv=l_kv, g_kv=g_kv)
    torch.manual_seed(1)
    processor = ContextProcessor(config)
    for norm in processor.norms:
        torch.nn.init.normal_(norm.weight)
    decoder = small_decoder(s_kv=s_kv, l_kv=l_kv, g_kv=g_kv)
    tokens, layout = decoder.context(random_requests(3, 30), ITEMS)
    kv = processor(tokens, layout)
    d_head = config.d_model // config.heads
    assert processor.map.weight.shape == (s_kv * l_kv * g_kv * d_head, config.d_model)
    assert len(kv.pairs) == l_kv
    mapped = tokens @ processor.map.weight.T
    for layer, (key, value) in enumerate(kv.pairs):
        for part, tensor in enumerate((key, value)):
            chunk = layer * s_kv + (part if s_kv == 2 else 0)
            c = mapped[:, chunk * g_kv * d_head : (chunk + 1) * g_kv * d_head]
            wanted = c / (c.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * processor.norms[chunk].weight
            got = tensor.transpose(1, 2).reshape(layout.rows * layout.width, -1)[layout.places]
            assert torch.allclose(got, wanted, atol=1e-5)
        assert (value is key) == (s_kv == 1)


def test_padding_is_masked_and_every_row_has_its_static_token() -> None:
    requests = random_requests(20, 30, history=3)
    tokens, layout = small_decoder().context(requests, ITEMS)
    kv = small_decoder().processor(tokens, layout)
    assert torch.equal(kv.bias_R11T[:, 0, 0] == 0, layout.valid_RT)
    assert layout.valid_RT[:, 0].all()
    assert len(layout.places.unique()) == len(layout.places) == int(layout.valid_RT.sum()) == len(tokens)


FIELDS = ("item", "author", "tags", "feedback", "gap", "play", "duration")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_read_where_it_is_chosen_and_only_there(field: str) -> None:
    requests = random_requests(6, 30, seed=3)
    other = dataclasses.replace(
        requests,
        history_authors=requests.history_authors + 1 if field == "author" else requests.history_authors,
        history_feedback=requests.history_feedback ^ (1 << 5) if field == "feedback" else requests.history_feedback,
        history_ts_us=requests.history_ts_us - 10**15 if field == "gap" else requests.history_ts_us,
        history_play_ms=requests.history_play_ms + 90_000 if field == "play" else requests.history_play_ms,
    )
    if field == "duration":
        other.history_duration_ms = other.history_duration_ms + 10**6
    items = dataclasses.replace(
        ITEMS,
        ids=ITEMS.ids + 1 if field == "item" else ITEMS.ids,
        tags=(ITEMS.tags + 1) % 50 if field == "tags" else ITEMS.tags,
    )
    for fields in (FIELDS, tuple(name for name in FIELDS if name != field), (field,), ()):
        if "play" in fields and field == "duration":
            continue  # a ratio to the duration reads it, too
        decoder = small_decoder(fields=fields).eval()
        same = torch.equal(decoder.context(requests, ITEMS)[0], decoder.context(other, items)[0])
        assert same == (field not in fields)


def test_tokens_are_counted_without_making_them() -> None:
    requests, decoder = random_requests(30, 30, history=15), small_decoder()
    _, layout = decoder.context(requests, ITEMS)
    assert torch.equal(context_tokens(requests, SMALL, ENGAGED), layout.valid_RT.sum(1))


def test_buckets_keep_order_and_name_the_unknown() -> None:
    gaps = gap_bucket(torch.tensor([0, 10**6, 60 * 10**6, 3600 * 10**6, 10**13, 10**18]))
    assert gaps[0] == 0 and (gaps.diff() > 0).all() and gaps.max() < 64
    assert ratio_bucket(torch.tensor([-1, 5, 0, 50, 99, 10**9]), torch.tensor([10, -1, 100, 100, 100, 1])).tolist() == [
        0, 0, 1, 6, 10, 21,
    ]  # fmt: skip
    durations = duration_bucket(torch.tensor([-1, 1, 1000, 60_000, 10**9]))
    assert durations[0] == 0 and (durations.diff() > 0).all()


LIFELONG = {"lifelong_length": 5}
QUERIES = LIFELONG | {"lifelong_queries": 3}


def without_lifelong(requests: Requests) -> Requests:
    """None of the requests has a long history."""
    kept = {name: value for name, value in vars(requests).items() if not name.startswith("lifelong")}
    return Requests(**kept)


@pytest.mark.parametrize("changes", [LIFELONG, QUERIES])
def test_lifelong_tokens_are_counted_and_come_from_the_newest_representatives(changes: dict[str, int]) -> None:
    requests, decoder = random_requests(30, 30, seed=4), small_decoder(**changes).eval()
    lengths = requests.lifelong_offsets.diff()
    assert (lengths == 0).any() and (lengths > 5).any()
    before, layout = decoder.context(requests, ITEMS)
    assert torch.equal(context_tokens(requests, decoder.config, ENGAGED), layout.valid_RT.sum(1))
    old = torch.arange(int(lengths.sum())) < (requests.lifelong_offsets[1:] - 5).repeat_interleave(lengths)
    for name, same in (("newest", False), ("older", True)):
        weights = torch.where(old == (name == "older"), 99_999, requests.lifelong_weights)
        changed = dataclasses.replace(requests, lifelong_weights=weights)
        assert torch.equal(before, decoder.context(changed, ITEMS)[0]) == same


def test_without_the_pathway_long_histories_are_not_read() -> None:
    requests, decoder = random_requests(10, 30), small_decoder().eval()
    assert decoder.context.lifelong is None
    assert torch.equal(decoder.context(requests, ITEMS)[0], decoder.context(without_lifelong(requests), ITEMS)[0])


@pytest.mark.parametrize("changes", [LIFELONG, QUERIES])
def test_without_long_histories_every_parameter_still_has_a_gradient(changes: dict[str, int]) -> None:
    """A worker whose share of a batch has none must take part in the exchange of gradients."""
    decoder, requests = small_decoder(**changes), without_lifelong(random_requests(5, 30))
    loss = decoder.loss(requests, ITEMS).total
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    if decoder.context.lifelong.queries is not None:  # all that is there to look at
        assert decoder.context.lifelong.queries.empty.grad.abs().sum() > 0


@pytest.mark.parametrize("changes", [LIFELONG, QUERIES])
def test_the_events_of_a_cluster_are_a_field(changes: dict[str, int]) -> None:
    requests, decoder = random_requests(5, 30), small_decoder(**changes).eval()
    heavier = dataclasses.replace(requests, lifelong_weights=requests.lifelong_weights * 8)
    assert not torch.equal(decoder.context(requests, ITEMS)[0], decoder.context(heavier, ITEMS)[0])
    assert weight_bucket(torch.tensor([1, 2, 3, 100, 100_000, 10**9])).tolist() == [0, 2, 3, 13, 33, 35]
