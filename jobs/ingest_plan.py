"""What ingest remembers and what follows from it: days, identities, counts. Pure; starts no engine.

The manifest of the newest pass remembers of each file its checksum and which days it holds, and of each day its counts,
so that a night reads only new files and a skip reads none. A day's identity is over the files that hold rows of it, so
a late or corrected file changes its own days and no other. Everything about a file follows from that file alone: a
rejected row whose time cannot be read is dated the first day of its file, and only a file without any usable row falls
back on the first day of the log.

One thing about a row follows from no file: whether its time lies in the future (source.future_days). It is asked of the
moment at which a pass first read the file, which the memory keeps. So every later reading, for another day or by other
settings, judges alike, and a refused row stays refused when its time has come, which is as false as before. A file that
changed meets the present clock, and by `--force` so does each that has rows in the future. Such a row is dated as one
whose time cannot be read. How many rows of a day are usable tells which they are, whatever the moment: the number is part
of the identity, and the moment is not.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jobs.bounds import FUTURE
from jobs.source_files import SourceFile, find_files, manifest_entry
from schemas.calendar import DayRange
from schemas.config import Config
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake
from schemas.lineage import digest
from schemas.loader import to_mapping
from schemas.source import SourceConfig

STAGE = "ingest"
LOGIC = 4
OUTPUTS = ("impressions", "rejected_rows", "items", "users")
NEWEST = "newest"  # the artifact that points at the newest pass
KEPT, DUPLICATE, CONFLICT, DELETED = FATES = ("kept", "duplicate", "conflict", "deleted")  # of a usable row
REFUSED = {CONFLICT: "same impression_id, different values", DELETED: "the user was deleted"}  # fates: their reasons

Day = datetime.date
Moment = datetime.datetime
Stamp = tuple[str, str]  # of a file


@dataclass
class FileFacts:
    """What reading a file tells. `rejected` is keyed by the day to date the rows, "" where no row of the file has one."""

    read: int = 0
    outside: int = 0
    accepted: dict[str, int] = field(default_factory=dict)  # day: usable rows, duplicates included
    rejected: dict[str, dict[str, int]] = field(default_factory=dict)  # day: reason: rows

    @property
    def future(self) -> int:
        """The rows refused for a time in the future."""
        return sum(future_of(reasons) for reasons in self.rejected.values())

    def check(self, name: str) -> None:
        parts = sum(self.accepted.values()) + sum(n for reasons in self.rejected.values() for n in reasons.values())
        if self.read != parts + self.outside:
            raise ContractViolation(f"{name}: {self.read} rows were read, but {parts + self.outside} are accounted for.")


@dataclass
class IngestReport:
    """What a pass, or the newest one, made of the log; `rows` always add up: read = the sum of the others."""

    days: tuple[Day, ...]
    rows: dict[str, int]  # read, kept, duplicates, rejected, outside_range
    reasons: dict[str, int]
    tables: dict[str, int]  # name: version
    rows_by_table: dict[str, int]


@dataclass
class Memory:
    """The manifest of a pass."""

    # SourceFile entries, with `facts` and `seen`, or with `since`
    files: list[dict[str, Any]] = field(default_factory=list)
    settings: str = ""  # digest of the settings behind the facts
    days: dict[str, dict[str, Any]] = field(default_factory=dict)  # day: identity and counts by fate

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Memory:
        return cls(content["files"], content["settings"], content["days"])

    def facts(self, settings: str) -> dict[Stamp, FileFacts]:
        if settings != self.settings:
            return {}
        return {(e["name"], e["sha256"]): FileFacts(**e["facts"]) for e in self.files if e.get("facts")}

    def seen(self) -> dict[Stamp, Moment]:
        """When each log file was first read."""
        return {(e["name"], e["sha256"]): Moment.fromisoformat(e["seen"]) for e in self.files if e.get("seen")}

    def anew(self) -> Memory:
        """Without the files that have rows in the future, so that these meet the present clock."""
        return replace(self, files=[e for e in self.files if not FileFacts(**e.get("facts", {})).future])

    def since(self) -> dict[Stamp, Day]:
        """The day from which each catalogue file was taken to hold."""
        return {(e["name"], e["sha256"]): Day.fromisoformat(e["since"]) for e in self.files if e.get("since")}


@dataclass
class Log:
    """The files of a source, and what is known of each log file."""

    source: SourceConfig
    files: list[SourceFile]
    facts: dict[Stamp, FileFacts]
    seen: dict[Stamp, Moment] = field(default_factory=dict)  # when each log file was first read; empty: nothing is written

    @property
    def logs(self) -> list[SourceFile]:
        return [file for file in self.files if file.role == "log"]

    @property
    def catalogues(self) -> list[SourceFile]:
        return [file for file in self.files if file.role != "log"]

    @cached_property
    def days(self) -> tuple[Day, ...]:
        """The days of the log in order. Raises ContractViolation where no row is usable."""
        days = {Day.fromisoformat(d) for file in self.logs for d in self.facts[file.stamp].accepted}
        if not days:
            raise ContractViolation(self._why_empty())
        return tuple(sorted(days))

    def dated(self, file: SourceFile) -> dict[str, dict[str, int]]:
        """The file's rejected rows by the day of their partition."""
        first = self.days[0].isoformat()
        return {day or first: reasons for day, reasons in self.facts[file.stamp].rejected.items()}

    def holding(self, days: Collection[Day]) -> list[SourceFile]:
        """The log files with a row, usable or rejected, in the partitions of `days`."""
        wanted = {day.isoformat() for day in days}
        return [f for f in self.logs if wanted & (self.facts[f.stamp].accepted.keys() | self.dated(f).keys())]

    def identities(self, table: str, days: Iterable[Day], further: Mapping[Day, Any] | None = None) -> dict[Day, str]:
        """The identity of each day of `impressions`, or of `rejected_rows` (see `further_of_rejected`)."""
        settings = settings_of(self.source)
        by_day: dict[str, list[tuple[str, str, int]]] = {}
        for file in self.logs:
            accepted = self.facts[file.stamp].accepted
            for day in accepted.keys() | self.dated(file).keys():
                by_day.setdefault(day, []).append((*file.stamp, accepted.get(day, 0)))
        return {
            day: digest(STAGE, table, LOGIC, settings, sorted(by_day[day.isoformat()]), (further or {}).get(day, []))
            for day in days
        }

    def further_of_rejected(self, snapshots: Mapping[Stamp, Day]) -> dict[Day, Any]:
        """What rejected rows depend on beside the log: the range, the rows in the future, which are dated another day than
        their own, and the snapshots (by the day from which they hold) whose broken rows share the partition."""
        by_day: dict[Day, Any] = {day: [str(self.source.first_day), str(self.source.last_day)] for day in self.days}
        for file in self.logs:
            for dated, reasons in self.dated(file).items():
                if future := future_of(reasons):
                    by_day[Day.fromisoformat(dated)].append((*file.stamp, future))
        for stamp, day in sorted(snapshots.items()):
            by_day.setdefault(day, []).append(stamp)
        return by_day

    def _why_empty(self) -> str:
        names = ", ".join(file.name for file in self.logs[:3]) + (", ..." if len(self.logs) > 3 else "")
        read = sum(self.facts[file.stamp].read for file in self.logs)
        if not read:
            return f"{names}: the log has no rows; give a log with at least one."
        outside = sum(self.facts[file.stamp].outside for file in self.logs)
        reasons = count_reasons(r for file in self.logs for r in self.facts[file.stamp].rejected.values())
        most = max(reasons, key=lambda reason: reasons[reason]) if reasons else "none"
        remedy = "this machine's clock and source.future_days" if most.endswith(FUTURE) else "the files and the range"
        return (
            f"{names}: none of {read} rows is usable, {outside} lie outside source.first_day to source.last_day and "
            f"{read - outside} are rejected (most often: {most}); check {remedy}."
        )


def settings_of(source: SourceConfig) -> dict[str, Any]:
    """The settings that a partition's rows depend on. Which days are ingested changes no row of any of them, and what
    `future_days` refuses shows in the number of usable rows."""
    which = ("first_day", "last_day", "future_days")
    return {k: v for k, v in to_mapping(source, identity=True).items() if k not in which}


def settings_digest(source: SourceConfig) -> str:
    return digest(STAGE, LOGIC, to_mapping(source, identity=True))


def run_identity(source: SourceConfig, files: Iterable[SourceFile]) -> str:
    """Of a pass over the whole source: its settings and the checksums of all files."""
    return digest(settings_digest(source), sorted((file.role, *file.stamp) for file in files))


def remember(lake: Lake) -> Memory:
    """The memory of the newest pass; empty where there was none."""
    pointer = lake.manifest(STAGE, NEWEST)
    content = lake.manifest(STAGE, pointer["run"]) if pointer else None
    return Memory.of(content) if content else Memory()


def write_memory(lake: Lake, log: Log, since: Mapping[Stamp, Day], counts: dict[str, dict[str, Any]]) -> None:
    """Completes a pass: the manifest of its files and days, then the pointer to it."""
    entries = []
    for file in log.files:
        entry = manifest_entry(file)
        if file.role == "log":
            entry |= {"facts": vars(log.facts[file.stamp]), "seen": log.seen[file.stamp].isoformat()}
        else:
            entry["since"] = since[file.stamp].isoformat()
        entries.append(entry)
    identities = {t: {d.isoformat(): i for d, i in sorted(lake.identities(t).items())} for t in OUTPUTS}
    content = {"files": entries, "settings": settings_digest(log.source), "days": counts, "identities": identities}
    run = run_identity(log.source, log.files)
    lake.write_manifest(STAGE, run, content)
    lake.write_manifest(STAGE, NEWEST, {"run": run})


def select_days(log_days: tuple[Day, ...], days: Collection[Day] | None) -> tuple[Day, ...]:
    """The days of the pass. Raises MissingUpstream for a day of which the log holds no row, or a range without any."""
    if days is None:
        return log_days
    if isinstance(days, DayRange):
        return _days_within(log_days, days)
    for day in sorted(days):
        if day not in log_days:
            newer = "is newer than the log, which" if day > log_days[-1] else "is no day of the log, which"
            raise MissingUpstream(f"{day} {newer} holds {log_days[0]} to {log_days[-1]}; add its log file first.")
    return tuple(sorted(set(days)))


def _days_within(log_days: tuple[Day, ...], wanted: DayRange) -> tuple[Day, ...]:
    held = tuple(day for day in log_days if day in wanted)
    if not held:
        raise MissingUpstream(
            f"The log holds no day {wanted}: it holds {log_days[0]} to {log_days[-1]}; add the files of those days first."
        )
    return held


def report_of(lake: Lake, log: Log, days: tuple[Day, ...], counts: Mapping[str, Mapping[str, Any]]) -> IngestReport:
    """The counts of `days`, over the files that hold them; rows of other days count as outside the range.

    Raises ContractViolation where rows in differ from rows kept, duplicate, rejected and outside.
    """
    wanted = {day.isoformat() for day in days}
    files = log.logs if days == log.days else log.holding(days)
    reasons = count_reasons(reasons for file in files for day, reasons in log.dated(file).items() if day in wanted)
    fates = {fate: sum(counts[day].get(fate, 0) for day in wanted) for fate in FATES}
    reasons |= {reason: fates[fate] for fate, reason in REFUSED.items() if fates[fate]}
    outside = sum(log.facts[file.stamp].outside for file in files)
    for file in files:
        outside += sum(n for day, n in log.facts[file.stamp].accepted.items() if day not in wanted)
        outside += sum(sum(r.values()) for day, r in log.dated(file).items() if day not in wanted)
    rows = {
        "read": sum(log.facts[file.stamp].read for file in files),
        "kept": fates[KEPT],
        "duplicates": fates[DUPLICATE],
        "rejected": sum(reasons.values()),
        "outside_range": outside,
    }
    if rows["read"] != sum(n for name, n in rows.items() if name != "read"):
        raise ContractViolation(f"The counts of ingest do not reconcile: {rows}; run `lazyrec ingest --force`.")
    versions = {name: version for name in OUTPUTS if (version := lake.version(name)) is not None}
    return IngestReport(days, rows, reasons, versions, {name: lake.row_count(name) for name in versions})


def future_of(reasons: Mapping[str, int]) -> int:
    return sum(n for reason, n in reasons.items() if reason.endswith(FUTURE))


def count_reasons(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for reasons in parts:
        for reason, n in reasons.items():
            total[reason] = total.get(reason, 0) + n
    return dict(sorted(total.items(), key=lambda pair: (-pair[1], pair[0])))


def done(lake: Lake, config: Config, days: Collection[Day] | None = None) -> IngestReport | None:
    """The report of a source that the lake already holds, or None; reads the files' checksums and the table logs."""
    source = config.source
    files = find_files(source, remember(lake).files)
    content = lake.manifest(STAGE, run_identity(source, files))
    if content is None:
        return None
    memory = Memory.of(content)
    log = Log(source, files, memory.facts(settings_digest(source)))
    scope = select_days(log.days, days)
    further = log.further_of_rejected(memory.since())
    wanted = {name: {Day.fromisoformat(day): i for day, i in ids.items()} for name, ids in content["identities"].items()}
    # A pass over one day records the others as it finds them, which may be stale.
    wanted["impressions"] = log.identities("impressions", scope)
    wanted["rejected_rows"] = log.identities("rejected_rows", scope, further)
    for name in OUTPUTS:
        present = lake.identities(name)
        if any(wanted[name].get(day, "") != present.get(day) for day in scope):
            return None
    if any(day.isoformat() not in memory.days for day in scope):
        return None
    return report_of(lake, log, scope, memory.days)
