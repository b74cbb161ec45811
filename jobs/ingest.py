"""Raw logs to `impressions`, `items`, `users` and `rejected_rows`: dedupe, reject, reconcile, commit.

Contract: every row after the header is kept, a duplicate, rejected with a reason, or outside source.first_day to
source.last_day; the counts are checked against the rows read and against the rows committed. Only days whose identity
differs are written, and only files that hold such days are read; see `jobs.ingest_plan` for what an identity is, and
`jobs.catalogues` for how items and users change. The tables are committed one after the other and the manifest last, so
a kill in between leaves days that the next pass does again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC
from functools import reduce
from typing import Any
from zoneinfo import ZoneInfo

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import catalogues, tables
from jobs.duplicates import with_fate
from jobs.forget import deleted_users, unnamed, with_deleted, without_users
from jobs.ingest_pass import Pass, plan_pass
from jobs.ingest_plan import (
    FATES,
    KEPT,
    REFUSED,
    STAGE,
    Day,
    IngestReport,
    Log,
    Memory,
    Moment,
    done,
    remember,
    report_of,
    settings_digest,
    write_memory,
)
from jobs.lines import PLACE, reading
from jobs.log_rows import VALUES, LogRows, block_spans, fate_counts, numbered, read_rows, shifts_of, with_ids
from jobs.main import command, day_parser
from jobs.readers import CATALOGUES
from jobs.session import spark_session
from jobs.source_files import SourceFile, find_files
from jobs.source_ids import originals
from schemas.config import Config
from schemas.errors import ConfigError, ContractViolation
from schemas.lake import Identities, Lake, lake_of
from schemas.loader import parse_date
from schemas.locks import lake_lock
from schemas.source import SourceConfig
from schemas.tables import ITEMS, TABLES, USERS

__all__ = ["IngestReport", "ingest"]

ROWS_A_FILE = 5_000_000
Say = Callable[[str], None]
Snapshots = dict[str, DataFrame]  # the catalogue's judged rows by table


def ingest(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    days: Collection[Day] | None = None,
    force: bool = False,
    say: Say = lambda line: None,
    now: Moment | None = None,
) -> IngestReport:
    """Brings the four tables up to date with the files of `config.source`, for `days` (default: the whole log). `now`
    (default: the clock) is the moment at which files are read that no earlier pass has read.

    Raises ConfigError for a source that is not there, ContractViolation for a missing column, an empty log, a broken
    file or counts that do not reconcile, MissingUpstream for a day that the log does not hold.
    """
    _check_time_zone(config.source)
    report = None if force else done(lake, config, days)
    if report is not None:
        return report
    memory = remember(lake).anew() if force else remember(lake)
    with ExitStack() as cleanup:
        log, first = _known_log(spark, config.source, memory, now or Moment.now(UTC), cleanup)
        work = plan_pass(lake, log, memory, days, force)
        cleanup.enter_context(reading(log.files))
        snapshots = _read_snapshots(spark, lake, log, cleanup)
        rows = _rows_of(spark, work, first, cleanup) if work.todo else None
        usable = None if rows is None else rows.usable()
        mapped = config.source.kind == "mapped"
        named = originals(spark, lake, usable, snapshots, cleanup) if mapped else {}
        counts = dict(memory.days)
        if rows is not None:
            say(f"{len(work.todo)} day(s) to write, {sum(f.read for f in rows.facts.values()):,} rows read")
            counts |= _write_log(spark, lake, work, rows, snapshots, cleanup)
        _write_catalogues(spark, lake, work, snapshots, named, force, cleanup)
    write_memory(lake, log, work.snapshots, counts)
    return report_of(lake, log, work.days, counts)


def _check_time_zone(source: SourceConfig) -> None:
    try:
        ZoneInfo(source.time_zone)
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(
            f"source.time_zone is {source.time_zone!r}, which is no zone; write one as Asia/Shanghai."
        ) from error


def _known_log(
    spark: SparkSession, source: SourceConfig, memory: Memory, now: Moment, cleanup: ExitStack
) -> tuple[Log, LogRows | None]:
    """The log with the facts of every file, and the rows of those that had to be read for them."""
    files = find_files(source, memory.files)
    facts, seen = memory.facts(settings_digest(source)), memory.seen()
    log = Log(source, files, facts, {f.stamp: seen.get(f.stamp, now) for f in files if f.role == "log"})
    unread = [file for file in log.logs if file.stamp not in facts]
    rows = _read(spark, log, unread, cleanup) if unread else None
    log.facts.update(rows.facts if rows else {})
    return log, rows


def _read(spark: SparkSession, log: Log, files: list[SourceFile], cleanup: ExitStack) -> LogRows:
    rows = read_rows(spark, files, log.source, log.seen)
    cleanup.callback(rows.frame.unpersist)
    return rows


def _rows_of(spark: SparkSession, work: Pass, first: LogRows | None, cleanup: ExitStack) -> LogRows:
    """The rows of every file that holds a day to write; read again only if the pass has not read them yet."""
    needed = work.log.holding(work.todo)
    if first is not None and {f.stamp for f in needed} <= {f.stamp for f in first.files}:
        return first
    return _read(spark, work.log, needed, cleanup)


def _write_log(
    spark: SparkSession, lake: Lake, work: Pass, rows: LogRows, snapshots: Snapshots, cleanup: ExitStack
) -> dict[str, dict[str, Any]]:
    """Commits impressions and rejected rows; returns identity and counts of the days of the pass."""
    usable = rows.usable().where(F.col("date").isin(list(work.todo)))
    fated = with_fate(with_ids(usable, work.log.source.request_gap_ms), "impression_id", VALUES)
    fated = with_deleted(fated, deleted_users(spark, lake)).persist()
    cleanup.callback(fated.unpersist)
    counted = fate_counts(fated)
    identities = work.log.identities("impressions", work.todo)
    counts = {}
    for day in work.todo:
        fates = {fate: counted.get(day, {}).get(fate, 0) for fate in FATES}
        accepted = sum(rows.facts[file.stamp].accepted.get(day.isoformat(), 0) for file in rows.files)
        if accepted != sum(fates.values()):
            raise ContractViolation(f"{day}: {accepted} usable rows were read, but {fates} are accounted for.")
        counts[day.isoformat()] = {"identity": identities[day], **fates}
    if work.impressions:
        _write_impressions(lake, work.impressions, fated, counts)
    if work.rejected:
        refused = any(fates.get(fate) for fates in counted.values() for fate in REFUSED)
        _write_rejected(spark, lake, work, rows, fated if refused else None, snapshots)
    return counts


def _write_impressions(
    lake: Lake, identities: Identities, fated: DataFrame, counts: Mapping[str, Mapping[str, Any]]
) -> None:
    kept = fated.where((F.col("fate") == KEPT) & F.col("date").isin(list(identities)))
    kept = kept.select("impression_id", "request_id", *VALUES)
    most = max(counts[day.isoformat()][KEPT] for day in identities)
    files = -(-most // ROWS_A_FILE)
    tables.replace_days(lake, "impressions", kept, identities, max(1, files), order=("user_id", "ts"))
    committed = lake.rows_by_day("impressions")
    for day in identities:
        if committed.get(day, 0) != counts[day.isoformat()][KEPT]:
            raise ContractViolation(
                f"impressions of {day}: {committed.get(day, 0)} rows committed, {counts[day.isoformat()][KEPT]} kept; "
                "run `lazyrec ingest --force`."
            )


def _write_rejected(
    spark: SparkSession, lake: Lake, work: Pass, rows: LogRows, fated: DataFrame | None, snapshots: Snapshots
) -> None:
    """`fated` is null where it refuses no row. What holds no refused row, most logs and snapshots, is not scanned again."""
    columns = (*PLACE, "raw", "reason", "date")
    parts, blocks = [], rows.blocks(work.log.days[0])
    if any(facts.rejected for facts in rows.facts.values()):
        parts.append(rows.rejected())
    if fated is not None:
        reason = F.coalesce(*(F.when(F.col("fate") == fate, why) for fate, why in REFUSED.items()))
        parts.append(fated.withColumn("reason", reason).where(F.col("reason").isNotNull()).select(*columns))
    since = {f.name: day for f in work.log.catalogues if (day := work.snapshots[f.stamp]) in work.rejected}
    for frame in snapshots.values() if since else ():
        spans = block_spans(frame)
        titled = {file.name for file in work.log.catalogues if file.titled}
        if sum(span["refused"] for span in spans) > len({span["source_file"] for span in spans} & titled):  # headers apart
            undated = frame.where(F.col("reason").isNotNull()).withColumn("date", F.lit(None).cast("date"))
            parts.append(undated.select(*columns))
            shifts = shifts_of(spans, work.log.catalogues)
            blocks += [(name, block, shift, [], since[name]) for name, block, shift in shifts if name in since]
    if parts:
        found = numbered(spark, reduce(DataFrame.unionByName, parts), blocks)
        refused = unnamed(found.where(F.col("date").isin(list(work.rejected))), deleted_users(spark, lake))
    else:
        refused = spark.createDataFrame([], tables.spark_schema(TABLES["rejected_rows"]))
    tables.replace_days(lake, "rejected_rows", refused, work.rejected)


def _read_snapshots(spark: SparkSession, lake: Lake, log: Log, cleanup: ExitStack) -> Snapshots:
    if not log.catalogues:
        return {}
    frames = CATALOGUES[log.source.kind](spark, log.catalogues, log.source)
    found = {}
    for name, rows in frames.items():
        judged = catalogues.judged(rows, TABLES[name]) if name in TABLES else rows
        found[name] = (without_users(judged, deleted_users(spark, lake)) if name == USERS.name else judged).persist()
        cleanup.callback(found[name].unpersist)
    return found


def _write_catalogues(
    spark: SparkSession,
    lake: Lake,
    work: Pass,
    snapshots: Snapshots,
    named: Mapping[str, DataFrame],
    force: bool,
    cleanup: ExitStack,
) -> None:
    ingested = {*work.days, *lake.identities("impressions")}
    # Later days too: what they were the first to show may be shown earlier now, or what was shown earlier no longer.
    days = [day for day in work.log.days if day >= work.since and day in ingested]
    source = work.log.source
    for table in (ITEMS, USERS):
        judged = snapshots.get(table.name)
        snapshot = catalogues.empty_snapshot(spark, table) if judged is None else catalogues.snapshot_of(judged, table)
        originals_of = named.get(table.name)
        rows = catalogues.history(spark, lake, table, snapshot, source, work.log.days, work.since, originals_of).persist()
        cleanup.callback(rows.unpersist)
        catalogues.commit(lake, table, rows, source, days, force)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m jobs.ingest --config F [--date D] [--force]`; prints one JSON object, returns the exit code."""
    return command(STAGE, day_parser(STAGE, "raw logs to tables; bad rows aside"), _work, arguments)


def _work(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    days = [parse_date(options.date)] if options.date else None
    lake = lake_of(config)
    with lake_lock(lake):
        report = None if options.force else done(lake, config, days)
        status = "done" if report is None else "skipped"
        if report is None:
            report = ingest(spark_session(config.resources), lake, config, days, options.force)
    return {"status": status, "rows": report.rows, "reasons": report.reasons, "tables": report.tables}


if __name__ == "__main__":
    sys.exit(main())
