"""Events of each user and day, and the multi-scale features as of its end (OneRec-V1, section 2.2).

`user_sequences(D)` holds the events of D alone: one shuffle by (user, day). `user_features(D)` holds, for each user
active on D, the last `short_length` events and the last `positive_length` engaged ones of all days up to D. All stale
days come from one pass (see `jobs.timelines`); a single day starts from each user's newest earlier row of
`user_features` and reads the events of that day only. What still grows with the log is the scan of the earlier rows'
two key columns.
"""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.arrow_files import SMALL_DAYS_TASKS, ArrowRows, Batches
from jobs.as_of import join_as_of
from jobs.jagged import dates, days_since_1970, lists, offsets_of, pieces, ranges, starts
from jobs.population import WatchRule
from jobs.tables import read, read_days, replace_days
from jobs.timelines import EVENTS, EVENTS_A_BATCH, IDS, Timelines, newest_rows, task_rows, tasks_for, with_attributes
from schemas.calendar import Calendar
from schemas.config import Config, SequencesConfig
from schemas.errors import MissingUpstream
from schemas.feedback import BITS, FLAGS, RATED_HIGH, mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import SEQUENCES

EVENTS_A_FILE = 1_500_000  # about 35 MB of `user_sequences`
MINUS_ONE_IF_UNKNOWN = {"author_ids": "author_id", "play_ms": "play_ms", "duration_ms": "duration_ms"}


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
    counts = lake.rows_by_day("impressions", pins["impressions"])
    files = max(1, -(-max(counts.get(day, 0) for day in todo) // EVENTS_A_FILE))
    watch = watch_rule(spark, lake, config.sequences, todo, pins["impressions"])
    rows = sequences_of(impressions, items, config.source.rating_threshold, sorted(todo), files, watch)
    return replace_days(lake, "user_sequences", [rows], todo)


def watch_rule(
    spark: SparkSession, lake: Lake, settings: SequencesConfig, todo: Identities, version: int
) -> WatchRule | None:
    """The rule for the bit `watched_high`, with the plays of the days before those of `todo`; None where none is asked."""
    if settings.watch_quantile is None:
        return None
    back = datetime.timedelta(days=settings.watch_days)
    days = [d for d in lake.identities("impressions") if min(todo) - back <= d < max(todo)]
    return WatchRule.of(read_days(spark, lake, "impressions", days, version), settings)


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
    days = [d for d in calendar.days if first <= d <= last]
    sequences = read_days(spark, lake, "user_sequences", days, version)
    earlier, base, known = [d for d in calendar.days if d < first], None, pins.get("user_features")
    if earlier:
        base = newest_rows(read_days(spark, lake, "user_features", earlier, known), sequences)
    users = read(spark, lake, "users", pins["users"])
    tasks = tasks_for(lake, days, version, known if earlier else None)
    rows = features_of(sequences, base, users, config.sequences, tasks, sorted(todo))
    return replace_days(lake, "user_features", [rows], todo)


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


def sequences_of(
    impressions: DataFrame,
    items: DataFrame,
    rating_threshold: float,
    days: Sequence[datetime.date],
    files_a_day: int = 1,
    watch: WatchRule | None = None,
) -> ArrowRows:
    """Rows of user_sequences from rows of impressions of `days`; authors by the newest row of `items` at or before the day.

    One shuffle: a task gets the users of a day, or those of one of its `files_a_day` parts by hash of the user.
    """
    known = join_as_of(impressions, items, "item_id", ["author_id"])
    events = known.select(
        "user_id",
        "date",
        F.col("impression_id").alias("impression_ids"),
        F.col("request_id").alias("request_ids"),
        F.col("item_id").alias("item_ids"),
        F.unix_micros("ts").alias("ts_us"),
        *(F.coalesce(source, F.lit(-1)).alias(name) for name, source in MINUS_ONE_IF_UNKNOWN.items()),
        feedback_bits(rating_threshold).alias("feedback"),
    )
    day = F.date_diff("date", F.lit(min(days)))
    part = F.pmod(F.xxhash64("user_id"), F.lit(files_a_day)).cast("int")
    tasks = min(len(days), SMALL_DAYS_TASKS) if files_a_day == 1 else len(days) * files_a_day
    making = functools.partial(sequences_in, watch=watch)
    return ArrowRows("user_sequences", events.repartitionById(tasks, day * files_a_day + part), making)


def sequences_in(batches: Batches, watch: WatchRule | None) -> Iterator[pa.RecordBatch]:
    """Rows of user_sequences from the events of whole users and days."""
    found = [batch for batch in batches if len(batch)]
    if not found:
        return
    events = pa.Table.from_batches(found)
    names = ("date", "user_id", "ts_us", "impression_ids")  # the last orders events of the same time
    columns = {name: events.column(name) for name in events.column_names if name != "date"}
    columns = {name: column.to_numpy() for name, column in columns.items()}
    columns["date"] = events.column("date").cast(pa.int32()).to_numpy()
    if watch is not None:
        columns["feedback"] = columns["feedback"] | watch.bits(columns)
    order = np.lexsort([columns[name] for name in reversed(names)])
    columns = {name: values[order] for name, values in columns.items()}
    first = starts(columns["date"], columns["user_id"])
    sizes = np.diff(np.append(first, len(order)))
    for rows in pieces(starts(columns["date"][first]), sizes, EVENTS_A_BATCH):
        offsets = offsets_of(sizes[rows])
        within = slice(first[rows][0], first[rows][0] + offsets[-1])
        arrays = {name: lists(offsets, columns[name][within]) for name in (*IDS, *EVENTS)}
        keys = {"user_id": columns["user_id"][first[rows]], "date": dates(columns["date"][first[rows]])}
        yield pa.record_batch({**keys, **arrays})


def feedback_bits(rating_threshold: float) -> Column:
    """int: the bits of schemas.feedback; a flag that the source does not have is 0."""
    conditions = {name: F.col(name) for name in FLAGS} | {RATED_HIGH: F.col("rating") >= rating_threshold}
    bits = [F.when(F.coalesce(condition, F.lit(False)), BITS[name]).otherwise(0) for name, condition in conditions.items()]
    total = bits[0]
    for bit in bits[1:]:
        total = total + bit
    return total


def features_of(
    sequences: DataFrame,
    base: DataFrame | None,
    users: DataFrame,
    settings: SequencesConfig,
    tasks: int = 1,
    days: Collection[datetime.date] | None = None,
) -> ArrowRows:
    """Rows of user_features for every user and day of `sequences`, which holds whole days without a gap; with `days`, of
    these alone.

    `base` has each user's newest row of user_features before the first of those days, or is None at the start of
    the log. Attributes are those of the newest row of `users` at or before the day, or empty.
    """
    rows = task_rows(with_attributes(sequences, users), base, tasks)
    return ArrowRows("user_features", rows, functools.partial(features_in, settings=settings, days=days))


def features_in(
    batches: Batches, settings: SequencesConfig, days: Collection[datetime.date] | None
) -> Iterator[pa.RecordBatch]:
    lines = Timelines.of(batches, mask_of(settings.engaged))
    if lines is None:
        return
    order = np.lexsort((lines.users, lines.days))
    if days is not None:
        order = order[np.isin(lines.days[order], days_since_1970(days))]
    stop = lines.stop[order]
    start = np.maximum(stop - settings.short_length, lines.line_first[order])
    engaged_stop = lines.engaged_above[stop]
    engaged_start = np.maximum(engaged_stop - settings.positive_length, lines.engaged_first[order])
    sizes = stop - start + engaged_stop - engaged_start
    for rows in pieces(starts(lines.days[order]), sizes, EVENTS_A_BATCH):
        recent, recent_offsets = ranges(start[rows], stop[rows])
        engaged, engaged_offsets = ranges(engaged_start[rows], engaged_stop[rows])
        yield pa.record_batch(
            {
                "user_id": lines.users[order[rows]],
                "date": dates(lines.days[order[rows]]),
                "attributes": lines.attributes.take(pa.array(order[rows])),
                **lines.arrays(recent, recent_offsets, "short_"),
                **lines.arrays(lines.engaged[engaged], engaged_offsets, "positive_"),
            }
        )


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(SEQUENCES, run))
