"""Own data by a column mapping: every row is kept or refused with its reason, whatever the format it comes in."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import Row
from pyspark.sql import functions as F

from jobs import tables
from jobs.ingest import ingest
from jobs.ingest_plan import OUTPUTS, IngestReport, done
from schemas.config import Config
from schemas.errors import ConfigError, ContractViolation
from schemas.lake import Lake
from schemas.source import LogColumns, LogMapping, SourceConfig
from tests.jobs import own_data as own

UTC = datetime.UTC


@pytest.fixture(scope="module")
def made(spark, tmp_path_factory) -> Iterator[tuple[Path, Lake, Config, IngestReport]]:
    """Two text files with the same bytes and one Parquet file, in folders, of one log; catalogues beside them."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("events_1.csv", "late/events_1.csv"):
        own.write_csv(folder / name, own.ROWS)
    own.write_parquet(folder / "late + new/events.parquet/part-0.parquet", own.typed(own.parquet_rows()))
    own.write_catalogues(folder)
    lake, config = Lake(str(folder / "lake")), own.config_of(folder)
    yield folder, lake, config, ingest(spark, lake, config)


def test_every_row_is_kept_or_refused_with_its_reason(spark, made):
    _, lake, config, report = made
    kept = len(own.CHANGES) - len(own.REASONS)
    assert report.rows == {
        "read": 2 * len(own.CHANGES) + 3,
        "kept": kept + 2,
        "duplicates": kept,  # the same bytes under a second name
        "rejected": 2 * len(own.REASONS) + 1,  # of the log
        "outside_range": 0,
    }
    assert report == done(lake, config)
    found = {(r.source_file, r.row_number): r for r in tables.read(spark, lake, "rejected_rows").collect()}
    for name in ("events_1.csv", "late/events_1.csv"):
        assert {n: r.reason for (file, n), r in found.items() if file == name} == own.REASONS
    nan = found["late + new/events.parquet/part-0.parquet", 2]
    assert nan.reason == "watch is not a number"
    assert json.loads(nan.raw)["watch"] == "NaN" and json.loads(nan.raw)["uid"] == "anna"
    assert found["catalogue.csv", 3].reason == "vec is not a list of numbers" and len(found) == 2 * len(own.REASONS) + 2


def vectors_of(item: Row) -> dict[str, list[float]]:
    return {vector.name: vector["values"] for vector in item.vectors}


def test_values_mean_the_same_in_both_formats(spark, made):
    _, lake, _, _ = made
    users = {r.source_id or str(r.user_id): r for r in tables.read(spark, lake, "users").collect()}
    items = {r.source_id or str(r.item_id): r for r in tables.read(spark, lake, "items").collect()}
    assert set(users) == {"anna", "nobody", "12", "007", "bob"} and users["12"].user_id == 12
    assert all(row.user_id >= 0 for row in users.values())
    assert set(items) == {"7", "shoe, red", "8", *(str(100 + place) for place in (1, 2, 3, 5)), "10", "100"} - {"bad"}
    assert users["anna"].attributes == ["country=DE"] and users["nobody"].attributes == users["bob"].attributes == []
    boots, pumps = items["7"], items["shoe, red"]
    assert (
        boots.title == 'Boots "Alp", brown'
        and boots.tags == ["shoes", "winter"]
        and vectors_of(boots) == {"vec": [0.5, 1.0], "sound": [1, 2, 3]}
    )
    assert boots.attributes == ["colour=brown"] and boots.withdrawn is None and pumps.vectors is None
    assert pumps.withdrawn == datetime.date(2026, 3, 1) and pumps.tags == []

    rows = tables.read(spark, lake, "impressions").withColumn("us", F.unix_micros("ts")).collect()
    by_key = {(r.user_id, r.item_id, r.us): r for r in rows}
    noon = micros(2026, 1, 2, 12)
    text = by_key[users["anna"].user_id, 100, noon]
    typed = by_key[users["anna"].user_id, 7, micros(2026, 1, 3, 11, 30) + 5]  # half past noon in Berlin
    for row in (text, typed):
        assert (row.scene, row.play_ms, row.duration_ms, row.rating) == ("home", 1500, None, 4.5)
        assert (row.click, row.like, row.hate) == (True, True, None)
        assert row.behaviour_log_probs == [-0.5, -1.25]
        assert (row.behaviour_codebook, row.behaviour_policy) == ("c1", "m/1")
    plain = by_key[12, 102, noon]
    assert (plain.click, plain.like, plain.behaviour_log_probs, plain.behaviour_policy) == (False, False, None, None)
    empty = by_key[users["007"].user_id, 103, noon]
    assert (empty.click, empty.play_ms, empty.rating, empty.duration_ms) == (None, None, None, 90_000)
    assert by_key[users["anna"].user_id, pumps.item_id, noon].click is True
    local = by_key[users["anna"].user_id, 101, micros(2026, 1, 1, 22, 30)]
    assert local.date == datetime.date(2026, 1, 1)
    assert (users["anna"].user_id, 105, noon + 1) in by_key
    assert text.request_id == by_key[users["anna"].user_id, 8, noon].request_id
    assert len({text.request_id, local.request_id, typed.request_id, empty.request_id}) == 4


def micros(*when: int) -> int:
    return int(datetime.datetime(*when, tzinfo=UTC).timestamp()) * 1_000_000


def test_a_source_that_cannot_be_read_changes_no_table(spark, made):
    folder, lake, config, report = made
    versions = {name: lake.version(name) for name in OUTPUTS}
    rows = own.typed(own.parquet_rows())
    extra = folder / "events_9.parquet"

    def said(error: type[Exception], use: Config = config) -> str:
        with pytest.raises(error) as caught:
            ingest(spark, lake, use)
        assert {name: lake.version(name) for name in OUTPUTS} == versions and "\n" not in str(caught.value)
        return str(caught.value)

    own.write_parquet(extra, rows)
    extra.write_bytes(extra.read_bytes()[:-100])
    assert "events_9.parquet: not a complete Parquet file" in said(ContractViolation)
    own.write_parquet(extra, {"userid" if name == "uid" else name: column for name, column in rows.items()})
    assert "events_9.parquet: there is no column 'uid' (source.log.columns.user_id); the nearest" in said(ContractViolation)
    own.write_parquet(extra, rows | {"line": pa.array([1, 2, 3])})
    assert "is of type int64; set source.ts_unit to s, ms or us" in said(ContractViolation)
    own.write_parquet(extra, rows | {"lp": pa.array([True] * 3)})
    assert "'lp' (source.log.columns.behaviour_log_probs) is of type bool; it must be a list of numbers" in said(
        ContractViolation
    )
    extra.unlink()
    assert "holds no file nothing*" in said(ConfigError, own.config_of(folder, log="nothing*"))
    assert done(lake, config) == report


def test_two_ids_that_meet_are_refused(spark, made, tmp_path):
    _, before, _, _ = made
    shoe = tables.read(spark, before, "items").where("source_id = 'shoe, red'").first().item_id
    own.write_csv(tmp_path / "events.csv", [own.GOOD | {"raw": "shoe, red"}, own.GOOD | {"raw": str(shoe)}])
    lake = Lake(str(tmp_path / "lake"))
    with pytest.raises(ContractViolation, match=f"'shoe, red' and the integer {shoe}, have the same item_id {shoe}"):
        ingest(spark, lake, own.config_of(tmp_path, catalogues=False))
    assert lake.tables() == []


def test_numbers_with_a_unit_and_ids_by_choice(spark, lake, tmp_path):
    """Seconds as numbers in one file of each format; integers alone are ids, and floats that are whole."""
    columns = LogColumns(user_id="u", item_id="i", ts="t", play_ms="p")
    (tmp_path / "log.tsv").write_text(
        "u\ti\tt\tp\n1\t2\t1767225600.5\t1.5\n1\t4\t4133980799.999\t\nx\t2\t1767225600\t\n01\t2\t1767225600\t\n"
    )
    table = pa.table({"u": [1.0, 1.5], "i": pa.array([3, 3], pa.uint8()), "t": [1767225600, 1767225601], "p": [2, 700_000]})
    pq.write_table(table, tmp_path / "log.parquet")
    source = SourceConfig(
        kind="mapped",
        path=str(tmp_path),
        log=LogMapping(columns, "log.*"),
        ts_unit="s",
        duration_unit="s",
        ids="integer",
        future_days=None,
        separator="\t",
    )
    report = ingest(spark, lake, Config(source=source))
    rows = tables.read(spark, lake, "impressions").withColumn("ms", F.unix_millis("ts")).collect()
    assert {(r.user_id, r.item_id, r.ms, r.play_ms) for r in rows} == {
        (1, 2, 1767225600500, 1500),
        (1, 3, 1767225600000, 2000),
        (1, 4, 4133980799999, None),  # the last moment of all, as far as clocks are not asked
    }
    assert report.reasons == {"u is not an integer": 3}
