"""Events of each user and day, and the multi-scale features as of its end (OneRec-V1, section 2.2).

`user_sequences(D)` holds the events of D alone: one shuffle by (user, day). `user_features(D)` holds, for each user
active on D, the last `short_length` events and the last `positive_length` engaged ones of all days up to D. All stale
days come from one pass (see `jobs.timelines`); a single day starts from each user's newest earlier row of
`user_features` and reads the events of that day only. What still grows with the log is the scan of the earlier rows'
two key columns.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.as_of import join_as_of
from jobs.tables import read, read_days, replace_days
from jobs.timelines import EVENTS, cut, day_ends, newest_rows, timelines
from schemas.calendar import Calendar
from schemas.config import Config, SequencesConfig
from schemas.errors import MissingUpstream
from schemas.feedback import BITS, FLAGS, RATED_HIGH, mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import SEQUENCES

EVENTS_A_FILE = 4_000_000  # about 100 MB of `user_sequences`
MINUS_ONE_IF_UNKNOWN = {"author_ids": "author_id", "play_ms": "play_ms", "duration_ms": "duration_ms"}
FEATURES_A_FILE = 200_000  # rows; a full one has 276 events


def run(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Mapping[str, Identities],
    pins: Mapping[str, int],
) -> dict[str, int]:
    """Writes the stale days of user_sequences and user_features, one pass each; the versions written."""
    written = {}
    if todo.get("user_sequences"):
        written["user_sequences"] = write_sequences(spark, lake, config, todo["user_sequences"], pins)
    if todo.get("user_features"):
        version = written.get("user_sequences", pins.get("user_sequences"))
        written["user_features"] = write_features(spark, lake, config, calendar, todo["user_features"], pins, version)
    return written


def write_sequences(spark: SparkSession, lake: Lake, config: Config, todo: Identities, pins: Mapping[str, int]) -> int:
    impressions = read_days(spark, lake, "impressions", todo, pins["impressions"])
    items = read(spark, lake, "items", pins["items"])
    rows = sequences_of(impressions, items, config.source.rating_threshold)
    events = lake.row_count("impressions", pins["impressions"])
    files = -(-events // (EVENTS_A_FILE * max(1, len(lake.identities("impressions")))))
    return replace_days(spark, lake, "user_sequences", rows, todo, files_a_day=max(1, files), order=("user_id",))


def write_features(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Identities,
    pins: Mapping[str, int],
    version: int | None,
) -> int:
    first, last = first_day_to_read(lake, calendar, min(todo)), max(todo)
    sequences = read_days(spark, lake, "user_sequences", [d for d in calendar.days if first <= d <= last], version)
    earlier = [d for d in calendar.days if d < first]
    base = None
    if earlier:
        base = newest_rows(read_days(spark, lake, "user_features", earlier, pins.get("user_features")), sequences)
    users = read(spark, lake, "users", pins["users"])
    rows = features_of(sequences, base, users, config.sequences).where(F.col("date").isin(sorted(todo)))
    files = -(-lake.row_count("user_sequences", version) // (FEATURES_A_FILE * max(1, len(calendar.days))))
    return replace_days(spark, lake, "user_features", rows, todo, files_a_day=max(1, files), order=("user_id",))


def first_day_to_read(lake: Lake, calendar: Calendar, first_todo: datetime.date) -> datetime.date:
    """The first day whose events are needed: the first of `todo`, or an earlier day that user_features lacks.

    Raises MissingUpstream where user_sequences lacks one of the days from there on.
    """
    known = lake.identities("user_features")
    first = next((d for d in calendar.days if d < first_todo and d not in known), first_todo)
    present = lake.identities("user_sequences")
    for day in calendar.days:
        if first <= day < first_todo and day not in present:
            raise MissingUpstream(
                f"user_features of {first_todo} continues the days before it, and user_sequences has no partition {day}; "
                f"run stage sequences for {day} first."
            )
    return first


def sequences_of(impressions: DataFrame, items: DataFrame, rating_threshold: float) -> DataFrame:
    """Rows of user_sequences from rows of impressions; authors by the newest row of `items` at or before the day."""
    known = join_as_of(impressions, items, "item_id", ["author_id"])
    event = F.struct(
        F.unix_micros("ts").alias("ts_us"),
        F.col("impression_id").alias("impression_ids"),  # second: it orders events of the same time
        F.col("request_id").alias("request_ids"),
        F.col("item_id").alias("item_ids"),
        *(F.coalesce(source, F.lit(-1)).alias(name) for name, source in MINUS_ONE_IF_UNKNOWN.items()),
        feedback_bits(rating_threshold).alias("feedback"),
    )
    days = known.groupBy("user_id", "date").agg(F.sort_array(F.collect_list(event)).alias("events"))
    return days.select(
        "user_id", "date", *(F.col("events")[name].alias(name) for name in ("impression_ids", "request_ids", *EVENTS))
    )


def feedback_bits(rating_threshold: float) -> Column:
    """int: the bits of schemas.feedback; a flag that the source does not have is 0."""
    conditions = {name: F.col(name) for name in FLAGS} | {RATED_HIGH: F.col("rating") >= rating_threshold}
    bits = [F.when(F.coalesce(condition, F.lit(False)), BITS[name]).otherwise(0) for name, condition in conditions.items()]
    total = bits[0]
    for bit in bits[1:]:
        total = total + bit
    return total


def features_of(sequences: DataFrame, base: DataFrame | None, users: DataFrame, settings: SequencesConfig) -> DataFrame:
    """Rows of user_features for every user and day of `sequences`, which holds whole days without a gap.

    `base` has each user's newest row of user_features before the first of those days, or is None at the start of
    the log. Attributes are those of the newest row of `users` at or before the day, or empty.
    """
    mask = mask_of(settings.engaged)
    moments = day_ends(sequences, mask).withColumns(
        {
            "recent_start": F.col("recent_stop") - settings.short_length,
            "engaged_start": F.col("engaged_stop") - settings.positive_length,
        }
    )
    moments = join_as_of(moments, users, "user_id", ["attributes"])
    return cut(moments, timelines(sequences, base, mask)).select(
        "user_id",
        "date",
        F.coalesce("attributes", F.array().cast("array<string>")).alias("attributes"),
        *(F.col(f"recent_{name}").alias(f"short_{name}") for name in EVENTS),
        *(F.col(f"engaged_{name}").alias(f"positive_{name}") for name in EVENTS),
    )


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(SEQUENCES, run))
