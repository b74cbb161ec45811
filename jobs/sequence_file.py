"""Reader of one-user-a-line sequences, `user item item ...` in time order, as the common columns of `jobs.ingest`.

The source has no times: the n-th item of a user gets the epoch plus n seconds, and all rows share 1970-01-01. Every
interaction is a click, so that it is a target; what the source does not tell is null. A broken line is one rejected row,
since the places of its items cannot be trusted.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.lines import PLACE, read_lines
from jobs.source_files import SourceFile
from schemas.source import SourceConfig

DAY = datetime.date(1970, 1, 1)
LONGEST = 86_400  # positions, one a second, that stay on one date


def read_log(spark: SparkSession, files: Iterable[SourceFile], source: SourceConfig) -> DataFrame:
    """One row an interaction, and one a broken line: PLACE, raw, reason (null: usable) and an impression's values."""
    tokens = F.split(F.trim("raw"), r"\s+")
    ids = F.transform("tokens", lambda token: token.try_cast("bigint"))
    reason = (
        F.when(F.trim("raw") == "", "empty line")
        .when(F.exists("tokens", lambda token: ~token.rlike("^[+-]?[0-9]+$")), "an id is not an integer")
        .when(F.exists("ids", lambda value: value.isNull()), "an id is out of range")
        .when(F.exists("ids", lambda value: value < 0), "an id is negative")
        .when(F.size("ids") < 2, "no items")
        .when(F.size("ids") > LONGEST + 1, f"more than {LONGEST} items")
    )
    lines = read_lines(spark, files).withColumn("tokens", tokens).withColumn("ids", ids).withColumn("reason", reason)
    items = F.when(F.col("reason").isNull(), F.slice("ids", 2, F.greatest(F.size("ids"), F.lit(1))))
    events = lines.select(*PLACE, "raw", "reason", F.get("ids", F.lit(0)).alias("user_id"), F.posexplode_outer(items))
    return events.select(
        *PLACE,
        F.when(F.col("reason").isNotNull(), F.col("raw")).alias("raw"),
        "reason",
        F.timestamp_micros(F.col("pos").cast("bigint") * 1_000_000).alias("ts"),
        F.lit(DAY).alias("date"),
        "user_id",
        F.col("col").alias("item_id"),
        F.lit(True).alias("click"),
    )
