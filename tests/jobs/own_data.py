"""One made-up log as rows of texts and what ingest must make of each, written as CSV and as Parquet."""

from __future__ import annotations

import datetime
import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import Config
from schemas.source import (
    ItemColumns,
    ItemMapping,
    LogColumns,
    LogMapping,
    SourceConfig,
    UserColumns,
    UserMapping,
)

LOG = LogColumns(
    user_id="uid",
    item_id="raw",  # a name that readers use themselves
    ts="line",
    request_id="req",
    scene="page",
    play_ms="watch",
    duration_ms="length",
    rating="stars",
    click="clicked",
    like="hearts",
    behaviour_log_probs="lp",
    behaviour_codebook="cb",
    behaviour_policy="who",
)
COLUMNS = ("uid", "raw", "line", "req", "page", "watch", "length", "stars", "clicked", "hearts", "lp", "cb", "who")
NOON = "2026-01-02T12:00:00Z"
FIRST_ROW = ("anna", "7", NOON, "r1", "home", "1500", "0", "4.5", "true", "3", "-0.5 -1.25", "c1", "m/1")
GOOD = dict(zip(COLUMNS, FIRST_ROW, strict=True))
# (what is changed, None where the row must stay, else the reason)
CHANGES: list[tuple[dict[str, str], str | None]] = [
    ({}, None),
    ({"line": "2026-01-01 23:30:00", "req": "r0"}, None),  # earlier, later in the file; local time of the source's zone
    ({"uid": "12", "clicked": "0", "hearts": "0", "lp": "", "cb": "", "who": ""}, None),
    ({"uid": "007", "watch": "", "stars": "", "clicked": "", "length": "90000"}, None),
    ({"raw": "shoe, red", "clicked": "yes", "lp": "[-0.5, -1.25]"}, None),
    ({"line": "2026-01-02T13:00:00.000001+01:00", "req": "r2"}, None),
    ({"line": NOON, "raw": "8"}, None),  # of request r1 as the first one
    ({"uid": ""}, "uid is missing"),
    ({"uid": "-3"}, "uid is negative"),
    ({"raw": "9223372036854775808"}, "raw is out of range"),
    ({"line": "yesterday"}, "line is not an ISO 8601 time (for numbers set source.ts_unit)"),
    ({"line": "12:30:00"}, "line is not an ISO 8601 time (for numbers set source.ts_unit)"),
    ({"line": "1969-05-05"}, "line is out of range"),
    ({"line": ""}, "line is missing"),
    ({"watch": "NaN"}, "watch is not a number"),
    ({"uid": "NaN"}, "uid is missing"),
    ({"raw": "null"}, "raw is missing"),
    ({"watch": "-1"}, "watch is negative"),
    ({"length": "1e12"}, "length is out of range"),
    ({"stars": "many"}, "stars is not a number"),
    ({"clicked": "maybe"}, "clicked is neither a flag nor a count"),
    ({"hearts": "-2"}, "hearts is neither a flag nor a count"),
    ({"lp": "-0.5 x"}, "lp is not a list of numbers"),
    ({"lp": "-0.5 NaN"}, "lp is not a list of numbers"),
    ({"lp": "0.5"}, "lp has a value above 0"),
]
ROWS = [GOOD | {"raw": str(100 + place)} | change for place, (change, _) in enumerate(CHANGES)]
REASONS = {place + 1: reason for place, (_, reason) in enumerate(CHANGES) if reason}


def config_of(folder: Path, log: str = "**/events*", catalogues: bool = True, **settings: Any) -> Config:
    items = ItemMapping(
        ItemColumns(item_id="sku", title="name", tags="kind", withdrawn="gone"),
        "catalogue.csv",
        ("colour",),
        ("vec", "sound"),
    )
    users = UserMapping(UserColumns(user_id="uid"), "people.parquet", ("country",))
    both = {"items": items, "users": users} if catalogues else {}
    source = SourceConfig(
        kind="mapped", path=str(folder), time_zone="Europe/Berlin", log=LogMapping(LOG, log), **(both | settings)
    )
    return Config(source=source)


def write_csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [separator.join(rows[0]), *(separator.join(_cell(value, separator) for value in row.values()) for row in rows)]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def _cell(value: str, separator: str) -> str:
    return '"' + value.replace('"', '""') + '"' if separator in value or '"' in value else value


def write_parquet(path: Path, columns: dict[str, pa.Array]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_catalogues(folder: Path) -> None:
    names = ("sku", "name", "kind", "vec", "sound", "gone", "colour")
    rows = [
        ("7", 'Boots "Alp", brown', "shoes|winter|shoes", "0.5 1", "1 2 3", "", "brown"),
        ("shoe, red", "Pumps", "", "", "", "2026-03-01", ""),
        ("bad", "Broken", "", "0.5 one", "1 2 3", "", ""),
    ]
    items = [dict(zip(names, row, strict=True)) for row in rows]
    write_csv(folder / "catalogue.csv", items)
    write_parquet(folder / "people.parquet", {"uid": pa.array(["anna", "nobody"]), "country": pa.array(["DE", None])})


def typed(values: dict[str, list[Any]]) -> dict[str, pa.Array]:
    """The columns of a Parquet log as pandas would write them: nanoseconds without zone, counts, lists."""
    types = {
        "line": pa.timestamp("ns"),
        "watch": pa.float64(),
        "length": pa.int32(),
        "stars": pa.float32(),
        "clicked": pa.bool_(),
        "hearts": pa.int64(),
        "lp": pa.list_(pa.float32()),
    }
    return {name: pa.array(column, types.get(name, pa.string())) for name, column in values.items()}


def parquet_rows() -> dict[str, list[Any]]:
    """Three rows: the first of `ROWS` on another day, one with a NaN, one with nulls where the source may have them."""
    noon = datetime.datetime(2026, 1, 3, 12, 30, 0, 5)
    return {
        "uid": ["anna", "anna", "bob"],
        "raw": ["7", "9", "10"],
        "line": [noon, noon, noon],
        "req": ["r1", "r1", None],
        "page": ["home", None, None],
        "watch": [1500.4, float("nan"), None],
        "length": [0, 5, None],
        "stars": [4.5, 1, None],
        "clicked": [True, True, None],
        "hearts": [3, 0, None],
        "lp": [[-0.5, -1.25], None, None],
        "cb": ["c1", None, None],
        "who": ["m/1", None, None],
    }
