"""Pairs against brute force; train events only where the split is by user, by the very rule of the evaluation."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import functions as F

from jobs.item_pairs import cooccurrences, positives
from jobs.split import train_only, validation_starts
from pipelines.split import roles_by_user
from schemas.config import Config, PairsConfig
from schemas.feedback import mask_of
from schemas.lineage import window_days
from schemas.tables import TABLES
from tests.jobs import logs

CONFIGS = (
    Config(),
    Config(item_pairs=PairsConfig(window=2, max_gap_hours=4.0)),
    Config(item_pairs=PairsConfig(window=50, max_gap_hours=30.0)),
)
MASK = mask_of(Config().targets.positive)


@pytest.fixture(scope="module", params=range(3))
def log(request):
    """(config, events, rows of user_sequences) of one seed."""
    events = logs.random_log(20 + request.param)
    return CONFIGS[request.param], events, logs.reference_sequences(events, [], CONFIGS[request.param])


def pairs(spark, config: Config, sequences: list[logs.Row]) -> list[logs.Row]:
    events = positives(logs.table_frame(spark, "user_sequences", sequences), MASK)
    return logs.collected(cooccurrences(events, config.item_pairs, window_days(config)), "item_pairs")


def test_pairs_equal_brute_force(spark, log):
    config, events, sequences = log
    rows = pairs(spark, config, sequences)
    assert rows == logs.reference_pairs(events, config)
    assert all(row["item_a"] < row["item_b"] for row in rows)


def test_a_day_needs_only_the_days_of_its_window(spark, log):
    config, events, sequences = log
    day = logs.days_from(5)[3]
    first = day - datetime.timedelta(days=window_days(config))
    rows = pairs(spark, config, [row for row in sequences if first <= row["date"] <= day])
    assert [row for row in rows if row["date"] == day] == [
        row for row in logs.reference_pairs(events, config) if row["date"] == day
    ]


def test_events_after_a_day_change_no_pair_up_to_it(spark, log):
    config, events, _ = log
    day = logs.days_from(5)[2]
    rows = pairs(spark, config, logs.reference_sequences(logs.poisoned_after(events, day), [], config))
    assert [row for row in rows if row["date"] <= day] == [
        row for row in logs.reference_pairs(events, config) if row["date"] <= day
    ]


def test_train_events_by_user_are_those_of_the_evaluation_split(spark, log):
    config, events, _ = log
    # Users with few positives, so that one, two and three positive times all occur.
    few = [dataclasses.replace(e, rating=None, flags={"click": e.impression_id % 8 == 0}) for e in events]
    rows = logs.reference_sequences(few, [], config)
    frame = logs.table_frame(spark, "user_sequences", rows)
    roles = roles_by_user([pa.Table.from_pylist(rows, TABLES["user_sequences"].schema)], MASK)
    users = np.array([e.user_id for e in few])
    train = roles.select(users, np.array([e.ts_us for e in few]), "train")
    flat = frame.select("user_id", F.inline(F.arrays_zip("ts_us", "impression_ids")))
    kept = {row["impression_ids"] for row in train_only(flat, validation_starts(frame, MASK)).collect()}
    assert kept == {e.impression_id for e, is_train in zip(few, train, strict=True) if is_train}
    assert len(kept) < len(few)
