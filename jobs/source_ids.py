"""The originals of ids that were hashed, and the promise that no two of them share a hash.

`items` and `users` keep an id's original, also of those that only the log shows. A pass knows the originals of the files
that it reads; those of earlier files are in the tables. The chance that two of n originals meet is about n^2 / 2^64 (a
hundred million: 0.05 %), and the pass that meets such a pair commits nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import reduce

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import tables
from schemas.errors import ContractViolation
from schemas.lake import Lake
from schemas.tables import ITEMS, USERS

SOURCES = {ITEMS.name: ("item_id", "item_source"), USERS.name: ("user_id", "user_source")}


def originals(
    spark: SparkSession, lake: Lake, log: DataFrame | None, snapshots: dict[str, DataFrame], cleanup: ExitStack
) -> dict[str, DataFrame]:
    """By table: key, original (persisted) of every id that was hashed; `log` is the usable rows that the pass reads.

    Raises ContractViolation where two ids of the source share a key.
    """
    found = {}
    for table, (key, source) in SOURCES.items():
        parts = []
        if log is not None and source in log.columns:
            parts.append(log.select(key, F.col(source).alias("original")))
        if table in snapshots:
            usable = snapshots[table].where(F.col("reason").isNull())
            parts.append(usable.select(key, F.col("source_id").alias("original")))
        if lake.exists(table):
            parts.append(tables.read(spark, lake, table).select(key, F.col("source_id").alias("original")))
        if not parts:
            continue
        # An id that is an integer has no original: null, which may meet a hash as well.
        named = F.count_distinct(F.coalesce("original", F.lit(""))).alias("names")
        columns = (F.max("original").alias("original"), F.min(F.coalesce("original", F.lit(""))).alias("other"), named)
        pairs = reduce(DataFrame.unionByName, [part.distinct() for part in parts])
        by_key = pairs.groupBy(key).agg(*columns).where(F.col("original").isNotNull()).persist()
        cleanup.callback(by_key.unpersist)
        _refuse_collision(by_key, table, key)
        found[table] = by_key.select(key, "original")
    return found


def _refuse_collision(by_key: DataFrame, table: str, key: str) -> None:
    for row in by_key.where(F.col("names") > 1).limit(1).collect():
        other = repr(row["other"]) if row["other"] else f"the integer {row[key]}"
        raise ContractViolation(
            f"Two ids of the source, {row['original']!r} and {other}, have the same {key} {row[key]} in {table}: "
            "rename one of them in the source, or number the ids there and set source.ids to integer."
        )
