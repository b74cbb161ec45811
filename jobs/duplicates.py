"""Rows that repeat a key: exact duplicates are dropped, and of rows that differ the first in file order stays."""

from __future__ import annotations

from collections.abc import Iterable

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.ingest_plan import CONFLICT, DUPLICATE, KEPT
from jobs.lines import PLACE


def with_fate(rows: DataFrame, key: str, values: Iterable[str]) -> DataFrame:
    """Adds `fate`: kept, duplicate (an earlier row has the same key and values) or conflict (same key, other values).

    One shuffle by `key` serves both windows. Nulls count as equal values.
    """
    of_key = Window.partitionBy(key).orderBy(*PLACE)
    of_row = Window.partitionBy(key, *values).orderBy(*PLACE)
    ranked = rows.withColumn("of_key", F.row_number().over(of_key)).withColumn("of_row", F.row_number().over(of_row))
    fate = F.when(F.col("of_row") > 1, DUPLICATE).when(F.col("of_key") > 1, CONFLICT).otherwise(KEPT)
    return ranked.withColumn("fate", fate).drop("of_key", "of_row")
