"""Hours and days as slices against brute force: each impression once, each with what its own request may see."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from pyspark.sql import functions as F

from jobs.organisers import organised
from jobs.timelines import newest_rows
from schemas.config import Config, OrganiseConfig, SequencesConfig
from tests.jobs import logs

LIMITS = (SequencesConfig(3, 6), SequencesConfig(6, 3))


@pytest.fixture(scope="module", params=("hour", "day"))
def log(spark, request):
    """(config, events, items, users, user_sequences) of one slice."""
    hour = request.param == "hour"
    config = Config(sequences=LIMITS[hour], organise=OrganiseConfig(slice=request.param))
    events, items, users = logs.random_log(21 + hour), logs.random_catalogue(21), logs.random_users(21)
    sequences = logs.table_frame(spark, "user_sequences", logs.reference_sequences(events, items, config))
    return config, events, items, users, sequences


def test_slices_equal_brute_force_and_each_target_sees_what_its_request_may(spark, log):
    config, events, items, users, sequences = log
    found = organised("newest_only", sequences, None, logs.table_frame(spark, "users", users), config)
    rows = logs.collected(found, "training_examples")
    assert rows == logs.reference_examples(events, items, users, config)
    assert Counter(i for row in rows for i in row["target_impression_ids"]) == Counter(e.impression_id for e in events)
    assert max(len(set(row["request_ts_us"])) for row in rows) > 1
    by_user = logs.grouped(events, "user_id")
    for row in rows:
        for first, end in zip(row["request_ts_us"], row["history_end"], strict=True):
            short, positive = logs.tails([e for e in by_user[row["user_id"],] if e.ts_us < first], config)
            allowed = logs.in_order(list({e.impression_id: e for e in (*short, *positive)}.values()))
            seen = list(zip(row["context_ts_us"][:end], row["context_item_ids"][:end], strict=True))
            assert max(row["context_ts_us"][:end], default=-1) < first
            assert Counter((e.ts_us, e.item_id) for e in allowed) <= Counter(seen)


def test_a_day_continued_from_user_features_gives_the_rows_of_a_full_build(spark, log):
    config, events, items, users, sequences = log
    start = logs.days_from(5)[3]
    features = [row for row in logs.reference_features(events, items, users, config) if row["date"] < start]
    day = sequences.where(F.col("date") >= start)
    base = newest_rows(logs.table_frame(spark, "user_features", features), day)
    rows = logs.collected(
        organised("newest_only", day, base, logs.table_frame(spark, "users", users), config), "training_examples"
    )
    assert rows == [row for row in logs.reference_examples(events, items, users, config) if row["date"] >= start]


def test_no_slice_crosses_the_day_of_the_partition(spark):
    """Days of a time zone half an hour off the hour, and a request over midnight."""
    half_past = logs.midnight_us(logs.FIRST_DAY) + 18 * 3_600_000_000 + 1_800_000_000  # 18:30 UTC, midnight in Kolkata
    shown = [(5, half_past - 2), (6, half_past - 1), (6, half_past), (7, half_past + 1), (8, half_past + 1_800_000_000)]
    events = [logs.Event(i, request, 1, i, ts) for i, (request, ts) in enumerate(shown)]
    config = Config(organise=OrganiseConfig(slice="hour"))
    rows = []
    for day, own in ((logs.days_from(2)[0], events[:2]), (logs.days_from(2)[1], events[2:])):
        rows += [dict(row, date=day) for row in logs.reference_sequences(own, [], config)]
    users = logs.table_frame(spark, "users", [])
    for name, expected in (("hour", [[5, 6], [6, 7], [8]]), ("day", [[5, 6], [6, 7, 8]])):
        own = dataclasses.replace(config, organise=OrganiseConfig(slice=name))
        found = organised("newest_only", logs.table_frame(spark, "user_sequences", rows), None, users, own)
        assert [row["request_ids"] for row in logs.collected(found, "training_examples")] == expected
