"""Duration-aware quantile of each play among earlier ones of like duration (OneRec-V2, section 3.1.1).

    bucket F(d) = floor(log_beta(d + epsilon)), d in SECONDS        q_i = |{p_j in P : p_j <= p_i}| / |P|

P is the first of these pools that holds enough plays (the paper leaves the window, the target's own membership and
small buckets open), and the column `pool` names it:

1. `own`: the user's plays in the own bucket at times strictly before ts_i; at least `min_bucket`;
2. `neighbours`: those of the own bucket and the two beside it; at least `min_bucket`;
3. `population`: all users' plays in the bucket on the `population_days` days before the day of i, by play time in
   hundredths of the bucket's upper end; at least `min_population`.

The target is never in its pool, and ties in ts see nothing of each other. The quantile is null where no pool of
`rewards.backoff` is large enough, or where play or duration is unknown; negative is any bit of `negative`.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Collection, Mapping

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.earlier_plays import GROUP, earlier_plays
from jobs.tables import read_days, replace_days
from jobs.timelines import has_any
from schemas.calendar import Calendar
from schemas.config import Config, RewardsConfig
from schemas.feedback import mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import REWARDS

BINS = 100  # of play time up to the upper end of a duration bucket, in which the population is counted


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

    def sequences_of(wanted: Collection[datetime.date]) -> DataFrame:
        return read_days(spark, lake, "user_sequences", wanted, pins["user_sequences"])

    first = min(days)
    current = sequences_of([d for d in calendar.days if first <= d <= max(days)])
    earlier = [d for d in calendar.days if d < first]
    history = before = None
    if earlier:
        active = current.select("user_id").distinct()
        history = sequences_of(earlier).join(active, "user_id", "left_semi")
        before = sequences_of([d for d in earlier if (first - d).days <= config.rewards.population_days])
    rows = quantiles(current, history, before, config.rewards).where(F.col("date").isin(sorted(days)))
    return {"rewards": replace_days(spark, lake, "rewards", rows, days)}


def quantiles(
    current: DataFrame, history: DataFrame | None, before: DataFrame | None, settings: RewardsConfig
) -> DataFrame:
    """Rows of rewards for every impression of `current` (rows of user_sequences, whole days).

    `history` holds the earlier days of the same users and `before` the last `population_days` days of all users before
    `current`; both are None at the start of the log.
    """
    events = plays(current, settings)
    past = plays(history, settings).where("known").select(*GROUP, "play_ms") if history is not None else None
    enough = max(1, settings.min_bucket)
    near = "neighbours" in settings.backoff
    rows = earlier_plays(events, past, enough if near else 0).withColumnRenamed("home", "bucket")
    pools = {"own": ("own", enough)} | ({"neighbours": ("near", enough)} if near else {})
    if "population" in settings.backoff:
        shown = events if before is None else events.unionByName(plays(before, settings))
        rows = with_population(rows, shown, settings)
        pools["population"] = ("all", max(1, settings.min_population))
    pool = F.coalesce(*(F.when(F.col(f"{p}_earlier") >= least, name) for name, (p, least) in pools.items()))
    quantile = F.coalesce(
        *(F.when(pool == name, F.col(f"{p}_no_longer") / F.col(f"{p}_earlier")) for name, (p, _) in pools.items())
    )
    known = F.col("known")
    return rows.select(
        "impression_id",
        "user_id",
        "date",
        "bucket",
        F.when(known, quantile).alias("quantile"),
        F.when(known, pool).alias("pool"),
        "negative",
    )


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


def with_population(rows: DataFrame, shown: DataFrame, settings: RewardsConfig) -> DataFrame:
    """Adds all_earlier and all_no_longer: plays of the bucket on the `population_days` days before `date`, and those of
    them in no higher bin of play time. `shown` has the rows of `plays` of those days."""
    binned = shown.where("known").select("date", "bucket", play_bin(settings).alias("bin"))
    by_day = binned.groupBy("date", "bucket", "bin").agg(F.count("*").alias("plays"))
    later = F.transform(
        F.sequence(F.lit(1), F.lit(settings.population_days)), lambda days: F.date_add("date", days.cast("int"))
    )
    seen = by_day.select(F.explode(later).alias("date"), "bucket", "bin", "plays")
    asked = rows.where("known").select("date", "bucket", play_bin(settings).alias("bin")).distinct()
    day = Window.partitionBy("date", "bucket")
    ascending = day.orderBy("bin").rangeBetween(Window.unboundedPreceding, 0)
    pooled = seen.unionByName(asked.withColumn("plays", F.lit(0).cast("long"))).groupBy("date", "bucket", "bin")
    counts = pooled.agg(F.sum("plays").alias("plays")).withColumns(
        {"all_no_longer": F.sum("plays").over(ascending), "all_earlier": F.sum("plays").over(day)}
    )
    keyed = rows.withColumn("bin", F.when(F.col("known"), play_bin(settings)))
    return keyed.join(counts.drop("plays"), ["date", "bucket", "bin"], "left").drop("bin")


def play_bin(settings: RewardsConfig) -> Column:
    """long: play time in hundredths of the upper end of the bucket's durations."""
    upper_ms = F.pow(F.lit(settings.bucket_base), F.col("bucket") + 1) * 1000
    return F.floor(F.col("play_ms") * BINS / upper_ms)


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(REWARDS, run))
