"""Items that the same users liked closely after each other, with weights that add up over days.

A pair of kind `cooccurrence` is two positives of one user, of different items, at most `window` positives and
`max_gap_hours` apart; it belongs to the day of the later one. An occurrence weighs 1 / (distance in positives), so that
neighbours count more than items five positives apart. Weights are sums of counts a distance in a fixed order, hence
bit-identical whatever the partitioning.

Each positive looks back at `window` others of its user: the work is the positives times the window, without a join.
Day D reads the events of D and of the `window_days` before it. Where the split is by user, only events before the
user's validation threshold count, and finding that one reads two columns of the whole log.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.split import train_only, validation_starts
from jobs.tables import read_days, replace_days
from jobs.timelines import has_any
from schemas.calendar import Calendar
from schemas.config import Config, PairsConfig
from schemas.feedback import mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import ITEM_PAIRS, window_days

KIND = "cooccurrence"
HOUR_US = 3_600_000_000


def run(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Mapping[str, Identities],
    pins: Mapping[str, int],
) -> dict[str, int]:
    """Writes the stale days of item_pairs in one pass; the version written."""
    days = todo.get("item_pairs")
    if not days:
        return {}
    first = min(days) - datetime.timedelta(days=window_days(config))
    version = pins["user_sequences"]
    wanted = [d for d in calendar.days if first <= d <= max(days)]
    mask = mask_of(config.targets.positive)
    events = positives(read_days(spark, lake, "user_sequences", wanted, version), mask)
    if config.split.by == "user":
        everything = read_days(spark, lake, "user_sequences", calendar.days, version)
        events = train_only(events, validation_starts(everything, mask))
    rows = cooccurrences(events, config.item_pairs, window_days(config)).where(F.col("date").isin(sorted(days)))
    return {"item_pairs": replace_days(spark, lake, "item_pairs", rows, days)}


def positives(sequences: DataFrame, mask: int) -> DataFrame:
    """user_id, date, ts_us, impression_id, item_id: the events of `sequences` with any bit of `mask`."""
    event = F.arrays_zip("ts_us", "impression_ids", "item_ids", "feedback")
    kept = F.filter(event, lambda e: has_any(e["feedback"], mask))
    return sequences.select("user_id", "date", F.inline(kept)).select(
        "user_id",
        "date",
        "ts_us",
        F.col("impression_ids").alias("impression_id"),
        F.col("item_ids").alias("item_id"),
    )


def cooccurrences(events: DataFrame, settings: PairsConfig, days_back: int) -> DataFrame:
    """Rows of item_pairs from positives; `days_back` bounds the days between the two, as the plan's inputs do."""
    in_time = Window.partitionBy("user_id").orderBy("ts_us", "impression_id")
    event = F.struct("item_id", "ts_us", "date")
    earlier = [
        F.struct(F.lit(distance).alias("distance"), F.lag(event, distance).over(in_time).alias("event"))
        for distance in range(1, settings.window + 1)
    ]
    looked_back = events.select("date", "item_id", "ts_us", F.array(*earlier).alias("earlier"))
    paired = looked_back.withColumn("earlier", F.explode("earlier"))
    other = F.col("earlier")["event"]
    close = (
        (other["item_id"] != F.col("item_id"))
        & (F.col("ts_us") - other["ts_us"] <= int(settings.max_gap_hours * HOUR_US))
        & (F.date_diff("date", other["date"]) <= days_back)
    )
    pairs = paired.where(close).select(
        F.least("item_id", other["item_id"]).alias("item_a"),
        F.greatest("item_id", other["item_id"]).alias("item_b"),
        "date",
        F.col("earlier")["distance"].alias("distance"),
    )
    return weighted(pairs, settings.window)


def weighted(pairs: DataFrame, window: int) -> DataFrame:
    """Sums 1 / distance over the occurrences of each pair and day."""
    counts = [F.count_if(F.col("distance") == k).alias(f"at_{k}") for k in range(1, window + 1)]
    weight = F.lit(0.0)
    for k in range(1, window + 1):
        weight = weight + F.col(f"at_{k}") / F.lit(float(k))
    counted = pairs.groupBy("item_a", "item_b", "date").agg(*counts)
    return counted.select("item_a", "item_b", F.lit(KIND).alias("kind"), weight.alias("weight"), "date")


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(ITEM_PAIRS, run))
