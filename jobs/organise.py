"""Impressions organised into training examples (OneRec-V2, section 2.1 and Figure 3).

`newest_only` gives one example a user and slice: the context that collate needs, once, and the slice's requests with
their targets. Every impression is a target exactly once, and its context ends strictly before its request's
first ts, ties excluded. The context is the union in time order of the last `positive_length` engaged events and the
last `short_length` events before the slice's first request, and whatever happened from there to its last one. Which
targets bear a loss is a choice of the collate step.

A request that a source spreads over midnight is organised as two, one a day. Requests of a user with the same first ts
share an example, since neither may see the other.

The day is sliced out of each user's timeline (see `jobs.timelines`), which starts from user_features of the days
before: the work is two shuffles of the day's events, whatever the length of a history, plus the size of the output.
Another organiser is one more entry of ORGANISERS, another slice one more of SLICES.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.as_of import join_as_of
from jobs.tables import read, read_days, replace_days
from jobs.timelines import EVENTS, cut, has_any, newest_rows, timelines
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.feedback import mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import ORGANISE

EXAMPLES_A_FILE = 200_000
TARGETS = ("impression_ids", "item_ids", "play_ms", "duration_ms", "feedback")

Organiser = Callable[[DataFrame, DataFrame | None, DataFrame, Config], DataFrame]

# From a request's first ts to the time that names its slice.
SLICES: dict[str, Callable[[Column], Column]] = {"request": lambda first_us: first_us}


def run(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Mapping[str, Identities],
    pins: Mapping[str, int],
) -> dict[str, int]:
    """Writes the stale days of training_examples in one pass; the version written."""
    days = todo.get("training_examples")
    if not days:
        return {}
    wanted = [d for d in calendar.days if min(days) <= d <= max(days)]
    sequences = read_days(spark, lake, "user_sequences", wanted, pins["user_sequences"])
    earlier = [d for d in calendar.days if d < min(days)]
    base = None
    if earlier:
        base = newest_rows(read_days(spark, lake, "user_features", earlier, pins["user_features"]), sequences)
    users = read(spark, lake, "users", pins["users"])
    rows = ORGANISERS[config.organise.organiser](sequences, base, users, config)
    rows = rows.where(F.col("date").isin(sorted(days)))
    files = -(-count_requests(sequences) // (EXAMPLES_A_FILE * len(wanted)))
    version = replace_days(
        spark, lake, "training_examples", rows, days, files_a_day=max(1, files), order=("slice_us", "user_id")
    )
    return {"training_examples": version}


def newest_only(sequences: DataFrame, base: DataFrame | None, users: DataFrame, config: Config) -> DataFrame:
    """Rows of training_examples for the days of `sequences`, which holds whole days without a gap.

    `base` has each user's newest row of user_features before the first of those days, or is None at the start of
    the log. Attributes are those known before the slice's day (see `jobs.as_of`), or empty.
    """
    mask = mask_of(config.sequences.engaged)
    slices = slices_of(requests_of(sequences, mask), SLICES[config.organise.slice])
    first, last = F.col("requests")[0], F.element_at("requests", -1)
    moments = join_as_of(slices, users, "user_id", ["attributes"], known_before=True).withColumns(
        {
            "recent_start": first["recent_stop"] - config.sequences.short_length,
            "recent_stop": last["recent_stop"],
            "engaged_start": first["engaged_stop"] - config.sequences.positive_length,
            "engaged_stop": last["engaged_stop"],
        }
    )
    contexts = cut(moments, timelines(sequences, base, mask))
    # Engaged events among the recent ones are the newest of the engaged line: cut there, the two parts are disjoint.
    shared = F.size(F.filter("recent_feedback", lambda bits: has_any(bits, mask)))
    contexts = contexts.withColumn("older", F.greatest(F.size("engaged_ts_us") - shared, F.lit(0)))
    return contexts.select(
        "user_id",
        "date",
        "slice_us",
        F.coalesce("attributes", F.array().cast("array<string>")).alias("attributes"),
        *(_context(name).alias(f"context_{name}") for name in EVENTS),
        F.col("requests")["request_id"].alias("request_ids"),
        F.col("requests")["first_us"].alias("request_ts_us"),
        _history_ends().alias("history_end"),
        _target_starts().alias("target_start"),
        *(F.flatten("requests.targets")[name].alias(f"target_{name}") for name in TARGETS),
    )


ORGANISERS: dict[str, Organiser] = {"newest_only": newest_only}


def requests_of(sequences: DataFrame, mask: int) -> DataFrame:
    """One row a user, day and request: user_id, date, request_id, first_us, targets (array of struct, in time order),
    and recent_stop and engaged_stop, the events of `sequences` (and the engaged ones) strictly before first_us."""
    columns = ("impression_ids", "request_ids", "item_ids", "ts_us", "play_ms", "duration_ms", "feedback")
    events = sequences.select("user_id", "date", F.inline(F.arrays_zip(*columns)))
    in_time = Window.partitionBy("user_id").orderBy("ts_us")
    strictly_before = in_time.rangeBetween(Window.unboundedPreceding, -1)
    engaged = F.when(has_any(F.col("feedback"), mask), 1).otherwise(0)
    events = events.withColumns(
        {
            "recent_stop": F.rank().over(in_time) - 1,
            "engaged_stop": F.coalesce(F.sum(engaged).over(strictly_before), F.lit(0)).cast("int"),
        }
    )
    target = F.struct("ts_us", *TARGETS)
    return events.groupBy("user_id", "date", F.col("request_ids").alias("request_id")).agg(
        F.min("ts_us").alias("first_us"),
        F.min("recent_stop").alias("recent_stop"),
        F.min("engaged_stop").alias("engaged_stop"),
        F.sort_array(F.collect_list(target)).alias("targets"),
    )


def slices_of(requests: DataFrame, slice_us: Callable[[Column], Column]) -> DataFrame:
    """One row a user, day and slice: user_id, date, slice_us, requests (array of struct, by first_us, then request_id)."""
    request = F.struct("first_us", "request_id", "recent_stop", "engaged_stop", "targets")
    slices = requests.groupBy("user_id", "date", slice_us(F.col("first_us")).alias("slice"))
    gathered = slices.agg(F.sort_array(F.collect_list(request)).alias("requests"))
    return gathered.select("user_id", "date", F.col("requests")[0]["first_us"].alias("slice_us"), "requests")


def _context(name: str) -> Column:
    return F.concat(F.slice(f"engaged_{name}", F.lit(1), F.col("older")), f"recent_{name}")


def _history_ends() -> Column:
    """All events from the slice's first request on are in the context, so offsets count back from its end."""
    length = F.col("older") + F.size("recent_ts_us")
    last = F.element_at("requests", -1)["recent_stop"]
    return F.transform("requests", lambda request: length - (last - request["recent_stop"]))


def _target_starts() -> Column:
    return F.aggregate(
        "requests",
        F.array(F.lit(0)),
        lambda starts, request: F.concat(starts, F.array(F.element_at(starts, -1) + F.size(request["targets"]))),
    )


def count_requests(sequences: DataFrame) -> int:
    """Requests in `sequences`; reads one column."""
    total = sequences.agg(F.sum(F.size(F.array_distinct("request_ids")))).first()
    return int(total[0] or 0) if total else 0


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(ORGANISE, run))
