"""Train events in Spark where the split is by user: the rule of `pipelines.split.roles_by_user` as a join.

A user's last positive time tests and the one before validates; with two, the last one tests; a lone one trains.
A test holds the two to the same rows.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.timelines import has_any


def validation_starts(sequences: DataFrame, positive_mask: int) -> DataFrame:
    """user_id, train_end_us: where a user's train events end, for users with at least two positive times.

    `sequences` has rows of user_sequences of the whole log. Of each day only the newest three times are kept.
    """
    zipped = F.filter(F.arrays_zip("ts_us", "feedback"), lambda e: has_any(e["feedback"], positive_mask))
    newest = F.slice(F.sort_array(F.array_distinct(zipped["ts_us"]), asc=False), 1, 3)
    by_day = sequences.select("user_id", newest.alias("times"))
    by_user = by_day.groupBy("user_id").agg(F.flatten(F.collect_list("times")).alias("times"))
    times = by_user.select("user_id", F.sort_array(F.array_distinct("times"), asc=False).alias("times"))
    end = F.when(F.size("times") >= 3, F.get("times", F.lit(1))).otherwise(F.get("times", F.lit(0)))
    return times.where(F.size("times") >= 2).select("user_id", end.alias("train_end_us"))


def train_only(events: DataFrame, starts: DataFrame) -> DataFrame:
    """The rows of `events` (user_id, ts_us, ...) strictly before their user's `train_end_us`; all of a user without one."""
    joined = events.join(starts, "user_id", "left")
    return joined.where(F.col("train_end_us").isNull() | (F.col("ts_us") < F.col("train_end_us"))).drop("train_end_us")
