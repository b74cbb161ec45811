"""A user's events as one long timeline, from which the bounded tails of every moment are cut.

The last 20 events and the last 256 engaged events as of many moments (the end of a day, a request) would each need an
aggregation of their own. Instead every user gets one row with two lines of events in time order, `recent_*` (all events)
and `engaged_*` (the engaged ones), and a moment is a range of offsets into each. `cut` joins moments and lines by user,
some 256 events at a time, so that no row that is made for each moment holds more than about twice the tails: the work is
one sort of the events plus the size of the output, whatever the number of days or the length of a history.

A line starts with the tails that `user_features` kept before the first day of `sequences` (`base`), so that a single day
reads that day's events alone and gives the rows of a full build. Offset 0 is the first event of `sequences`; negative
offsets reach into what the base brought, of which `known_recent` and `known_engaged` are the counts.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

# The parallel arrays of an event, as in every table that carries a history.
EVENTS = ("item_ids", "author_ids", "ts_us", "play_ms", "duration_ms", "feedback")
LINES = ("recent", "engaged")
PAIRS = tuple((line, name) for line in LINES for name in EVENTS)
RANGES = tuple(f"{line}_{end}" for line in LINES for end in ("start", "stop"))
EVENTS_A_BLOCK = 256


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


def cut(moments: DataFrame, lines: DataFrame) -> DataFrame:
    """The events of each moment: its other columns, and recent_* and engaged_*, the six arrays of an event each.

    `moments` has user_id and the half-open ranges recent_start, recent_stop, engaged_start, engaged_stop (int, offsets;
    a start before the line's first event means that event); `lines` comes from `timelines`.
    """
    carried = [name for name in moments.columns if name not in ("user_id", *RANGES)]
    block = F.floor(F.col("recent_stop") / EVENTS_A_BLOCK).alias("block")
    blocks = moments.groupBy("user_id", block).agg(
        F.collect_list(F.struct(*RANGES, *carried)).alias("moments"),
        *((F.min if name.endswith("start") else F.max)(name).alias(name) for name in RANGES),
    )
    joined = blocks.join(lines, "user_id").withColumns(
        {f"{line}_start": F.greatest(F.col(f"{line}_start"), -F.col(f"known_{line}")) for line in LINES}
    )
    # Here a row is still a block: whatever Spark copies of a long line, it copies once in 256 events.
    parts = joined.select("user_id", "moments", *(f"{line}_start" for line in LINES), *(_part(*pair) for pair in PAIRS))
    each = parts.withColumn("moment", F.explode("moments"))
    return each.select(
        "user_id", *(F.col("moment")[name].alias(name) for name in carried), *(_events_of_moment(*pair) for pair in PAIRS)
    )


def _part(line: str, name: str) -> Column:
    known = F.col(f"known_{line}")
    return between(f"{line}_{name}", F.col(f"{line}_start") + known, F.col(f"{line}_stop") + known).alias(f"{line}_{name}")


def _events_of_moment(line: str, name: str) -> Column:
    moment, first = F.col("moment"), F.col(f"{line}_start")
    events = between(f"{line}_{name}", moment[f"{line}_start"] - first, moment[f"{line}_stop"] - first)
    return events.alias(f"{line}_{name}")


def between(array: str | Column, start: Column, end: Column) -> Column:
    """array[start:end] with offsets from 0; empty where end <= start."""
    return F.slice(array, F.greatest(start, F.lit(0)) + 1, F.greatest(end - F.greatest(start, F.lit(0)), F.lit(0)))


def day_ends(sequences: DataFrame, mask: int) -> DataFrame:
    """user_id, date, recent_stop, engaged_stop: events, and engaged ones, up to the end of each day of `sequences`."""
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
        F.sum("events").over(so_far).cast("int").alias("recent_stop"),
        F.sum("engaged").over(so_far).cast("int").alias("engaged_stop"),
    )
