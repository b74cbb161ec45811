"""Organised impressions against brute force, and the invariants that the organisation exists for."""

from __future__ import annotations

from collections import Counter

import pytest
from pyspark.sql import functions as F

from jobs.organisers import organised as organise_rows
from jobs.timelines import newest_rows
from schemas.config import Config, SequencesConfig
from tests.jobs import logs

SETTINGS = (SequencesConfig(3, 6), SequencesConfig(6, 3), SequencesConfig(20, 256))


@pytest.fixture(scope="module", params=range(3))
def log(spark, request):
    """(config, events, items, users, user_sequences) of one seed."""
    config, seed = Config(sequences=SETTINGS[request.param]), 10 + request.param
    events, items, users = logs.random_log(seed), logs.random_catalogue(seed), logs.random_users(seed)
    sequences = logs.table_frame(spark, "user_sequences", logs.reference_sequences(events, items, config))
    return config, events, items, users, sequences


def organised(spark, config, events, items, users) -> list[logs.Row]:
    sequences = logs.table_frame(spark, "user_sequences", logs.reference_sequences(events, items, config))
    rows = organise_rows("newest_only", sequences, None, logs.table_frame(spark, "users", users), config)
    return logs.collected(rows, "training_examples")


def test_examples_equal_brute_force_and_see_nothing_ahead(spark, log):
    config, events, items, users, sequences = log
    rows = logs.collected(
        organise_rows("newest_only", sequences, None, logs.table_frame(spark, "users", users), config), "training_examples"
    )
    assert rows == logs.reference_examples(events, items, users, config)
    for row in rows:
        assert max(row["context_ts_us"], default=-1) < min(row["request_ts_us"])
        assert row["context_ts_us"] == sorted(row["context_ts_us"])
    targets = Counter(impression for row in rows for impression in row["target_impression_ids"])
    assert targets == Counter(e.impression_id for e in events)  # each exactly once


def test_a_day_continued_from_user_features_gives_the_rows_of_a_full_build(spark, log):
    config, events, items, users, sequences = log
    start = logs.days_from(5)[4]
    features = [row for row in logs.reference_features(events, items, users, config) if row["date"] < start]
    day = sequences.where(F.col("date") >= start)
    base = newest_rows(logs.table_frame(spark, "user_features", features), day)
    rows = logs.collected(
        organise_rows("newest_only", day, base, logs.table_frame(spark, "users", users), config), "training_examples"
    )
    assert rows == [row for row in logs.reference_examples(events, items, users, config) if row["date"] >= start]


def test_events_after_a_day_change_no_example_up_to_it(spark, log):
    config, events, items, users, _ = log
    day = logs.days_from(5)[2]
    changed = [*users, *({**row, "attributes": ["age=99"]} for row in absent_on(users, logs.days_from(5)[3]))]
    rows = organised(spark, config, logs.poisoned_after(events, day), items, changed)
    reference = logs.reference_examples(events, items, users, config)
    assert [row for row in rows if row["date"] <= day] == [row for row in reference if row["date"] <= day]


def absent_on(users: list[logs.Row], day) -> list[logs.Row]:
    """A row on `day` for each user who has some row, but none on that day."""
    taken = {row["user_id"] for row in users if row["date"] == day}
    return [{**row, "date": day} for row in {row["user_id"]: row for row in users}.values() if row["user_id"] not in taken]


def test_long_histories_are_cut_right_at_every_length(spark):
    """Users of more than 1,000 events, of which a context holds a small part."""
    config = Config()
    events = logs.random_log(14, users=2, days=3, requests=400)
    assert max(map(len, logs.grouped(events, "user_id").values())) > 1_000
    assert organised(spark, config, events, [], []) == logs.reference_examples(events, [], [], config)


def test_figure_3_repeats_no_transition_and_learns_none_too_early(spark):
    """User 1 sees A, B at t1, t2 and C at t4; user 2 sees B at t2 and C at t3. Naive organisation trains A->B again at t4;
    user-centric organisation shows the model B->C of t4 before user 2's t3. Newest-only does neither."""
    a, b, c = 1, 2, 3
    start, events = logs.figure_3(a, b, c)
    rows = sorted(organised(spark, Config(), events, [], []), key=lambda row: (row["slice_us"], row["user_id"]))
    learned = [
        ((row["slice_us"] - start) // 1000, row["user_id"], row["context_item_ids"], row["target_item_ids"]) for row in rows
    ]
    assert learned == [
        (1, 1, [], [a]),
        (2, 1, [a], [b]),
        (2, 2, [], [b]),
        (3, 2, [b], [c]),
        (4, 1, [a, b], [c]),
    ]


def test_requests_at_the_same_time_share_an_example_and_see_nothing_of_each_other(spark):
    start = logs.midnight_us(logs.FIRST_DAY)
    shown = [(5, start), (9, start + 10), (9, start + 30), (7, start + 10), (8, start + 20)]
    events = [logs.Event(i, request, 1, i, ts, flags={"click": True}) for i, (request, ts) in enumerate(shown)]
    rows = organised(spark, Config(), events, [], [])
    assert [row["request_ids"] for row in rows] == [[5], [7, 9], [8]]
    assert [row["history_end"] for row in rows] == [[0], [1, 1], [3]]
    assert [row["target_start"] for row in rows] == [[0, 1], [0, 1, 3], [0, 1]]
    assert [row["target_item_ids"] for row in rows] == [[0], [3, 1, 2], [4]]
    assert rows[2]["context_item_ids"] == [0, 1, 3]  # of request 9 only what came before
