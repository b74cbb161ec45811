"""Faults and bad input, each with what must come of it: an exit code, and words of the sentence that is printed.

A case changes a deployment of three days, empty or ingested, and names the command. `tests.faults.table` makes the page of
all of them, and tests/faults/test_faults.py holds each to what it says here.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from schemas.errors import EXIT_DONE, EXIT_FAILED, EXIT_RETRY, EXIT_USAGE
from schemas.locks import lake_lock
from tests.faults.full_disk import small_disk
from tests.faults.tiny import COLUMNS, DAYS, Row, Tiny, day_rows, write_rows

DAY = DAYS[0]
NEXT = DAYS[3]  # the first day that the deployments do not have
DEFAULT_PORTS = (4040, 5000, 6379, 8265, 10001, 25333)  # Spark's page, MLflow, Ray's GCS, dashboard and client, Py4J
FUTURE = {"readerFeatures": ["timeTravel2030"], "writerFeatures": ["timeTravel2030"]}
Make = Callable[[Tiny, ExitStack], None]


@dataclass(frozen=True)
class Case:
    """`make` brings the fault about; what it puts on the stack lasts until the command has ended."""

    name: str
    done: str
    make: Make
    command: tuple[str, ...] = ("ingest",)
    code: int = EXIT_USAGE
    words: str = ""
    ingested: bool = False  # the lake holds the days before the fault
    writes: bool = False  # a pass of Spark follows, which takes seconds


def configured(**sections: object) -> Make:
    return lambda deployment, stack: deployment.configure(sections)


def rewritten(change: Callable[[list[Row]], list[Row]], columns: tuple[str, ...] = COLUMNS) -> Make:
    """The rows of the first day, changed."""

    def make(deployment: Tiny, stack: ExitStack) -> None:
        write_rows(log_of(deployment), change(day_rows(DAY)), columns)

    return make


def with_values(name: str, *values: object) -> Make:
    """The first rows hold `values` in the column `name`."""

    def change(rows: list[Row]) -> list[Row]:
        return [row | {name: value} for row, value in zip(rows, values, strict=False)] + rows[len(values) :]

    return rewritten(change)


def with_lines(*lines: str) -> Make:
    def make(deployment: Tiny, stack: ExitStack) -> None:
        with log_of(deployment).open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    return make


def log_of(deployment: Tiny) -> Path:
    return deployment.source / f"day_{DAY}.csv"


def nothing(deployment: Tiny, stack: ExitStack) -> None:
    """The command alone is the fault."""


def no_log(deployment: Tiny, stack: ExitStack) -> None:
    for path in deployment.source.glob("day_*"):
        path.unlink()


def no_source(deployment: Tiny, stack: ExitStack) -> None:
    shutil.rmtree(deployment.source)


def empty_logs(deployment: Tiny, stack: ExitStack) -> None:
    for path in deployment.source.glob("day_*"):
        write_rows(path, [])


def no_bytes(deployment: Tiny, stack: ExitStack) -> None:
    log_of(deployment).write_text("")


def shuffled(rows: list[Row]) -> list[Row]:
    return random.Random(0).sample(rows, len(rows))


def copied(deployment: Tiny, stack: ExitStack) -> None:
    shutil.copy(log_of(deployment), deployment.source / "day_again.csv")


def cut_gzip(deployment: Tiny, stack: ExitStack) -> None:
    whole = gzip.compress(log_of(deployment).read_bytes(), mtime=0)
    (deployment.source / f"day_{DAY}.csv.gz").write_bytes(whole[: len(whole) * 2 // 3])
    log_of(deployment).unlink()


def thin_day(deployment: Tiny, stack: ExitStack) -> None:
    deployment.configure({"guard": {"enabled": True, "days": 2, "min_rows": 100}})
    write_rows(deployment.source / f"day_{NEXT}.csv", day_rows(NEXT)[:20])


def newer_table(deployment: Tiny, stack: ExitStack) -> None:
    add_commit(deployment, {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **FUTURE}})


def mapped_table(deployment: Tiny, stack: ExitStack) -> None:
    first = Path(deployment.lake.path("impressions")) / "_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in first.read_text().splitlines()]
    (created,) = (action["metaData"] for action in actions if "metaData" in action)
    fields = json.loads(created["schemaString"])
    for number, column in enumerate(fields["fields"], 1):
        column["metadata"] = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": column["name"]}
    created["schemaString"] = json.dumps(fields)
    created["configuration"] |= {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": str(number)}
    add_commit(deployment, {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}, {"metaData": created})


def add_commit(deployment: Tiny, *actions: dict[str, Any]) -> None:
    log = Path(deployment.lake.path("impressions")) / "_delta_log"
    version = (deployment.lake.version("impressions") or 0) + 1
    (log / f"{version:020}.json").write_text("".join(json.dumps(action) + "\n" for action in actions))


def newer_manifest(deployment: Tiny, stack: ExitStack) -> None:
    for path in (deployment.lake.home / "_artifacts" / "ingest").glob("*/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def busy(deployment: Tiny, stack: ExitStack) -> None:
    stack.enter_context(lake_lock(deployment.lake))


def full_disk(deployment: Tiny, stack: ExitStack) -> None:
    stack.enter_context(small_disk(deployment.folder / "lake", kilobytes=96))


def ports_taken(deployment: Tiny, stack: ExitStack) -> None:
    for port in DEFAULT_PORTS:
        held = stack.enter_context(socket.socket())
        try:
            held.bind(("127.0.0.1", port))
            held.listen()
        except OSError:  # somebody else has it, which is as good
            continue


USAGE = [
    Case("wrong config key", "`train.epoch: 3`", configured(train={"epoch": 3}), words="did you mean 'epochs'"),
    Case("wrong config type", "`train.epochs: three`", configured(train={"epochs": "three"}), words="must be int"),
    Case("value out of range", "`model.g_kv: 3`", configured(model={"g_kv": 3}), words="must divide heads"),
    Case("malformed date", "`--date yesterday`", nothing, ("ingest", "--date", "yesterday"), words="YYYY-MM-DD"),
    Case("missing source", "the folder of the logs is gone", no_source, words="is not there"),
    Case("missing file", "no file matches `source.log.files`", no_log, words="holds no file day_*"),
]
FILES = [
    Case("missing column", "a log file without `ts`", rewritten(list, COLUMNS[:2]), code=EXIT_FAILED, words="ts"),
    Case("empty file", "a log file of 0 bytes", no_bytes, code=EXIT_FAILED, words="is empty"),
    Case("empty log", "every log file holds its header alone", empty_logs, code=EXIT_FAILED, words="no"),
    Case("truncated gzip", "a .csv.gz cut at two thirds", cut_gzip, code=EXIT_FAILED, words="truncated"),
]
WAITING = [
    Case(
        "unknown date",
        "a day that no file holds",
        nothing,
        ("ingest", "--date", str(NEXT)),
        EXIT_RETRY,
        "newer than the log",
    ),
    Case("nothing ingested", "a stage on an empty lake", nothing, ("sequences",), EXIT_RETRY, "lazyrec ingest"),
    Case("missing upstream", "after ingest alone", nothing, ("train",), EXIT_RETRY, "no partition", ingested=True),
    Case(
        "night without its log",
        "the file of that day is not there yet",
        nothing,
        ("run", "--date", str(NEXT)),
        EXIT_RETRY,
        str(NEXT),
        ingested=True,
    ),
    Case(
        "late days without a log",
        "no file holds a day of the range",
        nothing,
        ("backfill", "--from", str(NEXT)),
        EXIT_RETRY,
        "holds no day",
        ingested=True,
    ),
    Case("second run", "another process holds the lake", busy, ("run",), EXIT_RETRY, "Another run", ingested=True),
]
LAKES = [
    Case("newer table", "`impressions` asks for an unknown reader feature", newer_table, ("sequences",)),
    Case("column mapping", "`impressions` maps its columns, which Ray reads as nulls", mapped_table, ("sequences",)),
    Case("newer manifest", "`format: 99` in an artifact's manifest", newer_manifest),
]
LAKES = [replace(case, code=EXIT_FAILED, words="newer release|column mapping", ingested=True) for case in LAKES]
NIGHTS = [
    Case("guard", "a day of 20 rows after days of 360", thin_day, ("run",), EXIT_FAILED, "number of rows", True, True),
    Case("full disk", "the lake on a disk of 96 KiB", full_disk, ("ingest",), EXIT_FAILED, "No space", writes=True),
]
VALID = f"1,2,{DAY}T10:00:00Z,1,0,5,6"
NOT_NUMBERS = (f"NaN,2,{DAY}T10:00:00Z,1,0,5,6", "1,2,NaN,1,0,5,6", f"1,2,{DAY}T10:00:00Z,1,0,NaN,6")
ROWS = [
    Case("broken CSV rows", "too few columns; an open quote", with_lines("1,2", VALID.replace("1,2,", '1,2,"'))),
    Case("NaN", "as user, time and play time", with_lines(*NOT_NUMBERS)),
    Case("absurd durations", "-5, 10^12, inf and `soon`", with_values("play_ms", -5, 10**12, "inf", "soon")),
    Case("ids out of range", "-1 and 2^63 as user", with_values("user_id", -1, 2**63)),
    Case("absurd times", "the years 1800 and 9999", with_values("ts", "1800-01-01T00:00:00Z", "9999-01-01T00:00:00Z")),
    Case(
        "future times", "years ahead, by a broken clock", with_values("ts", "2090-01-01T00:00:00Z", "2099-12-31T23:59:59Z")
    ),
    Case("times out of order", "the rows of a day shuffled", rewritten(shuffled)),
    Case("duplicated file", "a day's file under a second name", copied),
    Case("ports in use", f"{', '.join(map(str, DEFAULT_PORTS))}", ports_taken),
]
ROWS = [replace(case, code=EXIT_DONE, writes=True) for case in ROWS]
CASES = [*USAGE, *FILES, *WAITING, *LAKES, *NIGHTS, *ROWS]
