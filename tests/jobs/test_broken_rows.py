"""More than 10,000 generated rows, half of them broken, go through the real ingest: none is lost, invented or misread."""

from __future__ import annotations

import datetime
import gzip
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.ingest import ingest
from jobs.ingest_plan import IngestReport, remember
from schemas.config import Config
from schemas.lake import Lake
from schemas.source import LogMapping, SourceConfig
from tests.jobs import broken_formats as formats
from tests.jobs import raw_logs
from tests.jobs.broken_kuairand import KUAIRAND
from tests.jobs.broken_parquet import OWN_PARQUET, parquet_types
from tests.jobs.broken_rows import BEHAVIOUR, EPOCH, VALUES, Column, Expected, Format, Made, expected, text_rows

pytestmark = pytest.mark.long

SPLITS = "spark.sql.files.maxPartitionBytes"
Files = dict[str, tuple[Format, list[Made]]]


@dataclass(frozen=True)
class Case:
    lake: Lake
    report: IngestReport
    expected: Expected

    def rows(self, table: str) -> list[dict[str, Any]]:
        return self.lake.open(table).to_pyarrow_dataset().to_table().to_pylist()


def write_text(path: Path, columns: Sequence[Column], rows: list[Made], newline: bytes = b"\n", bom: bytes = b"") -> None:
    header = ",".join(column.name for column in columns).encode()
    data = bom + newline.join([header, *(row.line for row in rows)])
    data += newline if rows[-1].line == b"" or bom else b""  # the last row often ends without one
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def text_files(form: Format, folder: Path, prefix: str, rng: random.Random, rows: int) -> Files:
    """A file with a byte order mark, one with CRLF, a compressed one, and one with its own order of columns."""
    files: Files = {}
    shuffled = tuple(rng.sample(form.columns, len(form.columns)))
    for name, columns, newline, bom in (
        (f"{prefix}_1.csv", form.columns, b"\n", b"\xef\xbb\xbf"),
        (f"{prefix}_2.csv", form.columns, b"\r\n", b""),
        (f"{prefix}_3.csv.gz", form.columns, b"\n", b""),
        (f"{prefix}_4.csv", shuffled, b"\n", b""),
    ):
        earlier = [row for _, made in files.values() for row in made] if columns is form.columns else []
        files[name] = form, text_rows(form, columns, rng, rows, earlier)
        write_text(folder / name, columns, files[name][1], newline, bom)
    return files


def parquet_file(folder: Path, name: str, rng: random.Random, rows: int) -> Files:
    form, made = OWN_PARQUET, []
    for _ in range(rows):
        cells, reasons = form.row(rng)
        made.append(form.made({column: written for column, (written, _) in cells.items()}, cells, reasons))
    types = parquet_types()
    pq.write_table(pa.table({n: pa.array([row.line[n] for row in made], types[n]) for n in types}), folder / name)
    return {name: (form, made)}


def ingested(spark, folder: Path, source: SourceConfig, files: Files, form: Format) -> Case:
    """At the moment of the format, in splits so small that row numbers span many of them."""
    before = spark.conf.get(SPLITS)
    spark.conf.set(SPLITS, "100000")
    try:
        lake = Lake(str(folder / "lake"))
        source = replace(source, future_days=form.future_days)
        return Case(lake, ingest(spark, lake, Config(source=source), now=form.now), expected(files))
    finally:
        spark.conf.set(SPLITS, before)


@pytest.fixture(scope="module")
def own(spark, tmp_path_factory) -> Case:
    folder, rng = tmp_path_factory.mktemp("own"), random.Random(2026)
    files = text_files(formats.OWN_CSV, folder, "events", rng, 1_700) | parquet_file(folder, "events_5.parquet", rng, 700)
    source = SourceConfig(kind="mapped", path=str(folder), time_zone=formats.ZONE, log=LogMapping(formats.OWN, "events*"))
    return ingested(spark, folder, source, files, formats.OWN_CSV)


@pytest.fixture(scope="module")
def kuairand(spark, tmp_path_factory) -> Case:
    folder, rng = tmp_path_factory.mktemp("kuairand"), random.Random(7)
    files = text_files(KUAIRAND, folder, "log", rng, 900)
    raw_logs.write_catalogue(folder, [], [])
    return ingested(spark, folder, SourceConfig(path=str(folder), last_day=KUAIRAND.last), files, KUAIRAND)


@pytest.fixture(params=["own", "kuairand"])
def case(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)


def test_no_row_is_lost_or_invented(case):
    want = case.expected
    assert case.report.rows == {
        "read": sum(counts["read"] for counts in want.files.values()),
        "kept": len(want.kept),
        "duplicates": want.duplicates,
        "rejected": len(want.rejected),
        "outside_range": sum(counts["outside"] for counts in want.files.values()),
    }
    for entry in (entry for entry in remember(case.lake).files if entry["role"] == "log"):
        facts = entry["facts"]
        found = Counter(read=facts["read"], outside=facts["outside"], usable=sum(facts["accepted"].values()))
        found["rejected"] = sum(n for reasons in facts["rejected"].values() for n in reasons.values())
        assert +found == want.files[entry["name"]], entry["name"]


def test_every_rejected_row_has_its_reason_its_text_and_its_number(case):
    found = {(row["source_file"], row["row_number"]): row for row in case.rows("rejected_rows")}
    assert found.keys() == case.expected.rejected.keys()
    for place, (reasons, line, dates) in case.expected.rejected.items():
        row = found[place]
        assert row["reason"] in reasons and row["date"] in dates, (place, row["reason"], reasons, row["date"], dates)
        if isinstance(line, bytes):
            assert row["raw"] == line.decode("utf-8", errors="replace"), place
        else:
            assert_same_cells(json.loads(row["raw"]), line)


def assert_same_cells(found: dict[str, Any], line: dict[str, Any]) -> None:
    exact = ("sku", "at", "req", "page", "length", "clicked", "hearts", "cb")
    assert found.keys() == line.keys() and {n: found[n] for n in exact} == {n: line[n] for n in exact}


def test_every_good_row_is_kept_with_its_values(case):
    """An id that is text is known by its original."""
    names = {
        key: {row[key]: row["source_id"] or row[key] for row in case.rows(table)}
        for table, key in (("users", "user_id"), ("items", "item_id"))
    }
    found, requests = {}, {}
    for row in case.rows("impressions"):
        time_us = (row["ts"] - EPOCH) // datetime.timedelta(microseconds=1)
        key = names["user_id"][row["user_id"]], names["item_id"][row["item_id"]], time_us
        logged = None if row["behaviour_log_probs"] is None else tuple(row["behaviour_log_probs"])
        values = (row["date"], *(row[name] for name in VALUES), logged, *(row[name] for name in BEHAVIOUR[1:]))
        assert found.setdefault((key, row["request_id"]), values) is values
        requests.setdefault(row["request_id"], set()).add(key)
    by_key = Counter((key, values) for (key, _), values in found.items())
    assert by_key == Counter((key[:3], values) for key, values in case.expected.kept.items())
    want: dict[tuple, set[tuple]] = {}
    for (user, item, time_us, request), values in case.expected.kept.items():
        shown_at = time_us if request is None else (values[0], request)
        want.setdefault((user, shown_at), set()).add((user, item, time_us))
    assert Counter(map(frozenset, requests.values())) == Counter(map(frozenset, want.values()))


def test_the_rows_hold_every_kind_of_breakage(own, kuairand):
    """A generator that breaks nothing would pass the tests above."""
    assert own.report.rows["read"] + kuairand.report.rows["read"] > 10_000
    for case in (own, kuairand):
        assert case.report.rows["rejected"] > case.report.rows["read"] / 3 and case.expected.conflicts > 20
        assert case.report.rows["duplicates"] > 50 and len(case.report.reasons) > 15
    assert own.report.reasons["at is in the future"] > 100 and kuairand.report.reasons["time_ms is in the future"] > 50
    assert kuairand.report.rows["outside_range"] > 5
