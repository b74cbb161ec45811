"""Attributes as of a day: the row of a slowly changing table (`items`, `users`) that holds on it.

The rows of a key become intervals of days, so that the join is an ordinary one on the key with at most one match a row.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F


def join_as_of(left: DataFrame, rows: DataFrame, key: str, values: Sequence[str], known_before: bool = False) -> DataFrame:
    """`left` with the columns `values` of the row of `rows` that holds on `left.date`; null where there is none.

    That is the newest row of the key with a date at or before it. With `known_before` it is the newest with an earlier
    date; a key's first row counts on its own day too, because a snapshot of attributes is dated the first day of
    the log and would otherwise not exist on that day.
    """
    by_date = Window.partitionBy("as_of_key").orderBy("as_of_from")
    intervals = rows.select(F.col(key).alias("as_of_key"), F.col("date").alias("as_of_from"), *values).withColumns(
        {"as_of_until": F.lead("as_of_from").over(by_date), "as_of_place": F.row_number().over(by_date)}
    )
    day = F.col("date")
    if known_before:
        starts = (day > F.col("as_of_from")) | ((day == F.col("as_of_from")) & (F.col("as_of_place") == 1))
        ends = F.col("as_of_until").isNull() | (day <= F.col("as_of_until"))
    else:
        starts = day >= F.col("as_of_from")
        ends = F.col("as_of_until").isNull() | (day < F.col("as_of_until"))
    joined = left.join(intervals, (F.col(key) == F.col("as_of_key")) & starts & ends, "left")
    return joined.drop("as_of_key", "as_of_from", "as_of_until", "as_of_place")
