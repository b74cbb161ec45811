"""The log's files as parsed rows, read once: usable, outside the range, or rejected with the reason.

The frame is persisted (memory, then disk), since counting, deduplicating and writing all start from it and a gzip file
is decompressed by one task. Every row keeps its text until it is known to stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column, DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from jobs import tables
from jobs.bounds import FUTURE, latest_time
from jobs.ingest_plan import Day, FileFacts, Moment, Stamp
from jobs.lines import PLACE, reading
from jobs.mapping import mapping_of
from jobs.readers import LOGS
from jobs.source_files import SourceFile
from schemas.errors import ContractViolation
from schemas.feedback import FLAGS
from schemas.source import SourceConfig
from schemas.tables import IMPRESSIONS

OUTSIDE = "outside the range"
HEADER = "repeated header"
BEHAVIOUR = ("behaviour_log_probs", "behaviour_codebook", "behaviour_policy")  # null unless we made the exposure
VALUES = ("user_id", "item_id", "ts", "date", "scene", "duration_ms", "play_ms", "rating", *FLAGS, *BEHAVIOUR)

# (source_file, block, shift: line + shift is the row number, days that a row of the file may have, its day otherwise)
Block = tuple[str, int, int, list[Day], Day]


@dataclass
class LogRows:
    """Parsed rows of `files`; `shifts` turns (file, block, line) into a row number."""

    files: list[SourceFile]
    frame: DataFrame
    facts: dict[tuple[str, str], FileFacts]
    shifts: list[tuple[str, int, int]]

    def usable(self) -> DataFrame:
        return self.frame.where(F.col("reason").isNull())

    def rejected(self) -> DataFrame:
        """Rows refused on their own account: PLACE, raw, reason, date (null where it cannot be read)."""
        refused = self.frame.where(F.col("reason").isNotNull() & (F.col("reason") != OUTSIDE))
        return refused.select(*PLACE, "raw", "reason", "date")

    def blocks(self, fallback: Day) -> list[Block]:
        """The blocks of the files; a row of no known day is dated the file's first, or `fallback`."""
        facts = {file.name: self.facts[file.stamp] for file in self.files}
        days = {name: sorted(map(Day.fromisoformat, fact.accepted)) for name, fact in facts.items()}
        return [
            (name, block, shift, days[name], min(days[name], default=fallback))
            for name, block, shift in self.shifts
            if facts[name].accepted or facts[name].rejected
        ]


def read_rows(spark: SparkSession, files: list[SourceFile], source: SourceConfig, seen: Mapping[Stamp, Moment]) -> LogRows:
    """Parses, persists and counts log files; `seen` is when each was first read. Raises ContractViolation for a missing
    column or a broken file."""
    rows = with_absent(LOGS[source.kind](spark, files, source))
    rows = rows.withColumn("reason", F.coalesce(F.when(_is_outside(source), OUTSIDE), "reason"))
    frame = without_future(spark, rows, files, source, seen).persist()
    counts = frame.groupBy("source_file", "block", "date", "reason").agg(
        F.count("*").alias("n"), F.min("line").alias("low"), F.max("line").alias("high")
    )
    with reading(files):
        groups = counts.collect()
    return LogRows(files, frame, facts_of(groups, files), shifts_of(groups, files))


def _is_outside(source: SourceConfig) -> Column:
    outside = F.lit(False)
    if source.first_day is not None:
        outside = outside | (F.col("date") < F.lit(source.first_day))
    if source.last_day is not None:
        outside = outside | (F.col("date") > F.lit(source.last_day))
    return outside


def without_future(
    spark: SparkSession, rows: DataFrame, files: list[SourceFile], source: SourceConfig, seen: Mapping[Stamp, Moment]
) -> DataFrame:
    """Refuses usable rows whose times lie in the future, and takes their dates, which are no days of the log. One rule for
    every source that has times of its own; a row that was refused for something else, or lies outside the range, stays so.
    """
    log = mapping_of(source).log
    if log is None or source.future_days is None:
        return rows
    latest = [(file.name, latest_time(source.future_days, seen[file.stamp])) for file in files]
    known = spark.createDataFrame(latest, "source_file string, latest timestamp")
    late = F.col("reason").isNull() & (F.col("ts") > F.col("latest"))
    judged = {
        "reason": F.coalesce("reason", F.when(late, f"{log.columns.ts} {FUTURE}")),
        "date": F.when(late, None).otherwise(F.col("date")),
    }
    return rows.join(F.broadcast(known), "source_file", "left").withColumns(judged).drop("latest")


def with_absent(rows: DataFrame) -> DataFrame:
    """What the reader left out, as nulls of the contract's types."""
    types = {field.name: field.dataType for field in tables.spark_schema(IMPRESSIONS)}
    return rows.withColumns({name: F.lit(None).cast(types[name]) for name in VALUES if name not in rows.columns})


def facts_of(groups: Iterable[Row], files: Iterable[SourceFile]) -> dict[tuple[str, str], FileFacts]:
    """Counts by file; the header of a titled one is the first of the lines that repeat it."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for group in groups:
        by_name[group["source_file"]].append(group)
    return {file.stamp: _file_facts(file.name, by_name[file.name], file.titled) for file in files}


def _file_facts(name: str, groups: list[Row], titled: bool) -> FileFacts:
    facts = FileFacts()
    reasons: dict[tuple[Any, str], int] = defaultdict(int)
    for group in groups:
        day = group["date"].isoformat() if group["date"] else ""
        facts.read += group["n"]
        if group["reason"] is None:
            facts.accepted[day] = facts.accepted.get(day, 0) + group["n"]
        elif group["reason"] == OUTSIDE:
            facts.outside += group["n"]
        else:
            reasons[day, group["reason"]] += group["n"]
    if titled:
        if not reasons.get(("", HEADER)):
            raise ContractViolation(
                f"{name}: the header is not a line of UTF-8 text that ends in a newline; save it as such."
            )
        reasons["", HEADER] -= 1
        facts.read -= 1
    if facts.outside and not facts.accepted:  # the whole file lies outside, its undated rows too
        facts.outside, reasons = facts.read, defaultdict(int)
    first = min(facts.accepted, default="")
    for (day, reason), n in sorted(reasons.items()):
        if n:
            counted = facts.rejected.setdefault(day if day in facts.accepted else first, {})
            counted[reason] = counted.get(reason, 0) + n
    facts.check(name)
    return facts


def shifts_of(groups: Iterable[Row], files: Iterable[SourceFile]) -> list[tuple[str, int, int]]:
    """(file, block, shift) such that line + shift is the row number: 0 of a header, 1 of the first row after it."""
    spans: dict[tuple[str, int], tuple[int, int]] = {}
    for group in groups:
        place = (group["source_file"], group["block"])
        low, high = spans.get(place, (group["low"], group["high"]))
        spans[place] = (min(low, group["low"]), max(high, group["high"]))
    shifts, before = [], {file.name: 0 if file.titled else 1 for file in files}
    for (name, block), (low, high) in sorted(spans.items()):
        shifts.append((name, block, before[name] - low))
        before[name] += high - low + 1
    return shifts


def block_spans(frame: DataFrame) -> list[Row]:
    """What `shifts_of` needs, of any reader's frame, and how many lines of each block are refused, headers included."""
    spans = (F.min("line").alias("low"), F.max("line").alias("high"), F.count("reason").alias("refused"))
    return frame.groupBy("source_file", "block").agg(*spans).collect()


def numbered(spark: SparkSession, rows: DataFrame, blocks: list[Block]) -> DataFrame:
    """Refused rows as in table `rejected_rows`, without headers, which have number 0. Rows of other files are left out."""
    schema = "source_file string, block bigint, shift bigint, days array<date>, first date"
    joined = rows.join(F.broadcast(spark.createDataFrame(blocks, schema)), ["source_file", "block"])
    date = F.when(F.array_contains("days", F.col("date")), F.col("date")).otherwise(F.col("first"))
    found = joined.select(
        "source_file", (F.col("line") + F.col("shift")).alias("row_number"), "reason", "raw", date.alias("date")
    )
    return found.where(F.col("row_number") > 0)


def with_ids(rows: DataFrame, gap_ms: int) -> DataFrame:
    """Adds request_id and impression_id.

    The request is the source's own where the rows have `request_key`, else the chain of a user's rows of one day, each at
    most `gap_ms` after the one before. Midnight ends it, so that a day's ids depend on no other day.
    """
    micros = F.unix_micros("ts")
    first = micros
    if gap_ms > 0:
        in_time = Window.partitionBy("user_id", "date").orderBy("ts")
        rows = rows.withColumn("since_last", micros - F.lag(micros).over(in_time))
        starts = F.when(F.col("since_last").isNull() | (F.col("since_last") > gap_ms * 1000), micros)
        first = F.last(starts, ignorenulls=True).over(in_time.rowsBetween(Window.unboundedPreceding, 0))
    request = F.xxhash64("user_id", first)
    if "request_key" in rows.columns:
        request = F.when(F.col("request_key").isNull(), request).otherwise(F.xxhash64("user_id", "date", "request_key"))
    rows = rows.withColumn("request_id", request).drop("since_last")
    return rows.withColumn("impression_id", F.xxhash64("user_id", "item_id", F.unix_micros("ts"), "request_id"))


def fate_counts(rows: DataFrame) -> Mapping[Day, Mapping[str, int]]:
    """Rows by day and fate."""
    counts: dict[Day, dict[str, int]] = defaultdict(dict)
    for row in rows.groupBy("date", "fate").count().collect():
        counts[row["date"]][row["fate"]] = row["count"]
    return counts
