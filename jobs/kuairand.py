"""Reader of KuaiRand's official CSV files, gzip or plain, as the common columns of `jobs.ingest`.

What the files mean and what this reader makes of it: `time_ms` alone dates a row, since `date` and `hourmin` disagree
with it in part; a duration of 0 is unknown and becomes null; a play time may exceed the duration (watched again);
`tab` is the scene; -124, UNKNOWN and empty fields mean unknown and leave no attribute. Files of one role may differ in
the order of their columns and may have further ones; `title` of the videos is read where it is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import reduce

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.bounds import FIRST_MS, LAST_MS, LONGEST_MS, MAX_ID
from jobs.lines import PLACE, integer, integer_fault, read_lines, require_columns, split_csv
from jobs.mapped_values import NAMED_VECTORS
from jobs.mapping import KUAIRAND_ITEMS, KUAIRAND_LOG, columns_of
from jobs.source_files import SourceFile, column_names, headers
from schemas.feedback import FLAGS
from schemas.source import SourceConfig

FLAG_COLUMNS = {flag: name for flag, name in columns_of(KUAIRAND_LOG).items() if flag in FLAGS}
LOG_COLUMNS = tuple(columns_of(KUAIRAND_LOG).values())
ITEM_ATTRIBUTES = KUAIRAND_ITEMS.attributes
ITEM_COLUMNS = tuple(columns_of(KUAIRAND_ITEMS).values())
USER_ATTRIBUTES = ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author")


def read_log(spark: SparkSession, files: Iterable[SourceFile], source: SourceConfig) -> DataFrame:
    """One row a line, the header included: PLACE, raw, reason (null: usable) and the values of an impression.

    Raises ContractViolation for a missing column.
    """
    return _by_header(files, LOG_COLUMNS, lambda group, header: _log(spark, group, header, source.time_zone))


def read_catalogues(spark: SparkSession, files: Iterable[SourceFile], source: SourceConfig) -> dict[str, DataFrame]:
    """By table, one row a line: PLACE, raw, reason and the columns of the table but `date`. Raw counts are left out."""
    items, users = ([file for file in files if file.role == role] for role in ("items", "users"))
    return {
        "items": _by_header(items, ITEM_COLUMNS, lambda group, header: _items(spark, group, header)),
        "users": _by_header(users, ("user_id",), lambda group, header: _users(spark, group, header)),
    }


def _by_header(
    files: Iterable[SourceFile], required: Iterable[str], parse: Callable[[list[SourceFile], str], DataFrame]
) -> DataFrame:
    files = list(files)
    groups: dict[str, list[SourceFile]] = defaultdict(list)
    first_lines = headers(files)
    for file in files:
        require_columns(file.name, first_lines[file.name], required)
        groups[first_lines[file.name]].append(file)
    return reduce(DataFrame.unionByName, [parse(group, header) for header, group in sorted(groups.items())])


def _as_named(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _log(spark: SparkSession, files: list[SourceFile], header: str, time_zone: str) -> DataFrame:
    rows = split_csv(read_lines(spark, files), header, _as_named(LOG_COLUMNS))
    faults = [
        integer_fault("user_id", 0, MAX_ID),
        integer_fault("video_id", 0, MAX_ID),
        integer_fault("time_ms", FIRST_MS, LAST_MS),
        integer_fault("play_time_ms", 0, LONGEST_MS, optional=True),
        integer_fault("duration_ms", 0, LONGEST_MS, optional=True),
        *(_flag_fault(name) for name in FLAG_COLUMNS.values()),
    ]
    in_time = F.col("shape").isNull() & integer("time_ms").between(FIRST_MS, LAST_MS)
    ts = F.when(in_time, F.timestamp_micros(integer("time_ms") * 1000))
    duration = integer("duration_ms")
    return rows.select(
        *PLACE,
        "raw",
        F.coalesce("shape", *faults).alias("reason"),
        ts.alias("ts"),
        F.to_date(F.from_utc_timestamp(ts, time_zone)).alias("date"),
        integer("user_id").alias("user_id"),
        integer("video_id").alias("item_id"),
        F.col("tab").alias("scene"),
        F.when(duration > 0, duration).alias("duration_ms"),
        integer("play_time_ms").alias("play_ms"),
        *((F.trim(source) == "1").alias(name) for name, source in FLAG_COLUMNS.items()),
    )


def _flag_fault(name: str) -> Column:
    return F.when(F.col(name).isNotNull() & ~F.trim(name).isin("0", "1"), f"{name} is not 0 or 1")


def _items(spark: SparkSession, files: list[SourceFile], header: str) -> DataFrame:
    titled = "title" in column_names(header)
    rows = split_csv(read_lines(spark, files), header, _as_named((*ITEM_COLUMNS, *(("title",) if titled else ()))))
    rows = rows.withColumn("author_id", _known("author_id"))
    duration = F.col("video_duration").try_cast("double")
    uploaded = F.col("upload_dt").try_cast("date")
    faults = [
        integer_fault("video_id", 0, MAX_ID),
        integer_fault("author_id", 0, MAX_ID, optional=True),
        F.when(F.col("video_duration").isNotNull() & duration.isNull(), "video_duration is not a number"),
        F.when(duration > LONGEST_MS, "video_duration is out of range"),
        F.when(_known("upload_dt").isNotNull() & uploaded.isNull(), "upload_dt is not a date"),
    ]
    return rows.select(
        *PLACE,
        "raw",
        F.coalesce("shape", *faults).alias("reason"),
        integer("video_id").alias("item_id"),
        F.lit(None).cast("string").alias("source_id"),
        integer("author_id").alias("author_id"),
        _tags().alias("tags"),
        (F.col("title") if titled else F.lit(None).cast("string")).alias("title"),
        F.when((duration > 0) & (duration <= LONGEST_MS), F.floor(duration)).alias("duration_ms"),
        uploaded.alias("upload_date"),
        _attributes(ITEM_ATTRIBUTES).alias("attributes"),
        F.lit(None).cast(NAMED_VECTORS).alias("vectors"),
        F.lit(None).cast("date").alias("withdrawn"),
    )


def _users(spark: SparkSession, files: list[SourceFile], header: str) -> DataFrame:
    names = [n for n in column_names(header) if n in USER_ATTRIBUTES or n.endswith("_range") or n.startswith("onehot_feat")]
    rows = split_csv(read_lines(spark, files), header, _as_named(("user_id", *names)))
    return rows.select(
        *PLACE,
        "raw",
        F.coalesce("shape", integer_fault("user_id", 0, MAX_ID)).alias("reason"),
        integer("user_id").alias("user_id"),
        F.lit(None).cast("string").alias("source_id"),
        _attributes(names).alias("attributes"),
    )


def _tags() -> Column:
    parts = F.transform(F.split(F.coalesce("tag", F.lit("")), ","), F.trim)
    return F.array_distinct(F.filter(parts, lambda tag: ~tag.isin("", "-124", "UNKNOWN")))


def _known(name: str) -> Column:
    """The trimmed text without the '.0' that pandas leaves on integers; null where it means unknown."""
    text = F.regexp_replace(F.trim(name), r"^(-?[0-9]+)\.0+$", "$1")
    return F.when(~F.upper(text).isin("", "-124", "UNKNOWN"), text)


def _attributes(names: Iterable[str]) -> Column:
    pairs = [F.concat(F.lit(f"{name}="), _known(name)) for name in names]
    return F.array_compact(F.array(*pairs)) if pairs else F.array().cast("array<string>")
