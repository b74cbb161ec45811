"""Requests of user_sequences, and the slices of a user's time that share an example's context.

A slice is a run of a user's requests in the order of their first ts. Requests with the same first ts are always in one
slice, since neither may see the other; a request that a source spreads over midnight is two, one a day.
"""

from __future__ import annotations

from collections.abc import Callable

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.timelines import has_any

TARGETS = ("impression_ids", "item_ids", "play_ms", "duration_ms", "feedback")
HOUR_US = 3_600_000_000

# From a request's first ts to what its slice of a day is called. Days are those of the column `date`.
SLICES: dict[str, Callable[[Column], Column]] = {
    "request": lambda first_us: first_us,
    "hour": lambda first_us: first_us - F.pmod(first_us, F.lit(HOUR_US)),
    "day": lambda first_us: F.lit(0),
}


def slice_keys(name: str) -> tuple[Column, Column]:
    """Requests of a user that agree in both columns share a slice: the day, and one of SLICES within it."""
    return F.col("date").alias("day"), SLICES[name](F.col("first_us")).alias("slice")


def piece_key(events: int) -> Column:
    """Requests of a user that agree in it share a piece of the whole history, of about `events` events each."""
    return F.floor(F.col("recent_stop") / events).alias("piece")


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


def slices_of(requests: DataFrame, *keys: Column) -> DataFrame:
    """One row a user and slice, which is what `keys` tell apart: user_id, date (of its first request), slice_us,
    requests (array of struct, by first_us, then request_id)."""
    gathered = requests.groupBy("user_id", *keys).agg(
        F.min("date").alias("date"), F.sort_array(F.collect_list(_request(F.col("targets")))).alias("requests")
    )
    return gathered.select("user_id", "date", F.col("requests")[0]["first_us"].alias("slice_us"), "requests")


def single_impressions(requests: DataFrame) -> DataFrame:
    """One row an impression, as `slices_of` has them, with its request's times and itself as the only target.

    Of impressions of equal times each is a microsecond later than the one before it, by slice_us alone, so that
    user_id and slice_us stay a key: slice_us is the smallest ascending sequence of a day that is at or after their times.
    """
    each = requests.select("*", F.posexplode("targets").alias("place", "target"))
    in_time = Window.partitionBy("user_id", "date").orderBy("first_us", "request_id", "place")
    each = each.withColumn("number", F.row_number().over(in_time).cast("long"))
    latest = F.max(F.col("first_us") - F.col("number")).over(in_time.rowsBetween(Window.unboundedPreceding, 0))
    return each.select(
        "user_id",
        "date",
        (latest + F.col("number")).alias("slice_us"),
        F.array(_request(F.array("target"))).alias("requests"),
    )


def _request(targets: Column) -> Column:
    return F.struct("first_us", "request_id", "recent_stop", "engaged_stop", targets.alias("targets"))
