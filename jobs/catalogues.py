"""Slowly changing items and users: from a snapshot to rows that hold from a day on.

A snapshot has no date. What it says holds from the first day that the pass writes (`since`): the first day of the log in
a first or forced pass, the night's own day in a nightly one. Rows of earlier days stay, and a row is written only where it
differs from the newest earlier one; so an equal snapshot adds nothing, and nights one by one equal one full pass over an
unchanged snapshot. Dated by upload, an item holds from its upload day, or from the day it is first shown if that
comes first. What the log shows and no snapshot knows gets a row without attributes on the day it is first shown.

A partition's identity is over its rows and not over the snapshot's checksum: otherwise each night's new snapshot would
make every earlier day stale.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType

from jobs import tables
from jobs.duplicates import with_fate
from jobs.ingest_plan import CONFLICT, KEPT, LOGIC, STAGE, settings_of
from schemas.lake import Lake
from schemas.lineage import digest
from schemas.source import SourceConfig
from schemas.tables import PARTITION, Table


def content_of(table: Table) -> list[str]:
    """The columns that say something of the key."""
    return [name for name in table.columns if name not in table.key]


def judged(rows: DataFrame, table: Table) -> DataFrame:
    """A reader's frame with `fate` (kept, duplicate, conflict) and, for what is refused, `reason`."""
    key = table.key[0]
    # A broken row has no key, so that it is compared with broken rows alone.
    keyed = rows.withColumn(key, F.when(F.col("reason").isNull(), F.col(key)))
    conflict = F.when(F.col("fate") == CONFLICT, f"same {key}, different values")
    return with_fate(keyed, key, content_of(table)).withColumn("reason", F.coalesce("reason", conflict))


def snapshot_of(judged_rows: DataFrame, table: Table) -> DataFrame:
    """The usable rows, one a key: the table's columns but `date`."""
    usable = judged_rows.where(F.col("reason").isNull() & (F.col("fate") == KEPT))
    return usable.select(table.key[0], *content_of(table))


def empty_snapshot(spark: SparkSession, table: Table) -> DataFrame:
    """For a source that has no catalogue."""
    return spark.createDataFrame([], tables.spark_schema(table)).drop(PARTITION)


def history(
    spark: SparkSession,
    lake: Lake,
    table: Table,
    snapshot: DataFrame,
    source: SourceConfig,
    log_days: Sequence[datetime.date],
    since: datetime.date,
    originals: DataFrame | None = None,
) -> DataFrame:
    """The table's rows dated `since` and later, after the impressions of the pass are committed.

    `snapshot` holds one row a key: the table's columns but `date`. `originals` (key, original) names the ids that were
    hashed, those that only the log shows too.
    """
    key, content = table.key[0], content_of(table)
    impressions = tables.read(spark, lake, "impressions").where(F.col(PARTITION) >= F.lit(since))
    shown = impressions.groupBy(key).agg(F.min(PARTITION).alias("shown"))
    listed = snapshot.withColumn("listed", F.lit(True)).join(shown, key, "full_outer")
    if originals is not None:
        listed = listed.join(originals, key, "left").withColumn("source_id", F.coalesce("source_id", "original"))
    arrays = [f.name for f in tables.spark_schema(table) if isinstance(f.dataType, ArrayType) and not f.nullable]
    listed = listed.withColumns({name: F.coalesce(name, F.array().cast("array<string>")) for name in arrays})
    start = F.lit(since)
    if source.items_dated_by == "upload" and "upload_date" in content:
        start = F.least("shown", F.greatest("upload_date", start))
    dated = listed.withColumn(PARTITION, F.when(F.col("listed"), start).otherwise(F.col("shown")))
    known = _newest_before(spark, lake, table, since)
    differs = F.col("known").isNull() | (F.col("listed") & (F.col("known") != _text(content)))
    changed = dated.join(known, key, "left").where(differs)
    return _to_log_days(spark, changed.select(*table.columns), log_days, since)


def commit(
    lake: Lake,
    table: Table,
    rows: DataFrame,
    source: SourceConfig,
    days: Collection[datetime.date],
    force: bool,
) -> None:
    """Replaces those of the partitions `days` whose rows differ from what is there; stamps days without rows too."""
    content = _text(list(table.columns))
    sums = rows.groupBy(PARTITION).agg(
        F.count("*").alias("n"),
        F.bit_xor(F.xxhash64(content)).alias("parity"),
        F.sum(F.xxhash64(content).cast("decimal(38,0)")).cast("string").alias("total"),
    )
    checksums = {row[PARTITION]: [row["n"], row["parity"], row["total"]] for row in sums.collect()}
    settings = settings_of(source)
    present = lake.identities(table.name)
    expected = {day: digest(STAGE, table.name, LOGIC, settings, checksums.get(day)) for day in days}
    stale = {day: identity for day, identity in expected.items() if force or present.get(day) != identity}
    if stale:
        tables.replace_days(lake, table.name, rows.where(F.col(PARTITION).isin(sorted(stale))), stale)


def _newest_before(spark: SparkSession, lake: Lake, table: Table, day: datetime.date) -> DataFrame:
    """key, known: the content of the newest row of each key dated before `day`, as text."""
    key = table.key[0]
    if not lake.exists(table.name):
        return empty_snapshot(spark, table).select(key, F.lit("").alias("known"))
    rows = tables.read(spark, lake, table.name).where(F.col(PARTITION) < F.lit(day))
    return rows.groupBy(key).agg(F.max_by(_text(content_of(table)), PARTITION).alias("known"))


def _text(columns: Sequence[str]) -> Column:
    """Columns as one text: unlike their hash, it tells a null from a shifted value."""
    return F.to_json(F.struct(*columns), {"ignoreNullFields": "false"})


def _to_log_days(
    spark: SparkSession, rows: DataFrame, log_days: Sequence[datetime.date], since: datetime.date
) -> DataFrame:
    """Dates between two days of the log move to the later one; rows that hold only after the log are not yet written."""
    ordered = sorted(day for day in log_days if day >= since)
    moves, place = [], 0
    for offset in range((ordered[-1] - since).days + 1):
        day = since + datetime.timedelta(days=offset)
        place += ordered[place] < day
        moves.append((day, ordered[place]))
    targets = spark.createDataFrame(moves, "date date, log_day date")
    moved = rows.join(F.broadcast(targets), PARTITION)
    return moved.withColumn(PARTITION, F.col("log_day")).drop("log_day")
