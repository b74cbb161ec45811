"""Items that belong together by the days' positives, in kinds (`item_pairs.kinds`) whose weights add up over days.

`swing` and `user_to_item` have files of their own. A pair of kind `cooccurrence` is two positives of one user, of
different items, at most `window` positives and `max_gap_hours` apart; it belongs to the day of the later one. An
occurrence weighs 1 / (distance in positives), so that neighbours count more than items five positives apart. Weights are
sums of counts a distance in a fixed order, hence bit-identical whatever the partitioning.

Each positive looks back at `window` others of its user: the work is the positives times the window, without a join.
Day D reads the events of D and of the `window_days` before it. Where the split is by user, only events before the
user's validation threshold count, and finding that one reads two columns of the whole log.
"""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Collection, Mapping

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs import swing, user_to_item
from jobs.split import train_only, validation_starts
from jobs.tables import read_days, replace_days
from jobs.timelines import has_any
from schemas.calendar import Calendar
from schemas.config import Config, PairsConfig
from schemas.feedback import mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import ITEM_PAIRS, window_days

KIND = "cooccurrence"
ITEMS = ("item_a", "item_b")
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
    rows = pairs_of(events, config.item_pairs, window_days(config), days)
    return {"item_pairs": replace_days(lake, "item_pairs", rows, days)}


def pairs_of(events: DataFrame, settings: PairsConfig, days_back: int, days: Collection[datetime.date]) -> DataFrame:
    """Rows of item_pairs of `days`, of the kinds that are on, from the positives of those days and the `days_back` before
    each."""
    span = (settings, days_back, days)
    makers = {
        KIND: lambda: cooccurrences(events, settings, days_back).where(F.col("date").isin(sorted(days))),
        swing.KIND: lambda: swing.swings(events, *span),
        user_to_item.KIND: lambda: user_to_item.triggers(events, closeness(events, *span), *span),
    }
    return functools.reduce(DataFrame.unionByName, [makers[kind]() for kind in settings.kinds])


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
    found = occurrences(events, settings, days_back)
    counted = found.groupBy("item_a", "item_b", "date").agg(*distances(settings.window))
    weight = reciprocal_sum(settings.window).alias("weight")
    return counted.select("item_a", "item_b", F.lit(KIND).alias("kind"), weight, "date")


def occurrences(events: DataFrame, settings: PairsConfig, days_back: int) -> DataFrame:
    """item_a < item_b, first_date, date, distance: each two positives that lie close, with their days."""
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
    return paired.where(close).select(
        F.least("item_id", other["item_id"]).alias("item_a"),
        F.greatest("item_id", other["item_id"]).alias("item_b"),
        other["date"].alias("first_date"),
        "date",
        F.col("earlier")["distance"].alias("distance"),
    )


def closeness(events: DataFrame, settings: PairsConfig, days_back: int, days: Collection[datetime.date]) -> DataFrame:
    """item_a, item_b, date, closeness: c(a, b)^2 / c(a) in both directions as of each of `days`, c the weight of the
    occurrences whose two positives lie on that day or the `days_back` before, and c(a) its sum over partners."""
    found = occurrences(events, settings, days_back)
    window_end = F.explode(F.sequence("date", F.date_add("first_date", days_back)))
    as_of = found.select("item_a", "item_b", "distance", window_end.alias("date")).where(F.col("date").isin(sorted(days)))
    counted = as_of.groupBy("item_a", "item_b", "date").agg(*distances(settings.window))
    sides = [F.struct(F.col(a).alias("item_a"), F.col(b).alias("item_b")) for a, b in (ITEMS, ITEMS[::-1])]
    own = Window.partitionBy("item_a", "date")
    totals = {f"all_{k}": F.sum(f"at_{k}").over(own) for k in range(1, settings.window + 1)}
    at = (f"at_{k}" for k in range(1, settings.window + 1))
    both = counted.select("date", *at, F.inline(F.array(*sides))).withColumns(totals)
    weight, total = reciprocal_sum(settings.window), reciprocal_sum(settings.window, "all")
    return both.select("item_a", "item_b", "date", (weight * weight / total).alias("closeness"))


def distances(window: int) -> list[Column]:
    """at_1 .. at_window: occurrences at each distance."""
    return [F.count_if(F.col("distance") == k).alias(f"at_{k}") for k in range(1, window + 1)]


def reciprocal_sum(window: int, counts: str = "at") -> Column:
    """Sums 1 / distance over occurrences that are counted by distance, in one order."""
    weight = F.lit(0.0)
    for k in range(1, window + 1):
        weight = weight + F.col(f"{counts}_{k}") / F.lit(float(k))
    return weight


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(ITEM_PAIRS, run))
