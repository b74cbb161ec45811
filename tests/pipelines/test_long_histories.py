"""Long histories: which row a request reads, against a loop over all rows; what it may not know; every reader of them."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.positives import take_rows
from model.ranker import Ranker
from model.requests import Requests
from pipelines import long_histories as module
from pipelines.bundle import Bundle, build_trie
from pipelines.candidates import newest_candidate
from pipelines.catalogue import Catalogue, load_catalogue
from pipelines.evaluation_data import EvaluationData
from pipelines.example_stream import Position
from pipelines.gates import ForeignSystem, translate
from pipelines.item_fields import item_table
from pipelines.long_histories import ARRAYS, LongHistories, long_histories, newest_before
from pipelines.serving import requests_from
from pipelines.training_data import TrainingData, open_data
from schemas.config import Config
from schemas.errors import ContractViolation
from schemas.feedback import mask_of
from schemas.lake import Lake
from schemas.loader import to_mapping
from tests.model.handmade_requests import requests_by_hand
from tests.model.requests import small_decoder
from tests.pipelines.examples import (
    CONFIG,
    DAYS,
    calendar,
    day_us,
    example_rows,
    lifelong_rows,
    with_lifelong,
    with_train,
    write_lake,
    write_lifelong,
)
from tests.pipelines.test_collate import as_rows

ROWS = lifelong_rows()
LENGTH = 4
DAY_US = day_us(DAYS[1]) - day_us(DAYS[0])
Pinned = tuple[Lake, dict[str, int]]


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Pinned:
    lake = Lake(str(tmp_path_factory.mktemp("long") / "lake"))
    return lake, write_lake(lake, example_rows(20)) | {"lifelong_sequences": write_lifelong(lake, ROWS)}


def catalogue_of(pinned: Pinned) -> Catalogue:
    lake, pins = pinned
    return load_catalogue(lake, pins["semantic_ids"], DAYS[2], DAYS[4])


def histories_of(pinned: Pinned, length: int = LENGTH, time_zone: str = "UTC") -> LongHistories:
    return LongHistories(pinned[0], pinned[1]["lifelong_sequences"], catalogue_of(pinned), length, time_zone)


def opened(pinned: Pinned, config: Config) -> TrainingData:
    return open_data(config, pinned[0], calendar(), pinned[1])


def long_of(requests: Requests) -> list[list[list[int]]]:
    """The long history of every request as plain lists, by ARRAYS."""
    spans = [slice(a, b) for a, b in itertools.pairwise(requests.lifelong_offsets.tolist())]
    return [[getattr(requests, f"lifelong_{name}")[span].tolist() for name in ARRAYS.values()] for span in spans]


def expected(requests: Requests, catalogue: Catalogue, rows: list[dict] = ROWS, length: int = LENGTH) -> list:
    """The same by a loop: the newest row of the user that ends before the request's day begins."""
    found = []
    for user, ts_us in zip(requests.user_ids.tolist(), requests.ts_us.tolist(), strict=True):
        today = (datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=ts_us)).date()
        earlier = [row for row in rows if row["user_id"] == user and row["date"] < today]
        newest = max(earlier, key=lambda row: row["date"], default={name: [] for name in ARRAYS})
        lists = [newest[name][-length:] for name in ARRAYS]
        lists[0] = catalogue.dense(np.array(lists[0], np.int64)).tolist()
        found.append(lists)
    return found


def asked(pairs: list[tuple[int, int]]) -> Requests:
    requests = requests_by_hand([[]] * len(pairs), users=[user for user, _ in pairs])
    return dataclasses.replace(requests, ts_us=torch.tensor([ts for _, ts in pairs], dtype=torch.long))


TIMES = st.one_of(
    st.integers(day_us(DAYS[0]) - 4 * DAY_US, day_us(DAYS[4]) + 9 * DAY_US),
    st.integers(-3, 9).map(lambda day: day_us(DAYS[0]) + day * DAY_US),  # the first instant of a day
    st.integers(-3, 9).map(lambda day: day_us(DAYS[0]) + day * DAY_US - 1),
)


@given(st.lists(st.tuples(st.integers(0, 12), TIMES), max_size=12), st.integers(1, 7), st.sampled_from([1, 5, 4_000_000]))
@settings(max_examples=60, deadline=None)
def test_a_request_reads_the_newest_row_of_a_day_before_its_own(pinned, pairs, length, index_rows) -> None:
    """Users without rows, several requests of a user, days read in any number of parts."""
    requests, histories = asked(pairs), histories_of(pinned, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "INDEX_ROWS", index_rows)
        (found,) = histories.given_to([requests])
    assert long_of(found) == expected(requests, histories.catalogue, length=length)
    assert as_rows(found) == as_rows(requests)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=15, unique=True),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=15),
)
def test_newest_before_equals_a_loop(rows: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    users, times, asking, now = (
        np.array([pair[i] for pair in pairs], np.int64) for pairs in (rows, wanted) for i in (0, 1)
    )
    for (user, ts), place in zip(wanted, newest_before(users, times, asking, now).tolist(), strict=True):
        usable = [row for row in rows if row[0] == user and row[1] <= ts]
        assert (rows[place] if place >= 0 else None) == max(usable, default=None)


def test_days_begin_where_the_log_says(pinned) -> None:
    """In Tokyo a day begins nine hours before it does in Greenwich."""
    row = next(row for row in ROWS if row["date"] == DAYS[3])
    start = day_us(DAYS[4]) - 9 * 3600 * 10**6
    requests = asked([(row["user_id"], start - 1), (row["user_id"], start)])
    (found,) = histories_of(pinned, time_zone="Asia/Tokyo").given_to([requests])
    before, after = long_of(found)
    assert after[-1] == row["weights"][-LENGTH:] and before != after


def test_batches_read_together_are_as_alone(pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_REQUESTS", 5)
    histories = histories_of(pinned)
    batches = [asked([(user, day_us(DAYS[day])) for user in range(10)[:size]]) for day, size in enumerate((3, 4, 0, 9, 1))]
    for batch, found in zip(batches, histories.given_to(iter(batches)), strict=True):
        assert long_of(found) == expected(batch, histories.catalogue)


def test_days_before_every_users_row_are_not_read(tmp_path, pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files are gone, and nobody misses them; of the newer days, only rows that are read are held."""
    monkeypatch.setattr(module, "INDEX_ROWS", 1)
    rows = [row | {"user_id": user, "date": day} for row in ROWS[:1] for user in (0, 1, 3, 4) for day in DAYS]
    lake = Lake(str(tmp_path / "lake"))
    histories = dataclasses.replace(histories_of(pinned), lake=lake, version=write_lifelong(lake, rows))
    for day in DAYS[:2]:
        shutil.rmtree(f"{lake.path('lifelong_sequences')}/date={day}")
    ts_us = np.full(5, day_us(DAYS[4]))
    found = histories.rows_of(np.array([0, 1, 3, 4, 9]), ts_us)  # no file has an id as large as 9
    assert (found.place_R >= 0).tolist() == [True] * 4 + [False] and len(found.offsets) == 5
    with pytest.raises(FileNotFoundError):
        histories.rows_of(np.arange(5), ts_us)  # somebody who may have been there, by the files' statistics


CONFIGS = [with_lifelong(with_train(segment_rows=25, mode=mode), lifelong_length=LENGTH) for mode in ("epochs", "stream")]


@pytest.mark.parametrize("config", CONFIGS, ids=["epochs", "stream"])
def test_the_stream_keeps_its_order_and_adds_what_each_request_reads(pinned, ray_module, config: Config) -> None:
    plain = dataclasses.replace(config, model=CONFIG.model)
    data, other = opened(pinned, config), opened(pinned, plain)
    start = Position(data.stream.version)
    whole = list(data.stream.batches(start))
    assert len(data.stream.segments) > 1
    for batch, bare in zip(whole, other.stream.batches(start), strict=True):
        assert as_rows(batch.requests) == as_rows(bare.requests)
        assert (batch.after, batch.progress) == (bare.after, bare.progress)
        assert long_of(batch.requests) == expected(batch.requests, data.catalogue)
        assert not len(bare.requests.lifelong_items)
    assert sum(len(batch.requests.lifelong_items) for batch in whole) > 100
    middle = len(whole) // 2
    rest = list(opened(pinned, config).stream.batches(whole[middle].after))
    assert [long_of(b.requests) for b in rest] == [long_of(b.requests) for b in whole[middle + 1 :]]


def test_rows_of_a_day_and_later_change_nothing_before_it_ends(tmp_path, ray_module) -> None:
    """Rows from the second day on are others; the requests of the first two days read the same."""
    poisoned = [row if row["date"] < DAYS[1] else row | {"weights": [7] * len(row["weights"])} for row in ROWS]
    seen: list[list] = []
    for name, rows in (("clean", ROWS), ("poisoned", poisoned)):
        lake = Lake(str(tmp_path / name))
        pins = write_lake(lake, example_rows(20)) | {"lifelong_sequences": write_lifelong(lake, rows)}
        stream = opened((lake, pins), CONFIGS[1]).stream
        requests = [batch.requests for batch in stream.batches(Position(stream.version))]
        seen.append([(int(r.ts_us[i]), long_of(take_rows(r, torch.tensor([i])))) for r in requests for i in range(len(r))])
    differ = [ts_us for (ts_us, clean), (_, other) in zip(*seen, strict=True) if clean != other]
    assert differ and min(differ) >= day_us(DAYS[2])
    assert any(long[0][0] for ts_us, long in seen[0] if ts_us < day_us(DAYS[2]))


def test_validation_and_evaluation_read_them_too(pinned, ray_module) -> None:
    config = CONFIGS[0]
    data = opened(pinned, config)
    validation = data.validation()
    assert long_of(validation) == expected(validation, data.catalogue) and len(validation.lifelong_items)
    lake, pins = pinned
    catalogue, mask = catalogue_of(pinned), mask_of(config.targets.positive)
    plain = EvaluationData(lake, pins["training_examples"], catalogue, data.roles, calendar(), mask, batch_rows=4)
    batches = list(plain.queries("test"))
    for bare, batch in zip(batches, dataclasses.replace(plain, long=histories_of(pinned)).queries("test"), strict=True):
        assert as_rows(batch) == as_rows(bare)
        assert long_of(batch) == expected(bare, catalogue)
    assert len(batches) > 2


def test_a_served_request_reads_what_the_stages_read(pinned) -> None:
    """A row of the table in lists of the frame, beside the same row found by user and time; without lists there is none."""
    lake, pins = pinned
    catalogue = catalogue_of(pinned)
    decoder = small_decoder(lifelong_length=LENGTH, lifelong_queries=2)
    items = item_table(lake, pins["items"], catalogue, decoder.config.hash_buckets)
    bundle = Bundle(Ranker(decoder, items, build_trie(catalogue)), catalogue, {}, {}, {}, {})
    row = next(row for row in ROWS if len(row["item_ids"]) > LENGTH)
    whole = {"user_id": row["user_id"], "item_ids": [], "ts_us": [], "request_ts_us": day_us(row["date"]) + DAY_US}
    frame = pd.DataFrame([whole | {f"lifelong_{name}": row[name] for name in ARRAYS}, whole])
    served, _ = requests_from(frame, bundle)
    (found,) = histories_of(pinned).given_to([take_rows(served, torch.tensor([0]))])
    assert [lists[-LENGTH:] for lists in long_of(served)[0]] == long_of(found)[0]
    assert long_of(served)[1] == [[]] * len(ARRAYS)
    kv, own = decoder.eval().encode(served, items), decoder.encode(found, items)
    assert torch.allclose(kv.pairs[0][0][:1, :, : own.pairs[0][0].shape[2]], own.pairs[0][0], atol=1e-5)


def test_a_champion_of_an_older_catalogue_reads_them_in_its_own_indices(pinned) -> None:
    lake, pins = pinned
    new = catalogue_of(pinned)
    known = {name: getattr(new, name)[::2] for name in ("item_ids", "codes", "ranks", "known_on")}
    old = dataclasses.replace(new, **known)
    decoder = small_decoder(lifelong_length=LENGTH).eval()
    ranker = Ranker(decoder, item_table(lake, pins["items"], old, decoder.config.hash_buckets), build_trie(old))
    requests = asked([(user, day_us(DAYS[4])) for user in range(7)])
    by_old, by_new = (
        next(dataclasses.replace(histories_of(pinned), catalogue=catalogue).given_to([requests]))
        for catalogue in (old, new)
    )
    assert not torch.equal(by_old.lifelong_items, by_new.lifelong_items)
    found = ForeignSystem(Bundle(ranker, old, {}, {}, {}, {}), new, beam=20).rank(by_new, 10)
    assert torch.equal(found, translate(ranker.rank(by_old, 10, 20), old, new))


def test_a_candidate_of_a_release_without_the_pathway_goes_on_without_it(lake: Lake) -> None:
    sizes = {name: value for name, value in to_mapping(CONFIG.model).items() if not name.startswith("lifelong")}
    known = {"codebook_version": "c1", "trained_until": DAYS[2].isoformat(), "config": {"model": sizes}}
    lake.write_manifest("align", "old", known)
    assert newest_candidate(lake, CONFIG, "c1", DAYS[3]) is not None
    assert newest_candidate(lake, CONFIGS[0], "c1", DAYS[3]) is None


def test_a_model_with_the_pathway_under_a_configuration_without_it_is_refused(pinned) -> None:
    lake, pins = pinned
    catalogue = catalogue_of(pinned)
    without = {name: version for name, version in pins.items() if name != "lifelong_sequences"}
    assert long_histories(CONFIG, lake, without, catalogue, 0) is None
    with pytest.raises(ContractViolation, match=r"model\.lifelong_length to 8"):
        long_histories(CONFIG, lake, without, catalogue, 8)
