"""Duration-aware quantile of each play among the user's earlier ones (OneRec-V2, section 3.1.1).

    bucket F(d) = floor(log_beta(d + epsilon)), d in SECONDS        q_i = |{p_j in P : p_j <= p_i}| / |P|

P holds the plays of the user's own bucket at times strictly before ts_i: the target is not in it, and ties in ts see
nothing of each other. (The paper leaves the unit, the window and the target's own membership open.) The quantile is null
with fewer than `min_bucket` earlier plays, or where play or duration is unknown; negative is any bit of `negative`.

Counting pairs within a bucket would be quadratic for a heavy user. Instead the prefix of earlier plays is cut into
dyadic blocks, one a set bit of its length, and within each block one running count over the plays in ascending
order answers every query: N log(bucket) rows through one window. Plays of days before the first one written count as one
single block, so a day costs its own events times the logarithm, plus one row for each earlier play of its users.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.tables import read_days, replace_days
from jobs.timelines import has_any
from schemas.calendar import Calendar
from schemas.config import Config, RewardsConfig
from schemas.feedback import mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import REWARDS

GROUP = ("user_id", "bucket")
HISTORY = -1  # the level whose one block holds every play before the first day written


def run(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Mapping[str, Identities],
    pins: Mapping[str, int],
) -> dict[str, int]:
    """Writes the stale days of rewards in one pass; the version written."""
    days = todo.get("rewards")
    if not days:
        return {}
    version = pins["user_sequences"]
    current = read_days(spark, lake, "user_sequences", [d for d in calendar.days if min(days) <= d <= max(days)], version)
    earlier = [d for d in calendar.days if d < min(days)]
    history = None
    if earlier:
        active = current.select("user_id").distinct()
        history = read_days(spark, lake, "user_sequences", earlier, version).join(active, "user_id", "left_semi")
    rows = quantiles(current, history, config.rewards).where(F.col("date").isin(sorted(days)))
    return {"rewards": replace_days(spark, lake, "rewards", rows, days)}


def quantiles(current: DataFrame, history: DataFrame | None, settings: RewardsConfig) -> DataFrame:
    """Rows of rewards for every impression of `current` (rows of user_sequences, whole days); `history` holds the
    earlier days of the same users, or is None at the start of the log."""
    events = numbered(plays(current, settings))
    entry = F.explode(F.concat(F.array(_entry(F.lit(HISTORY), F.lit(0), query=True)), _inserts(), _queries()))
    entries = events.select(*GROUP, "play_ms", "impression_id", "date", "negative", "known", "before", entry.alias("entry"))
    if history is not None:
        past = plays(history, settings).where("known")
        whole = _entry(F.lit(HISTORY), F.lit(0), query=False).alias("entry")
        entries = entries.unionByName(past.select(*GROUP, "play_ms", whole), allowMissingColumns=True)
    answers = counted(entries).where(F.col("entry")["query"] == 1)
    earlier = F.max("before") + F.max(F.when(F.col("entry")["level"] == HISTORY, F.col("inserted")))
    rows = answers.groupBy(*GROUP, "impression_id", "date", "negative", "known").agg(
        F.sum("no_longer").alias("no_longer"), earlier.alias("earlier")
    )
    enough = F.col("known") & (F.col("earlier") >= max(1, settings.min_bucket))
    quantile = F.when(enough, F.col("no_longer") / F.col("earlier"))
    return rows.select("impression_id", "user_id", "date", "bucket", quantile.alias("quantile"), "negative")


def plays(sequences: DataFrame, settings: RewardsConfig) -> DataFrame:
    """One row an event: user_id, date, bucket (null without a duration), impression_id, ts_us, play_ms, known, negative."""
    columns = ("impression_ids", "ts_us", "play_ms", "duration_ms", "feedback")
    events = sequences.select("user_id", "date", F.inline(F.arrays_zip(*columns)))
    return events.select(
        "user_id",
        "date",
        duration_bucket(F.col("duration_ms"), settings).alias("bucket"),
        F.col("impression_ids").alias("impression_id"),
        "ts_us",
        "play_ms",
        ((F.col("duration_ms") > 0) & (F.col("play_ms") >= 0)).alias("known"),
        has_any(F.col("feedback"), mask_of(settings.negative)).alias("negative"),
    )


def duration_bucket(duration_ms: Column, settings: RewardsConfig) -> Column:
    """int: floor(log_beta(seconds + epsilon)); negative below a second, null where the duration is unknown."""
    seconds = F.when(duration_ms > 0, duration_ms / F.lit(1000.0))
    return F.floor(F.log(settings.bucket_base, seconds + F.lit(settings.epsilon))).cast("int")


def numbered(events: DataFrame) -> DataFrame:
    """Adds, within each user and bucket, `place` (in order of time), `before` (known plays strictly earlier) and `plays`
    (known ones); the first two mean something for known plays alone."""
    group = Window.partitionBy(*GROUP)
    known_first = F.col("known").desc()
    return events.withColumns(
        {
            "place": F.row_number().over(group.orderBy(known_first, "ts_us", "impression_id")) - 1,
            "before": F.rank().over(group.orderBy(known_first, "ts_us")) - 1,
            "plays": F.count_if("known").over(group),
        }
    )


def counted(entries: DataFrame) -> DataFrame:
    """Adds to each entry the plays inserted into its block, and those of them that are no longer than its own."""
    block = Window.partitionBy(*GROUP, "entry.level", "entry.block")
    ascending = block.orderBy("play_ms", "entry.query").rowsBetween(Window.unboundedPreceding, 0)  # inserts come first
    inserted = 1 - F.col("entry")["query"]
    return entries.withColumns({"no_longer": F.sum(inserted).over(ascending), "inserted": F.sum(inserted).over(block)})


def _inserts() -> Column:
    """The play at `place` lies in the left half of a block of each level whose bit of `place` is 0."""
    return F.transform(
        F.filter(_levels(), lambda level: _bit(F.col("place"), level) == 0),
        lambda level: _entry(level, _shift(F.col("place"), level + 1), query=False),
    )


def _queries() -> Column:
    """The first `before` plays are the left halves of one block for each bit of `before` that is 1."""
    return F.transform(
        F.filter(_levels(), lambda level: _bit(F.col("before"), level) == 1),
        lambda level: _entry(level, _shift(F.col("before"), level + 1), query=True),
    )


def _levels() -> Column:
    """The bits that a place in this bucket can have; none for an event that ranks nothing."""
    highest = F.length(F.bin(F.greatest(F.col("plays") - 1, F.lit(0)))) - 1
    return F.when(F.col("known"), F.sequence(F.lit(0), highest)).otherwise(F.array().cast("array<int>"))


def _entry(level: Column, block: Column, query: bool) -> Column:
    return F.struct(level.alias("level"), block.alias("block"), F.lit(int(query)).alias("query"))


def _shift(value: Column, bits: Column) -> Column:
    return F.call_function("shiftright", value, bits)


def _bit(value: Column, position: Column) -> Column:
    return _shift(value, position).bitwiseAND(F.lit(1))


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(REWARDS, run))
