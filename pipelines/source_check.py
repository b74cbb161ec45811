"""`lazyrec check`: what is wrong with a source and its mapping, before anything runs.

Reads headers, schemas and the first rows of some files, so that it takes seconds whatever the size of the log; it starts
no engine and writes nothing. What it says of values holds for those rows alone.
"""

from __future__ import annotations

import datetime
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from jobs.bounds import latest_time
from jobs.mapping import Cell, column_faults, columns_of, key_of, mapping_of, role_mappings
from jobs.source_files import SourceFile, column_types, find_files, is_same
from pipelines.source_sample import SECONDS, Sample, first_lines, moment, sample_of, value_of
from schemas.config import Config
from schemas.errors import ConfigError, LazyRecError
from schemas.source import SourceConfig

ROWS = 1_000  # looked at a role
FILES_SAMPLED = 10  # a role
FILES_OPENED = 500  # a role: their columns are compared with the mapping
YEARS = (1990, 2100)
REQUIRED = ("user_id", "item_id", "ts")


@dataclass(frozen=True)
class Finding:
    """One line for people. An error means that ingest would fail, or keep nothing."""

    level: Literal["error", "warning", "note"]
    text: str


@dataclass
class Looked:
    """What the columns share: a time after `latest` lies in the future; `kinds` of item ids, by role."""

    latest: datetime.datetime | None
    kinds: dict[str, set[str]]


def run(config: Config, quiet: bool = False) -> dict[str, Any]:
    """Prints the findings, a line each; the answer for the last line. Raises ConfigError where there is an error."""
    findings = list(check(config))
    for finding in findings if not quiet else ():
        sys.stdout.write(f"{finding.level + ':':9}{finding.text}\n")
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        more = f" and {len(errors) - 1} more error(s)" if len(errors) > 1 else ""
        raise ConfigError(f"The source cannot be read as configured: {errors[0].text}{more}")
    return {"stage": "check", "status": "done", "findings": [asdict(finding) for finding in findings]}


def check(config: Config, now: datetime.datetime | None = None) -> Iterator[Finding]:
    """The findings on the source of `config`, those that stop ingest included; `now` (default: the clock) is when ingest
    would read it."""
    source = config.source
    if not source.path and config.simulate is not None:
        yield Finding("note", "source.path is empty: the run simulates its logs, and there is nothing to check")
        return
    try:
        ZoneInfo(source.time_zone)
        files = find_files(source, checksums=False)
    except (LazyRecError, KeyError, ValueError, OSError) as error:
        zone = f"source.time_zone {source.time_zone!r} is no zone; write one as Asia/Shanghai"
        yield Finding("error", str(error) if isinstance(error, LazyRecError) else zone)
        return
    yield from _same_files(files)
    if source.kind == "sequences":
        yield from _check_sequences(files[0])
        return
    mapped = mapping_of(source)
    looked = Looked(latest_time(source.future_days, now or datetime.datetime.now(datetime.UTC)), {})
    for role, mapping in role_mappings(mapped).items():
        chosen = [file for file in files if file.role == role]
        yield from _check_role(role, chosen, columns_of(mapping), mapped, looked)
    kinds = looked.kinds
    if len(kinds.get("items", set())) == len(kinds.get("log", set())) == 1 and kinds["items"] != kinds["log"]:
        one, other = *kinds["log"], *kinds["items"]
        yield Finding("warning", f"item ids of the log are {one} and of the catalogue {other}: they will not meet")


def _same_files(files: list[SourceFile]) -> Iterator[Finding]:
    by_size: dict[tuple[str, int], list[SourceFile]] = defaultdict(list)
    for file in files:
        by_size[file.role, file.size].append(file)
    for group in by_size.values():
        for file in group[1:]:
            if is_same(group[0], file):
                yield Finding(
                    "warning", f"{group[0].name} and {file.name} hold the same bytes: its rows count as duplicates"
                )


def _check_role(
    role: str, files: list[SourceFile], columns: Mapping[str, str], source: SourceConfig, looked: Looked
) -> Iterator[Finding]:
    faulty = False
    for file in files[:FILES_OPENED]:
        try:
            types = column_types(file, source.separator)
        except LazyRecError as error:
            faulty = True
            yield Finding("error", str(error))
            continue
        if len(types) == 1 and any(sign in next(iter(types)) for sign in ";\t|"):
            yield Finding("error", f"{file.name}: the header is one column; set source.separator to what divides it")
            faulty = True
        for text in () if faulty else column_faults(file.name, role, columns, types, source.ts_unit):
            faulty = True
            yield Finding("error", text)
        if faulty:
            break  # the other files are likely to have the same fault
    if not faulty:
        yield from _check_rows(role, files, columns, source, looked)


def _check_rows(
    role: str, files: list[SourceFile], columns: Mapping[str, str], source: SourceConfig, looked: Looked
) -> Iterator[Finding]:
    step = -(-len(files) // FILES_SAMPLED)
    chosen = files[::step]
    try:
        samples = [sample_of(file, list(columns.values()), -(-ROWS // len(chosen)), source.separator) for file in chosen]
    except (LazyRecError, OSError, EOFError, ValueError) as error:
        yield Finding("error", f"{role}: {error}")
        return
    rows, broken = sum(sample.rows for sample in samples), sum(sample.broken for sample in samples)
    yield Finding("note", f"{role}: {len(files)} file(s), {rows:,} rows looked at{_days(role, samples, columns, source)}")
    if broken:
        yield Finding("warning", f"{role}: {broken} of {rows + broken} lines have the wrong number of columns")
    if not rows:
        yield Finding(
            "error" if role == "log" else "warning", f"{role}: no rows in {', '.join(f.name for f in chosen[:3])}"
        )
        return
    for field, name in columns.items():
        values = [(Cell(field, name, s.types[name]), value) for s in samples for value in s.values.get(name, [])]
        yield from _check_column(role, field, name, values, source, looked)


def _check_column(
    role: str, field: str, name: str, values: list[tuple[Cell, Any]], source: SourceConfig, looked: Looked
) -> Iterator[Finding]:
    where = f"column {name!r} ({key_of(role, field)})"
    given = [(cell, value) for cell, value in values if value is not None]
    if not given:
        yield Finding("error" if field in REQUIRED else "warning", f"{where} is empty in all of {len(values):,} rows")
        return
    read = [value_of(cell, value, source) for cell, value in given]
    known = [value for value in read if value is not None]
    if len(known) < len(given):
        example = next(value for (_, value), parsed in zip(given, read, strict=True) if parsed is None)
        level: Literal["error", "warning"] = "warning" if known else "error"
        hint = f"; {_unit_hint(given, source)}" if field == "ts" else ""
        refused = len(given) - len(known)
        yield Finding(level, f"{where}: {refused:,} of {len(given):,} values cannot be read, {example!r} is one{hint}")
    kind = given[0][0].kind
    if kind == "time" and known and not any(YEARS[0] <= value.year <= YEARS[1] for value in known):
        yield Finding("error", f"{where}: the times lie in the year {known[0].year}; {_unit_hint(given, source)}")
    elif kind == "time" and looked.latest is not None:
        yield from _check_future(where, known, looked.latest)
    if kind == "flag" and known and not any(known):
        yield Finding("warning", f"{where} is never true in {len(known):,} rows")
    if field == "item_id":
        looked.kinds[role] = {"integers" if isinstance(value, int) else "text" for value in known}


def _check_future(where: str, times: list[datetime.datetime], latest: datetime.datetime) -> Iterator[Finding]:
    late = [time for time in times if time > latest]
    if late:
        level: Literal["error", "warning"] = "warning" if len(late) < len(times) else "error"
        what = f"{len(late):,} of {len(times):,} times lie in the future (source.future_days): {late[0]} is refused"
        yield Finding(level, f"{where}: {what}")


def _unit_hint(given: list[tuple[Cell, Any]], source: SourceConfig) -> str:
    """The unit in which the times would lie in a sane year."""
    cell, value = given[0]
    for unit in (*SECONDS, "iso"):
        read = moment(cell, value, replace(source, ts_unit="auto"), unit)
        if read is not None and YEARS[0] <= read.year <= YEARS[1]:
            return f"source.ts_unit: {unit} gives {read.date()}"
    return "no source.ts_unit gives a year from 1990 to 2100"


def _days(role: str, samples: list[Sample], columns: Mapping[str, str], source: SourceConfig) -> str:
    if role != "log":
        return ""
    name, zone = columns["ts"], ZoneInfo(source.time_zone)
    cells = [(Cell("ts", name, sample.types[name]), sample.values.get(name, [])) for sample in samples]
    found: set[datetime.date] = set()
    for cell, values in cells:
        times = (moment(cell, value, source) for value in values if value is not None)
        found |= {time.astimezone(zone).date() for time in times if time is not None and 1 < time.year < 9999}
    return f", {len(found)} day(s) from {min(found)} to {max(found)}" if found else ""


def _check_sequences(file: SourceFile) -> Iterator[Finding]:
    lines = first_lines(file, ROWS)
    yield Finding("note", f"log: {Path(file.path).name}, {len(lines):,} lines looked at")
    bad = [line for line in lines if len(line.split()) < 2 or not all(token.isdigit() for token in line.split())]
    if len(bad) == len(lines):
        yield Finding("error", f"{file.name}: no line is `user item item ...` with integers; the first is {lines[:1]}")
    elif bad:
        yield Finding("warning", f"{file.name}: {len(bad)} of {len(lines)} lines are refused, {bad[0][:60]!r} is one")
