"""Rewards against brute force: strictly earlier plays of the own bucket, of its neighbours, of the population."""

from __future__ import annotations

from collections import Counter

import pytest
from pyspark.sql import functions as F

from jobs.rewards import quantiles
from schemas.config import Config, RewardsConfig
from tests.jobs import logs

CONFIGS = (
    Config(rewards=RewardsConfig(min_bucket=4, history_days=2, population_days=2, min_population=60)),
    Config(rewards=RewardsConfig(bucket_base=10.0, min_bucket=1, backoff=(), negative=("hate", "follow"))),
    Config(rewards=RewardsConfig(1.5, min_bucket=2, history_days=1, population_days=1, backoff=("neighbours",))),
)


@pytest.fixture(scope="module", params=range(3))
def log(spark, request):
    """(config, events, user_sequences) of one seed."""
    config, events = CONFIGS[request.param], logs.random_log(30 + request.param)
    return config, events, logs.table_frame(spark, "user_sequences", logs.reference_sequences(events, [], config))


def test_quantiles_equal_brute_force(log):
    config, events, sequences = log
    reference = logs.reference_rewards(events, config)
    assert logs.collected(quantiles(sequences, None, None, config.rewards), "rewards") == reference
    counts = Counter(row["pool"] for row in reference)
    assert all(counts[pool] > len(reference) / 50 for pool in (None, "own", *config.rewards.backoff)), counts


def test_a_day_with_its_history_gives_the_rows_of_a_full_build(log):
    config, events, sequences = log
    day = logs.days_from(5)[3]
    earlier = sequences.where(F.col("date") < day)
    before = earlier.where(F.date_diff(F.lit(day), "date") <= config.rewards.population_days)
    rows = quantiles(sequences.where(F.col("date") == day), earlier, before, config.rewards)
    assert logs.collected(rows, "rewards") == [row for row in logs.reference_rewards(events, config) if row["date"] == day]


def test_events_after_a_day_change_no_reward_up_to_it(spark, log):
    config, events, _ = log
    day = logs.days_from(5)[2]
    poisoned = logs.reference_sequences(logs.poisoned_after(events, day), [], config)
    rows = quantiles(logs.table_frame(spark, "user_sequences", poisoned), None, None, config.rewards)
    assert logs.collected(rows.frame().where(F.col("date") <= day), "rewards") == [
        row for row in logs.reference_rewards(events, config) if row["date"] <= day
    ]


def test_buckets_are_powers_of_the_base_in_seconds(spark):
    start = logs.midnight_us(logs.FIRST_DAY)
    durations = [500, 999, 1000, 1999, 2000, 8000, 60_000, None]
    events = [logs.Event(i, i, 1, i, start + i, play_ms=1, duration_ms=d) for i, d in enumerate(durations)]
    sequences = logs.table_frame(spark, "user_sequences", logs.reference_sequences(events, [], Config()))
    rows = logs.collected(quantiles(sequences, None, None, RewardsConfig(backoff=())), "rewards")
    assert [row["bucket"] for row in rows] == [-1, -1, 0, 0, 1, 3, 5, None]


def test_a_heavy_bucket_ranks_every_play(spark):
    """One bucket of 3,000 plays, so that every level of the blocks is used: play i is i, hence no earlier one is longer."""
    start = logs.midnight_us(logs.FIRST_DAY)
    events = [logs.Event(i, i, 1, i, start + i, play_ms=i, duration_ms=1000) for i in range(3000)]
    falling = [logs.Event(5000 + i, i, 2, i, start + i, play_ms=9000 - i, duration_ms=1000) for i in range(3000)]
    sequences = logs.table_frame(spark, "user_sequences", logs.reference_sequences(events + falling, [], Config()))
    rows = logs.collected(quantiles(sequences, None, None, RewardsConfig(backoff=())), "rewards")
    assert [row["quantile"] for row in rows] == ([None] * 3 + [1.0] * 2997) + ([None] * 3 + [0.0] * 2997)
