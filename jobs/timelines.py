"""A user's events as one long timeline, from which every bounded tail is a slice.

The last 20 events and the last 256 engaged events as of many moments (the end of a day, a request) would each need an
aggregation of their own. Instead every user gets one row with two lines of events in time order, `recent_*` (all events)
and `engaged_*` (the engaged ones), and a moment is two offsets into them. Rows of moments join that one row by user and
slice it: the join refers to the long arrays and copies only the tails, so the work is one sort of the events plus
the size of the output, whatever the number of days or the length of a history.

A line starts with the tails that `user_features` kept before the first day of `sequences` (`base`), so that a single day
reads that day's events alone and gives the rows of a full build. `known_recent` and `known_engaged` count what
the base brought; offsets count the events of `sequences` and start behind it.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

# The parallel arrays of an event, as in every table that carries a history.
EVENTS = ("item_ids", "author_ids", "ts_us", "play_ms", "duration_ms", "feedback")


def has_any(feedback: Column, mask: int) -> Column:
    """Whether any bit of `mask` is set."""
    return feedback.bitwiseAND(F.lit(mask)) != 0


def engaged_events(mask: int) -> Column:
    """array<struct>: the events of a row of parallel arrays that have any bit of `mask`."""
    return F.filter(F.arrays_zip(*EVENTS), lambda event: has_any(event["feedback"], mask))


def newest_rows(features: DataFrame, sequences: DataFrame) -> DataFrame:
    """The newest row of `features` for each user of `sequences`.

    The dates are found on two narrow columns, so that only the chosen rows' arrays are shuffled.
    """
    active = sequences.select("user_id").distinct()
    newest = (
        features.select("user_id", "date")
        .join(active, "user_id", "left_semi")
        .groupBy("user_id")
        .agg(F.max("date").alias("date"))
    )
    return features.join(newest, ["user_id", "date"])


def timelines(sequences: DataFrame, base: DataFrame | None, mask: int) -> DataFrame:
    """One row a user of `sequences` (rows of `user_sequences`), continued from `base` (at most one row of
    `user_features` a user).

    Columns: user_id, recent_* and engaged_* (the six arrays of an event each), known_recent, known_engaged (int).
    """
    days = sequences.select("user_id", F.struct("date", *EVENTS, engaged_events(mask).alias("engaged")).alias("day"))
    lines = days.groupBy("user_id").agg(F.sort_array(F.collect_list("day")).alias("days"))
    lines = lines.select(
        "user_id",
        *(F.flatten(F.col("days")[name]).alias(f"recent_{name}") for name in EVENTS),
        F.flatten(F.col("days")["engaged"]).alias("engaged"),
    )
    lines = lines.select(
        "user_id",
        *(f"recent_{name}" for name in EVENTS),
        *(F.col("engaged")[name].alias(f"engaged_{name}") for name in EVENTS),
    )
    if base is None:
        return lines.withColumns({"known_recent": F.lit(0), "known_engaged": F.lit(0)})
    tails = base.select("user_id", *(f"short_{name}" for name in EVENTS), *(f"positive_{name}" for name in EVENTS))
    joined = lines.join(tails, "user_id", "left")
    return joined.select(
        "user_id",
        *(_continued(f"short_{name}", f"recent_{name}") for name in EVENTS),
        *(_continued(f"positive_{name}", f"engaged_{name}") for name in EVENTS),
        F.coalesce(F.size("short_item_ids"), F.lit(0)).alias("known_recent"),
        F.coalesce(F.size("positive_item_ids"), F.lit(0)).alias("known_engaged"),
    )


def _continued(tail: str, line: str) -> Column:
    return F.when(F.col(tail).isNull(), F.col(line)).otherwise(F.concat(tail, line)).alias(line)


def between(array: str | Column, start: Column, end: Column) -> Column:
    """array[start:end] with offsets from 0; empty where end <= start."""
    return F.slice(array, F.greatest(start, F.lit(0)) + 1, F.greatest(end - F.greatest(start, F.lit(0)), F.lit(0)))


def day_ends(sequences: DataFrame, mask: int) -> DataFrame:
    """user_id, date, recent_end, engaged_end: events, and engaged ones, up to the end of each day of `sequences`."""
    so_far = Window.partitionBy("user_id").orderBy("date").rowsBetween(Window.unboundedPreceding, 0)
    sizes = sequences.select(
        "user_id",
        "date",
        F.size("item_ids").alias("events"),
        F.size(F.filter("feedback", lambda bits: has_any(bits, mask))).alias("engaged"),
    )
    return sizes.select(
        "user_id",
        "date",
        F.sum("events").over(so_far).cast("int").alias("recent_end"),
        F.sum("engaged").over(so_far).cast("int").alias("engaged_end"),
    )
