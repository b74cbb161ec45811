"""Collate against a loop over rows: roles, history, loss targets, slices of Arrow arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.requests import Requests
from pipelines.catalogue import Catalogue
from pipelines.collate import (
    EVENTS,
    ExampleCollate,
    HistoryLimit,
    concat_requests,
    requests_as_of,
    requests_of,
    text_hashes,
)
from pipelines.example_roles import role_events
from pipelines.item_fields import item_table
from pipelines.split import roles_by_day
from tests.pipelines.examples import CODES, DAYS, calendar, example_rows, table_of, write_lake

SIZES = (CODES,) * 3
CATALOGUE = Catalogue(
    item_ids=np.arange(0, 40, 2),
    codes=np.random.default_rng(0).integers(0, CODES, (20, 3)).astype(np.int32),
    ranks=np.zeros(20, np.int32),
    known_on=np.full(20, np.datetime64(DAYS[0])),
    codebook_version="c1",
    sizes=SIZES,
)


def as_rows(requests: Requests) -> list[tuple]:
    """Every request as plain values, so that two ways of collating can be compared."""
    rows = []
    for r in range(len(requests)):
        spans = {
            group: slice(*getattr(requests, f"{group}_offsets")[r : r + 2].tolist())
            for group in ("attribute", "history", "target")
        }
        names = ("items", "authors", "ts_us", "play_ms", "duration_ms", "feedback")
        history = [getattr(requests, f"history_{name}")[spans["history"]].tolist() for name in names]
        targets = [getattr(requests, f"target_{n}")[spans["target"]].tolist() for n in ("items", "feedback", "impressions")]
        attributes = requests.attributes[spans["attribute"]].tolist()
        rows.append((int(requests.user_ids[r]), int(requests.ts_us[r]), attributes, *history, *targets))
    return rows


def one_by_one(rows: list[dict], loss_mask: int | None, limit: HistoryLimit | None) -> list[tuple]:
    dense = {int(item): i for i, item in enumerate(CATALOGUE.item_ids)}
    found = []
    for row in rows:
        hashes = text_hashes(pa.array(row["attributes"], pa.string())).tolist()
        for r, ts_us in enumerate(row["request_ts_us"]):
            end = row["history_end"][r]
            events = list(range(end))
            if limit is not None:
                engaged = [i for i in events if row["context_feedback"][i] & limit.mask]
                events = sorted({*events[-limit.short :], *engaged[-limit.positive :]})
            names = ("item_ids", "author_ids", "ts_us", "play_ms", "duration_ms", "feedback")
            history = [[row[f"context_{name}"][i] for i in events] for name in names]
            history[0] = [dense.get(item, -1) for item in history[0]]
            targets = range(row["target_start"][r], row["target_start"][r + 1])
            kept = [
                i
                for i in targets
                if loss_mask is None or (row["target_feedback"][i] & loss_mask and row["target_item_ids"][i] in dense)
            ]
            if loss_mask is None or kept:
                columns = [[dense.get(row["target_item_ids"][i], -1) for i in kept]]
                columns += [[row[f"target_{name}"][i] for i in kept] for name in ("feedback", "impression_ids")]
                found.append((row["user_id"], ts_us, hashes, *history, *columns))
    return found


@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(0, 4), st.sampled_from([None, 1, 2]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_collate_equals_a_loop(seed: int, size: int, skip: int, loss_mask: int | None, limited: bool) -> None:
    rows = example_rows(3, seed=seed)[: skip + size]
    limit = HistoryLimit(2, 3, 1) if limited else None
    table = table_of(rows).slice(skip)  # offsets of a slice do not start at 0
    wanted = one_by_one(rows[skip:], loss_mask, limit)
    assert as_rows(requests_of(table, CATALOGUE, None, None, loss_mask, limit)) == wanted
    pieces = [requests_of(table.slice(i, 2), CATALOGUE, None, None, loss_mask, limit) for i in range(0, max(size, 1), 2)]
    assert as_rows(concat_requests(pieces)) == wanted


def test_roles_divide_the_requests() -> None:
    table = table_of(example_rows(6))
    roles = roles_by_day(calendar(), "UTC")
    parts = {role: requests_of(table, CATALOGUE, roles, role) for role in ("train", "validation", "test")}
    assert sum(len(part) for part in parts.values()) == len(requests_of(table, CATALOGUE))
    assert len(parts["train"]) > len(parts["test"]) > 0
    assert parts["train"].ts_us.max() < parts["validation"].ts_us.min() < parts["test"].ts_us.min()


def test_a_batch_of_several_chunks_and_ray_datas_interface() -> None:
    rows = example_rows(4)
    chunked = pa.concat_tables([table_of(rows[:7]), table_of(rows[7:])])
    assert as_rows(ExampleCollate(CATALOGUE)(chunked)) == as_rows(requests_of(table_of(rows), CATALOGUE))


def test_text_hashes_are_the_same_everywhere() -> None:
    hashes = text_hashes(pa.array(["a=1", "b", "a=1", ""]))
    assert hashes[0] == hashes[2] != hashes[1]
    assert hashes[0] == 4024722633411657428  # another value would make every trained model read other attributes


def test_role_events_of_examples_give_each_target_the_time_of_its_request() -> None:
    rows = example_rows(3)
    table = role_events(table_of(rows))
    wanted = [
        [ts for ts, size in zip(row["request_ts_us"], np.diff(row["target_start"]), strict=True) for _ in range(size)]
        for row in rows
    ]
    assert table.column("ts_us").to_pylist() == wanted
    assert table.column("feedback").to_pylist() == [row["target_feedback"] for row in rows]


def test_item_fields_hold_as_of_a_day(lake) -> None:
    pins = write_lake(lake, example_rows(1))
    catalogue = Catalogue(
        np.arange(40), np.zeros((40, 3), np.int32), np.zeros(40), np.full(40, DAYS[0]), "c1", (CODES,) * 3
    )
    late = item_table(lake, pins["items"], catalogue, 50)
    early = item_table(lake, pins["items"], catalogue, 50, until=DAYS[2])
    assert len(late) == 40 and late.codes[-1].tolist() == [CODES] * 3
    assert (late.authors[:40] > 0).all() and (early.authors[38:] == 0).all()
    assert torch.equal(late.authors[:38], early.authors[:38])
    assert (late.tags > 0).sum(1).tolist()[:40] == [min(i % 5, 3) for i in range(40)]
    assert late.tags[1, 0] == late.tags[9, 0]  # both have the tag t1


def test_features_as_a_request_are_the_union_of_recent_and_engaged_events(lake) -> None:
    """A user's row of user_features against the events that it was cut from, by hand."""
    rng, mask, rows, wanted = np.random.default_rng(3), 2, [], []
    for user in range(40):
        events = [tuple(rng.integers(0, 50, len(EVENTS)).tolist()) for _ in range(rng.integers(0, 12))]
        short = events[-4:]
        engaged = [event for event in events if event[-1] & mask][-6:]
        older = [event for event in engaged if event not in short]
        if len(set(events)) < len(events):
            continue
        row = {"user_id": user, "attributes": [f"a={user}"]}
        for place, name in enumerate(EVENTS):
            row |= {f"short_{name}": [e[place] for e in short], f"positive_{name}": [e[place] for e in engaged]}
        rows.append(row)
        wanted.append([event[0] for event in [*older, *short]])
    catalogue = Catalogue(
        np.arange(50), np.zeros((50, 3), np.int32), np.zeros(50), np.full(50, DAYS[0]), "c1", (CODES,) * 3
    )
    requests = requests_as_of(pa.Table.from_pylist(rows), catalogue, mask, 77)
    offsets = requests.history_offsets.tolist()
    found = [requests.history_items[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert found == wanted and len(wanted) > 20
    assert requests.ts_us.tolist() == [77] * len(rows) and len(requests.target_items) == 0
    assert requests.attribute_offsets.tolist() == list(range(len(rows) + 1))
