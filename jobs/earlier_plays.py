"""For each play, how many plays of a bucket lie strictly before it in time, and how many of those are no longer.

Counting pairs within a bucket would be quadratic for a heavy user. Instead the prefix of earlier plays is cut into
dyadic blocks, one a set bit of its length, and within each block one running count over the plays in ascending
order answers every query: N log(bucket) rows through one window. Plays of days before the first one written count as one
single block, so a day costs its own events times the logarithm, plus one row for each earlier play of its users.

A play with few earlier ones in its own bucket also asks the two buckets beside it, as a visitor: it queries their blocks
and is inserted into none. Only the first few plays of a bucket ask, so this adds rows for each bucket, not for each play.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

GROUP = ("user_id", "bucket")
ASKED = ("impression_id", "user_id", "home", "date", "play_ms", "known", "negative")  # of the play that asks
HISTORY = -1  # the level whose one block holds every play before the first day written


def earlier_plays(events: DataFrame, past: DataFrame | None, visit_below: int) -> DataFrame:
    """One row a play of `events`: the columns ASKED, `home` being its own bucket, and the counts own_earlier and
    own_no_longer within that bucket, near_earlier and near_no_longer within it and the two beside it.

    `events` has user_id, bucket, date, impression_id, ts_us, play_ms, known and negative; `past`, None at the start of the
    log, has user_id, bucket and play_ms of the known plays of the same users before all of them. The counts of the
    neighbours mean something for plays with fewer than `visit_below` plays of `events` before them.
    """
    natives = numbered(events.withColumn("home", F.col("bucket")))
    entry = F.explode(F.concat(_history_query(), _inserts(), _queries()))
    columns = (*dict.fromkeys((*GROUP, *ASKED)), "before")
    entries = natives.select(*columns, entry.alias("entry"))
    if visit_below > 0:
        visiting = F.explode(F.concat(_history_query(), _queries()))
        entries = entries.unionByName(visitors(natives, visit_below).select(*columns, visiting.alias("entry")))
    if past is not None:
        whole = _entry(F.lit(HISTORY), F.lit(0), query=False).alias("entry")
        entries = entries.unionByName(past.select(*GROUP, "play_ms", whole), allowMissingColumns=True)
    return summed(counted(entries).where(F.col("entry")["query"] == 1))


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


def visitors(natives: DataFrame, visit_below: int) -> DataFrame:
    """The known plays with fewer than `visit_below` before them, once in each bucket beside their own, with `before`, the
    known plays of that bucket strictly earlier."""
    few = natives.where(F.col("known") & (F.col("before") < visit_below))
    beside = F.explode(F.array(F.col("home") - 1, F.col("home") + 1))
    asking = few.withColumns({"bucket": beside, "native": F.lit(0)})
    lines = natives.where("known").select(*GROUP, "ts_us", F.lit(1).alias("native"))
    in_time = Window.partitionBy(*GROUP).orderBy("ts_us").rangeBetween(Window.unboundedPreceding, -1)
    together = asking.unionByName(lines, allowMissingColumns=True)
    earlier = F.coalesce(F.sum("native").over(in_time), F.lit(0)).cast("int")
    return together.withColumn("before", earlier).where(F.col("native") == 0)


def counted(entries: DataFrame) -> DataFrame:
    """Adds to each entry the plays inserted into its block, and those of them that are no longer than its own."""
    block = Window.partitionBy(*GROUP, "entry.level", "entry.block")
    ascending = block.orderBy("play_ms", "entry.query").rowsBetween(Window.unboundedPreceding, 0)  # inserts come first
    inserted = 1 - F.col("entry")["query"]
    return entries.withColumns({"no_longer": F.sum(inserted).over(ascending), "inserted": F.sum(inserted).over(block)})


def summed(answers: DataFrame) -> DataFrame:
    own = F.col("bucket").eqNullSafe(F.col("home"))
    # Each bucket that a play asks has one query of the history's block: there its prefix is counted.
    earlier = F.when(F.col("entry")["level"] == HISTORY, F.col("before") + F.col("inserted")).otherwise(0)
    return answers.groupBy(*ASKED).agg(
        F.sum(F.when(own, earlier).otherwise(0)).alias("own_earlier"),
        F.sum(F.when(own, F.col("no_longer")).otherwise(0)).alias("own_no_longer"),
        F.sum(earlier).alias("near_earlier"),
        F.sum("no_longer").alias("near_no_longer"),
    )


def _history_query() -> Column:
    return F.array(_entry(F.lit(HISTORY), F.lit(0), query=True))


def _inserts() -> Column:
    """The play at `place` lies in the left half of a block of each level whose bit of `place` is 0. The prefix of a visitor
    can be all of the bucket's plays."""
    return F.transform(
        F.filter(_levels(F.col("plays")), lambda level: _bit(F.col("place"), level) == 0),
        lambda level: _entry(level, _shift(F.col("place"), level + 1), query=False),
    )


def _queries() -> Column:
    """The first `before` plays are the left halves of one block for each bit of `before` that is 1."""
    return F.transform(
        F.filter(_levels(F.col("before")), lambda level: _bit(F.col("before"), level) == 1),
        lambda level: _entry(level, _shift(F.col("before"), level + 1), query=True),
    )


def _levels(largest: Column) -> Column:
    """The bits of numbers up to `largest`; none for an event that ranks nothing."""
    highest = F.length(F.bin(F.greatest(largest, F.lit(0)))) - 1
    return F.when(F.col("known"), F.sequence(F.lit(0), highest)).otherwise(F.array().cast("array<int>"))


def _entry(level: Column, block: Column, query: bool) -> Column:
    return F.struct(level.alias("level"), block.alias("block"), F.lit(int(query)).alias("query"))


def _shift(value: Column, bits: Column) -> Column:
    return F.call_function("shiftright", value, bits)


def _bit(value: Column, position: Column) -> Column:
    return _shift(value, position).bitwiseAND(F.lit(1))
