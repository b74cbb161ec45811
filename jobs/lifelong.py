"""Long histories as at most `tokens` representatives (OneRec-V1, section 2.2); the algorithm is in `history_clusters`.

A user gets a row on the first active day of each block of `every_days` days; the blocks of users are shifted by a hash
of the user, so that every day has its share. The row holds the newest `history` events up to the end of that day; what
a reader's newest row lacks lies in the rest of its block, and the short-term features cover that. A run over all days
computes a user once a block and not once a day; what a row is depends on the days up to it alone, hence one day by
itself equals one pass over all.

Vectors are those of the fit day and of the days appended to it up to the row's day. Rows of earlier days use those of the
fit day, which saw all train days, as everything fitted does; the vectors only decide which events of the user's own past
stand together. An item that has no vector by then is taken at the origin.

Histories that fit into `tokens` never enter Python. The others are cut to `history` while they are still arrays of days,
joined with their items' vectors and compressed a user at a time: a task holds one history (100,000 events of 64
dimensions: about 300 MB of Python). Tasks are as many as the events ask for, so that each of a few heavy users mostly has
one alone and a free core takes the next. What grows with the log is the scan of earlier days for the events of the day's
users; only theirs are kept.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.history_clusters import compress
from jobs.tables import read_days, replace_days, spark_schema
from jobs.timelines import EVENTS
from schemas.calendar import Calendar
from schemas.config import Config, LifelongConfig
from schemas.lake import Identities, Lake
from schemas.lineage import LIFELONG
from schemas.tables import LIFELONG_SEQUENCES

EVENTS_A_TASK = 25_000  # of long histories; a heavy user of 100,000 is then mostly alone in its task
EVENTS_A_FILE = 4_000_000  # representatives; about 100 MB
ARRAYS = ("impression_ids", *EVENTS)
KEY = ("user_id", "date")


def run(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Mapping[str, Identities],
    pins: Mapping[str, int],
) -> dict[str, int]:
    """Writes the stale days of lifelong_sequences in one pass; the version written."""
    days = todo.get("lifelong_sequences")
    if not days:
        return {}
    known = [d for d in calendar.days if d <= max(days)]
    sequences = read_days(spark, lake, "user_sequences", known, pins["user_sequences"])
    fitted = [d for d in (calendar.fit_day, *calendar.appended) if d <= max(calendar.fit_day, max(days))]
    vectors = read_days(spark, lake, "item_embeddings", fitted, pins["item_embeddings"])
    spans = spans_of(sequences, min(days), max(days), config.lifelong).where(F.col("date").isin(sorted(days))).persist()
    tokens, long_events = totals(spans, config.lifelong.tokens)
    tasks = -(-long_events // EVENTS_A_TASK)
    # Writing in order of users looks at the rows twice; what Python made is kept for the second look.
    longer = long_rows(sequences, vectors, spans, calendar.fit_day, config.lifelong, tasks).persist(StorageLevel.DISK_ONLY)
    try:
        rows = short_rows(sequences, spans, config.lifelong.tokens).unionByName(longer)
        files = -(-tokens // (EVENTS_A_FILE * len(days)))
        version = replace_days(lake, "lifelong_sequences", rows, days, max(1, files), order=("user_id",))
        return {"lifelong_sequences": version}
    finally:
        longer.unpersist()
        spans.unpersist()


def spans_of(sequences: DataFrame, first: datetime.date, last: datetime.date, settings: LifelongConfig) -> DataFrame:
    """user_id, date, length, first_date, first_events: a row for each user and day from `first` to `last` that gets one.

    Its history has `length` events: all of the days after `first_date` up to `date`, and the newest `first_events` of
    `first_date`. `sequences` holds every day up to `last`.
    """
    sizes = sequences.select(*KEY, F.size("feedback").alias("events"))  # the narrowest array
    block_starts = first - datetime.timedelta(days=settings.every_days - 1)  # earlier blocks end before `first`
    due = due_days(sizes.where(F.col("date") >= block_starts), settings.every_days)
    due = due.where(F.col("date").between(F.lit(first), F.lit(last)))
    earlier = sizes.select("user_id", F.col("date").alias("day"), "events")
    newest_first = Window.partitionBy(*KEY).orderBy(F.desc("day"))
    newer = F.coalesce(F.sum("events").over(newest_first.rowsBetween(Window.unboundedPreceding, -1)), F.lit(0))
    joined = due.join(earlier, "user_id").where(F.col("day") <= F.col("date")).withColumn("newer", newer)
    kept = joined.where(F.col("newer") < settings.history)
    return kept.groupBy(*KEY).agg(
        F.least(F.sum("events"), F.lit(settings.history)).cast("int").alias("length"),
        F.min("day").alias("first_date"),
        (F.least(F.sum("events"), F.lit(settings.history)) - F.max("newer")).cast("int").alias("first_events"),
    )


def due_days(days: DataFrame, every_days: int) -> DataFrame:
    """user_id, date: each user's first active day in each of their blocks of `every_days` days."""
    shift = F.pmod(F.xxhash64("user_id"), F.lit(every_days))
    block = F.floor((F.unix_date("date") + shift) / every_days)
    return days.groupBy("user_id", block.alias("block")).agg(F.min("date").alias("date")).drop("block")


def totals(spans: DataFrame, tokens: int) -> tuple[int, int]:
    """Representatives of all rows, at most, and the events of the histories that are compressed."""
    length = F.col("length")
    sums = [F.sum(F.least(length, F.lit(tokens))), F.sum(F.when(length > tokens, length))]
    (found,) = spans.agg(*(F.coalesce(total, F.lit(0)) for total in sums)).collect()
    return found[0], found[1]


def days_in(sequences: DataFrame, spans: DataFrame) -> DataFrame:
    """One row a day of each history: user_id, date (of the row), day, length, and the arrays cut to the span."""
    days = sequences.withColumnRenamed("date", "day").join(spans, "user_id")
    within = days.where(F.col("day").between(F.col("first_date"), F.col("date")))
    events = F.size("item_ids")
    count = F.when(F.col("day") == F.col("first_date"), F.col("first_events")).otherwise(events)
    return within.select(*KEY, "day", "length", *(newest(name, events, count).alias(name) for name in ARRAYS))


def newest(array: str, size: Column, count: Column) -> Column:
    """The last `count` of an array of `size`."""
    return F.slice(array, size - count + 1, count)


def short_rows(sequences: DataFrame, spans: DataFrame, tokens: int) -> DataFrame:
    """Rows of lifelong_sequences for the histories that are kept as they are."""
    days = days_in(sequences, spans.where(F.col("length") <= tokens))
    day = F.struct("day", *EVENTS)
    lines = days.groupBy(*KEY).agg(F.sort_array(F.collect_list(day)).alias("days"))
    arrays = [F.flatten(F.col("days")[name]).alias(name) for name in EVENTS]
    whole = lines.select(*KEY, *arrays)
    return whole.withColumn("weights", F.transform("item_ids", lambda _: F.lit(1)))


def long_rows(
    sequences: DataFrame,
    vectors: DataFrame,
    spans: DataFrame,
    fit_day: datetime.date,
    settings: LifelongConfig,
    tasks: int,
) -> DataFrame:
    """Rows of lifelong_sequences for the histories that are compressed, by hash of user and day in `tasks` tasks."""
    longer = spans.where(F.col("length") > settings.tokens)
    events = days_in(sequences, longer).select(*KEY, F.inline(F.arrays_zip(*ARRAYS)))
    known = vectors.select(F.col("item_id").alias("item_ids"), F.col("date").alias("known_from"), "vector")
    seen = F.col("known_from") <= F.greatest(F.col("date"), F.lit(fit_day))
    joined = events.join(known, "item_ids", "left").select(*KEY, *ARRAYS, F.when(seen, F.col("vector")).alias("vector"))
    groups = joined.repartition(max(1, tasks), *KEY).groupBy(*KEY)
    return groups.applyInArrow(compressing(settings), spark_schema(LIFELONG_SEQUENCES))


def compressing(settings: LifelongConfig) -> Callable[..., pa.Table]:
    """What a task does with the events of one history."""

    def compressed(key, table):  # type: ignore[no-untyped-def]  # Spark reads hints and cannot resolve postponed ones
        events = {name: table.column(name).to_numpy() for name in ARRAYS}
        made = compress(events, vectors_of(table), settings)
        rows = {name: pa.array([values]) for name, values in made.items()}
        return pa.table({"user_id": [key[0].as_py()], "date": [key[1].as_py()]} | rows, schema=LIFELONG_SEQUENCES.schema)

    return compressed


def vectors_of(table: pa.Table) -> dict[str, np.ndarray]:
    """item_ids int64 [I], distinct, and vectors float32 [I, D], of the items that have one."""
    known = table.select(["item_ids", "vector"]).filter(table.column("vector").is_valid())
    items, first = np.unique(known.column("item_ids").to_numpy(), return_index=True)
    lists = known.column("vector").take(pa.array(first)).combine_chunks()
    width = len(lists[0]) if len(items) else 0
    return {"item_ids": items, "vectors": lists.flatten().to_numpy().reshape(len(items), width)}


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(LIFELONG, run))
