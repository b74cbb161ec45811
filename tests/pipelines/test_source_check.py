"""What `lazyrec check` says of a source before anything runs, and that it reads values as ingest does."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import functions as F

from jobs.bounds import ROUNDING
from jobs.mapped_values import Input, day, flag, floats, identifier, milliseconds, moment, number
from jobs.mapping import Cell
from pipelines.cli import main
from pipelines.source_check import Finding, check
from pipelines.source_sample import value_of
from schemas.config import Config
from schemas.errors import EXIT_DONE, EXIT_USAGE
from schemas.source import SourceConfig
from tests.jobs import own_data as own
from tests.jobs import raw_logs as raw

TEXTS = ["0", "7", "007", "-3", "1.5", "1e3", "NaN", "inf", "-inf", "x", "true", "No", "9223372036854775808", "1 2", "1 x"]
TEXTS += ["[0.5, -1]", "2026-01-01", "2026-01-01T10:00:00Z", "2026-01-01 10:00:00.5 UTC", "2026-02-30", "12:30:00", "2026"]
TEXTS += ["2026-01-01T10:00:00+01:00", "1767225600", "700000000", "-0.25 -1"]


def findings(config: Config, level: str) -> list[str]:
    return [finding.text for finding in check(config) if finding.level == level]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own.write_csv(tmp_path / "events_1.csv", [own.GOOD | {"raw": str(n)} for n in range(20)])
    own.write_catalogues(tmp_path)
    return tmp_path


def test_a_source_that_serves_has_no_errors_and_tells_its_days(folder: Path) -> None:
    found = list(check(own.config_of(folder)))
    assert [f for f in found if f.level == "error"] == []
    assert Finding("note", "log: 1 file(s), 20 rows looked at, 1 day(s) from 2026-01-02 to 2026-01-02") in found
    unread = "column 'vec' (source.items.vectors): 1 of 2 values cannot be read, '0.5 one' is one"
    assert Finding("warning", unread) in found


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"raw": ""}, "error", "column 'raw' (source.log.columns.item_id) is empty in all of 20 rows"),
        (
            {"line": "1767225600"},
            "error",
            "'1767225600' is one; source.ts_unit: s gives 2026-01-01",
        ),
        ({"line": "2206-01-01"}, "error", "the times lie in the year 2206"),
        ({"clicked": "0"}, "warning", "column 'clicked' (source.log.columns.click) is never true in 20 rows"),
        (
            {"watch": "-5"},
            "error",
            "(source.log.columns.play_ms): 20 of 20 values cannot be read, '-5' is one",
        ),
        ({"page": ""}, "warning", "column 'page' (source.log.columns.scene) is empty"),
        ({"raw": "sku"}, "warning", "item ids of the log are text and of the catalogue integers"),
    ],
)
def test_what_is_wrong_is_said_with_the_key(folder: Path, change: dict[str, str], level: str, words: str) -> None:
    own.write_csv(folder / "events_1.csv", [own.GOOD | change] * 20)
    own.write_csv(folder / "catalogue.csv", [dict.fromkeys(("sku", "name", "kind", "vec", "sound", "gone", "colour"), "1")])
    assert any(words in text for text in findings(own.config_of(folder), level))


def test_times_in_the_future_are_told(folder: Path) -> None:
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    for times, level in ((["2026-01-02", "2026-01-09"], "warning"), (["2026-01-04", "2026-01-09"], "error")):
        own.write_csv(folder / "events_1.csv", [own.GOOD | {"line": time} for time in times])
        found = [f for f in check(own.config_of(folder), now) if "lie in the future (source.future_days)" in f.text]
        assert [f.level for f in found] == [level]
        for days in (7, None):
            assert "future" not in str(list(check(own.config_of(folder, future_days=days), now)))


def test_files_are_looked_at_before_their_rows(folder: Path) -> None:
    own.write_csv(folder / "again/events_1.csv", [own.GOOD | {"raw": str(n)} for n in range(20)])
    assert any("hold the same bytes" in text for text in findings(own.config_of(folder), "warning"))
    own.write_csv(folder / "named.csv", [{("userid" if name == "uid" else name): cell for name, cell in own.GOOD.items()}])
    (sentence,) = findings(own.config_of(folder, "named*"), "error")
    assert "named.csv: there is no column 'uid' (source.log.columns.user_id); the nearest are 'userid'" in sentence
    own.write_csv(folder / "events_2.csv", [own.GOOD], separator=";")
    assert any("set source.separator" in text for text in findings(own.config_of(folder, "events_2*"), "error"))
    (folder / "events_3.parquet").write_bytes(b"no parquet")
    assert any("not a complete Parquet" in text for text in findings(own.config_of(folder, "events_3*"), "error"))
    assert any("holds no file x*" in text for text in findings(own.config_of(folder, "x*"), "error"))
    assert any("is no zone" in text for text in findings(Config(source=SourceConfig(path="x", time_zone="Mars")), "error"))


def test_a_number_without_a_unit_in_parquet(folder: Path) -> None:
    own.write_parquet(folder / "events_1.parquet", own.typed(own.parquet_rows()) | {"line": pa.array([1, 2, 3])})
    (sentence,) = findings(own.config_of(folder, "events_1.parquet"), "error")
    assert "column 'line' (source.log.columns.ts) is of type int64; set source.ts_unit to s, ms or us" in sentence
    assert any(
        "in the year 1970" in text for text in findings(own.config_of(folder, "events_1.parquet", ts_unit="s"), "error")
    )


def test_every_kind_of_source_is_checked(tmp_path: Path) -> None:
    raw.write(tmp_path / "log_a.csv", raw.COLUMNS.replace("tab", "page"), [])
    raw.write_catalogue(tmp_path, [], [])
    kuairand = Config(source=SourceConfig(path=str(tmp_path)))
    assert any("log_a.csv: there is no column 'tab'" in text for text in findings(kuairand, "error"))
    (tmp_path / "seq.txt").write_text("1 2 3\n4 x\n")
    sequences = Config(source=SourceConfig(kind="sequences", path=str(tmp_path)))
    assert findings(sequences, "warning") == ["seq.txt: 1 of 2 lines are refused, '4 x' is one"]
    movielens = Config(source=SourceConfig(kind="movielens", path=str(tmp_path)))
    assert any("holds no file ratings.csv" in text for text in findings(movielens, "error"))


def test_the_command_ends_with_0_or_2_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "own.yaml"
    config.write_text(
        f"lake: {folder}/lake\nsource:\n  kind: mapped\n  path: {folder}\n"
        "  log: {files: 'events*', columns: {user_id: uid, item_id: raw, ts: line, click: clicked}}\n"
    )
    assert main(["check", "--config", str(config)]) == EXIT_DONE
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["status"] == "done" and printed[0].startswith("note:    log: 1 file(s)")
    assert main(["check", "--config", str(config), "--set", "source.log.columns.ts=time"]) == EXIT_USAGE
    failed = capsys.readouterr()
    assert "lazyrec: The source cannot be read as configured" in failed.err and "'line'" in failed.err
    assert not (folder / "lake").exists()


def test_the_check_reads_a_value_as_ingest_does(spark: Any) -> None:
    """Every kind of field over every text: refused by both, or read by both."""
    fields = ("user_id", "ts", "play_ms", "rating", "click", "vector image", "behaviour_log_probs", "upload_date")
    frame = spark.createDataFrame([(text,) for text in TEXTS], "text string")
    for unit, ids in (("auto", "auto"), ("s", "integer")):
        source = SourceConfig(ts_unit=unit, ids=ids)
        cells = {name: Cell(name, "text", pa.string()) for name in fields}
        given = {name: Input(cell, F.col("text"), frame.schema["text"].dataType) for name, cell in cells.items()}
        values = {
            "user_id": identifier(given["user_id"], ids),
            "ts": moment(given["ts"], source),
            "play_ms": milliseconds(given["play_ms"], "ms"),
            "rating": number(given["rating"]),
            "click": flag(given["click"]),
            "vector image": floats(given["vector image"]),
            "behaviour_log_probs": floats(given["behaviour_log_probs"], ROUNDING),
            "upload_date": day(given["upload_date"], source),
        }
        columns = [value.fault.cast("string").alias(name) for name, value in values.items()]
        rows = frame.select("text", *columns, F.unix_micros(values["ts"].column).alias("us")).collect()
        for row in rows:
            for name in fields:
                read = value_of(cells[name], row["text"], source)
                in_range = name != "ts" or read is None or 1970 < read.year <= 2100
                refused = read is None or not in_range
                assert refused == (row[name] is not None), (unit, name, row["text"], row[name], read)
            when = value_of(cells["ts"], row["text"], source)
            if row["us"] is not None:
                assert row["us"] == round(when.timestamp() * 1e6)
