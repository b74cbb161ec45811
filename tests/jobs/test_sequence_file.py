"""One-user-a-line sequences: positions as times, broken lines aside."""

from __future__ import annotations

import datetime

import pytest

from jobs import tables
from jobs.ingest import ingest
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.source import SourceConfig

LINES = ["1 10 11 10", "2 11", "3", "", "4 x 5", "5 -1", "6 99999999999999999999", "7 8\t9  ", "2 11 12"]


def source(path) -> Config:
    return Config(source=SourceConfig(kind="sequences", path=str(path)))


def test_lines_become_events_and_broken_lines_are_rejected(spark, lake, tmp_path):
    (tmp_path / "log.txt").write_text("\n".join([*LINES, "8 " + "1 " * 86_401]))
    before_the_epoch = datetime.datetime(1960, 1, 1, tzinfo=datetime.UTC)  # made-up times are in no future
    report = ingest(spark, lake, source(tmp_path), now=before_the_epoch)
    rows = tables.read(spark, lake, "impressions").collect()
    found = sorted((r.user_id, r.ts.replace(tzinfo=datetime.UTC).timestamp(), r.item_id) for r in rows)
    assert found == [(1, 0, 10), (1, 1, 11), (1, 2, 10), (2, 0, 11), (2, 1, 12), (7, 0, 8), (7, 1, 9)]
    assert all(r.click is True and r.like is None and r.play_ms is None and r.duration_ms is None for r in rows)
    assert report.days == (datetime.date(1970, 1, 1),)
    assert report.rows == {"read": 14, "kept": 7, "duplicates": 1, "rejected": 6, "outside_range": 0}
    rejected = {r.row_number: r.reason for r in tables.read(spark, lake, "rejected_rows").collect()}
    assert rejected == {
        3: "no items",
        4: "empty line",
        5: "an id is not an integer",
        6: "an id is negative",
        7: "an id is out of range",
        10: "more than 86400 items",
    }
    assert {r.item_id for r in tables.read(spark, lake, "items").collect()} == {8, 9, 10, 11, 12}
    assert [r.attributes for r in tables.read(spark, lake, "users").collect()] == [[]] * 3


def test_a_folder_with_two_files_is_refused(spark, lake, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("1 2\n")
    with pytest.raises(ConfigError, match=r"holds 2 \.txt files"):
        ingest(spark, lake, source(tmp_path))


@pytest.mark.data
@pytest.mark.long
def test_beauty(spark, lake, data_folder):
    report = ingest(spark, lake, source(data_folder / "amazon_beauty" / "Beauty.txt"))
    assert report.rows == {"read": 198_502, "kept": 198_502, "duplicates": 0, "rejected": 0, "outside_range": 0}
    assert report.rows_by_table["users"] == 22_363 and report.rows_by_table["items"] == 12_101
