"""Sequences against brute force: every row of random logs, whole builds and continued ones."""

from __future__ import annotations

import pytest
from pyspark.sql import functions as F

from jobs.population import WatchRule
from jobs.sequences import features_of, sequences_of
from jobs.timelines import newest_rows
from schemas.calendar import calendar_of
from schemas.config import Config, RewardsConfig, SequencesConfig, SplitConfig
from schemas.feedback import mask_of
from schemas.lineage import Read, input_days
from tests.jobs import logs

# The second has fewer positives than recent events: all positives may then lie among the recent ones.
DAYS = logs.days_from(5)
THRESHOLD = Config().source.rating_threshold
SETTINGS = (SequencesConfig(3, 6), SequencesConfig(6, 3), SequencesConfig(20, 256))


def config_of(seed: int) -> Config:
    return Config(sequences=SETTINGS[seed % len(SETTINGS)])


@pytest.fixture(scope="module", params=range(3))
def log(spark, request):
    """(config, events, items, users, user_sequences) of one seed."""
    seed = request.param
    events, items, users = logs.random_log(seed), logs.random_catalogue(seed), logs.random_users(seed)
    frame = sequences_of(logs.impressions_frame(spark, events), logs.table_frame(spark, "items", items), THRESHOLD, DAYS)
    return config_of(seed), events, items, users, frame.frame().cache()


def test_user_sequences_hold_each_day_in_time_order(log):
    config, events, items, _, frame = log
    assert logs.collected(frame, "user_sequences") == logs.reference_sequences(events, items, config)


def test_features_are_the_tails_of_all_days_up_to_the_day(spark, log):
    config, events, items, users, frame = log
    rows = features_of(frame, None, logs.table_frame(spark, "users", users), config.sequences)
    assert logs.collected(rows, "user_features") == logs.reference_features(events, items, users, config)


def test_features_continued_from_earlier_rows_are_those_of_a_full_build(spark, log):
    config, events, items, users, frame = log
    start = logs.days_from(5)[3]
    reference = logs.reference_features(events, items, users, config)
    later = frame.where(F.col("date") >= start)
    features = logs.table_frame(spark, "user_features", [row for row in reference if row["date"] < start])
    rows = features_of(later, newest_rows(features, later), logs.table_frame(spark, "users", users), config.sequences)
    assert logs.collected(rows, "user_features") == [row for row in reference if row["date"] >= start]


def test_events_after_a_day_change_nothing_up_to_it(spark, log):
    config, events, items, _, _ = log
    day = logs.days_from(5)[2]
    poisoned = logs.impressions_frame(spark, logs.poisoned_after(events, day))
    catalogue = items + [{**row, "date": logs.days_from(5)[3], "author_id": 999} for row in first_rows(items)]
    frame = sequences_of(poisoned, logs.table_frame(spark, "items", catalogue), THRESHOLD, DAYS).frame()
    frame = frame.where(F.col("date") <= day)
    assert logs.collected(frame, "user_sequences") == [
        row for row in logs.reference_sequences(events, items, config) if row["date"] <= day
    ]


def first_rows(items: list[logs.Row]) -> list[logs.Row]:
    """One row of each item that has none on the fourth day."""
    taken = {row["item_id"] for row in items if row["date"] == logs.days_from(5)[3]}
    return list({row["item_id"]: row for row in items if row["item_id"] not in taken}.values())


def test_a_missing_flag_and_a_missing_rating_are_no_feedback(spark):
    start = logs.midnight_us(logs.FIRST_DAY)
    events = [
        logs.Event(1, 1, 1, 1, start, rating=None, flags={}),
        logs.Event(2, 2, 1, 1, start + 1, rating=4.0, flags={"hate": True, "click": False}),
        logs.Event(3, 3, 1, 1, start + 2, rating=3.9, flags={"click": True}),
    ]
    rows = sequences_of(logs.impressions_frame(spark, events), logs.table_frame(spark, "items", []), 4.0, DAYS[:1])
    assert rows.frame().first()["feedback"] == [0, 128 + 256, 1]


def test_the_random_log_bites():
    """Else the comparisons above would prove little: tails are cut, times tie, users skip days."""
    per_user = list(logs.grouped(logs.random_log(0), "user_id").values())
    assert sum(len(own) > SETTINGS[0].positive_length for own in per_user) > len(per_user) / 2
    assert any(len({e.ts_us for e in own}) < len(own) for own in per_user)
    assert any(len({e.date for e in own}) < 5 for own in per_user)


def test_a_play_longer_than_most_of_the_days_before_gets_its_bit(spark):
    """The population is that of rewards, whose reference is asked for it alone; the first day has none before it."""
    settings = SequencesConfig(watch_quantile=0.7, watch_days=2, watch_plays=20)
    asked = RewardsConfig(min_bucket=1_000_000, backoff=("population",), population_days=2, min_population=20)
    events = logs.random_log(6, users=30)
    frame = logs.impressions_frame(spark, events)
    rows = sequences_of(frame, logs.table_frame(spark, "items", []), THRESHOLD, DAYS, watch=WatchRule.of(frame, settings))
    bits = {
        impression: feedback >= mask_of(["watched_high"])
        for row in logs.collected(rows, "user_sequences")
        for impression, feedback in zip(row["impression_ids"], row["feedback"], strict=True)
    }
    quantiles = {row["impression_id"]: row["quantile"] for row in logs.reference_rewards(events, Config(rewards=asked))}
    assert bits == {impression: quantile is not None and quantile >= 0.7 for impression, quantile in quantiles.items()}
    by_day = {day: {bits[e.impression_id] for e in events if e.date == day} for day in DAYS}
    assert by_day == {day: {False} if day == DAYS[0] else {True, False} for day in DAYS}


def test_a_day_reads_the_days_before_it_where_plays_are_compared_with_theirs():
    calendar, read = calendar_of(DAYS, SplitConfig()), Read("impressions", "watched")
    compared = Config(sequences=SequencesConfig(watch_quantile=0.5, watch_days=2))
    assert input_days(read, DAYS[3], calendar, Config()) == DAYS[3:4]
    assert input_days(read, DAYS[3], calendar, compared) == DAYS[1:4]
