"""Ingest against a brute-force reading of the same files; reruns, corrections, nights one by one."""

from __future__ import annotations

import dataclasses
import datetime
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import functions as F

from jobs import tables
from jobs.ingest import ingest
from jobs.ingest_plan import OUTPUTS, done
from jobs.log_rows import with_ids
from schemas.config import Config
from schemas.errors import ConfigError, ContractViolation, MissingUpstream
from schemas.lake import Lake
from schemas.source import SourceConfig
from tests.jobs import raw_logs as raw

DAY = datetime.timedelta(days=1)
DAYS = [raw.FIRST + n * DAY for n in range(3)]
USERS = ['0,full_active,12,"(10,50]",1.0', "1,UNKNOWN,3,-124,"]
VIDEOS = [
    '0,77,NORMAL,2026-01-01,Web,0.0,31000.0,1,1,5,9.0,"39,68"',
    "1,78,AD,2026-01-02,UNKNOWN,-124,0,1,1,5,,",
    "2,79,NORMAL,2026-01-09,Web,0.0,,1,1,5,4.0,7",
]


def config_of(folder: Path, **settings) -> Config:
    return Config(source=SourceConfig(path=str(folder), **settings))


def read(spark, lake: Lake, name: str) -> list[dict]:
    return [row.asDict() for row in tables.read(spark, lake, name).collect()]


def impressions(spark, lake: Lake) -> dict[tuple, tuple]:
    """As `Expected.kept`, read back from the table."""
    flags = ("click", "long_view", "like", "follow", "comment", "forward", "profile_enter", "hate")
    rows = tables.read(spark, lake, "impressions").withColumn("ms", F.unix_millis("ts")).collect()
    found = {
        (r.user_id, r.item_id, r.ms): (r.date, r.scene, r.duration_ms, r.play_ms, *(r[flag] for flag in flags))
        for r in rows
    }
    assert len(found) == len(rows)
    return found


def rejected(spark, lake: Lake) -> dict[tuple, tuple]:
    return {
        (r["source_file"], r["row_number"]): (r["reason"], r["raw"], r["date"]) for r in read(spark, lake, "rejected_rows")
    }


def assert_same(spark, name: str, left: Lake, right: Lake) -> None:
    """Equal rows, in any order."""
    rows = [sorted(map(str, tables.read(spark, lake, name).collect())) for lake in (left, right)]
    assert rows[0] == rows[1], name


@dataclasses.dataclass
class Case:
    folder: Path
    lines: dict[str, list[str]]
    lake: Lake
    config: Config

    def write(self, suffix: str = "") -> None:
        for name, lines in self.lines.items():
            raw.write(self.folder / f"{name}{suffix}", raw.COLUMNS, lines)
        raw.write_catalogue(self.folder, USERS, VIDEOS, suffix)

    def expected(self, suffix: str = "") -> raw.Expected:
        return raw.reference({name + suffix: lines for name, lines in self.lines.items()})


def make_case(folder: Path, lake: Path) -> Case:
    """Three days in three files; the first file holds rows of the second day too, as late logs do."""
    rng = random.Random(11)
    folder.mkdir()
    lines = {f"log_{day}.csv": raw.lines_of_day(rng, day, 60) for day in range(3)}
    lines["log_0.csv"] += [",".join(raw.row(rng, 1)) for _ in range(10)]
    return Case(folder, lines, Lake(str(lake)), config_of(folder))


@pytest.fixture(scope="module")
def case(spark, tmp_path_factory) -> Iterator[Case]:
    """Plain files in blocks of 1,500 bytes, so that row numbers span many of Spark's splits."""
    root = tmp_path_factory.mktemp("ingest")
    made = make_case(root / "logs [1] a+b", root / "lake")
    made.write()
    key = "spark.sql.files.maxPartitionBytes"
    before = spark.conf.get(key)
    spark.conf.set(key, "1500")
    report = ingest(spark, made.lake, made.config)
    spark.conf.set(key, before)
    assert report == done(made.lake, made.config)
    yield made


def test_every_row_is_where_brute_force_puts_it(spark, case):
    expected = case.expected()
    assert len(expected.kept) > 100 and expected.duplicates > 30
    assert {reason for _, _, reason in raw.BREAKS} < set(expected.reasons())
    assert impressions(spark, case.lake) == expected.kept
    assert rejected(spark, case.lake) == expected.rejected


def test_counts_reconcile(case):
    report, expected = done(case.lake, case.config), case.expected()
    assert report.rows == {
        "read": expected.read,
        "kept": len(expected.kept),
        "duplicates": expected.duplicates,
        "rejected": len(expected.rejected),
        "outside_range": 0,
    }
    assert report.reasons == dict(expected.reasons())
    assert report.days == tuple(DAYS)
    assert report.rows_by_table["impressions"] == len(expected.kept)


def test_impressions_of_a_user_at_one_time_share_the_request(spark, case):
    rows = read(spark, case.lake, "impressions")
    by_request = {row["request_id"]: (row["user_id"], row["ts"]) for row in rows}
    assert {(row["user_id"], row["ts"]) for row in rows} == set(by_request.values())
    assert len(by_request) == len(set(by_request.values()))
    assert all(by_request[row["request_id"]] == (row["user_id"], row["ts"]) for row in rows)
    assert len({row["impression_id"] for row in rows}) == len(rows)


def test_catalogues_hold_from_the_first_day_and_miss_nothing_shown(spark, case):
    items = {row["item_id"]: row for row in read(spark, case.lake, "items")}
    users = {row["user_id"]: row for row in read(spark, case.lake, "users")}
    assert set(items) == set(range(5)) and set(users) == set(range(6))
    assert items[0]["tags"] == ["39", "68"] and items[0]["duration_ms"] == 31000 and items[0]["author_id"] == 77
    assert items[0]["attributes"] == ["video_type=NORMAL", "upload_type=Web", "music_type=9", "visible_status=0"]
    assert items[1]["tags"] == [] and items[1]["duration_ms"] is None and items[1]["attributes"] == ["video_type=AD"]
    assert users[0]["attributes"] == ["user_active_degree=full_active", "follow_user_num_range=(10,50]", "onehot_feat0=1"]
    assert users[1]["attributes"] == []
    shown = {}
    for user, item, ms in case.expected().kept:
        day = datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).date()
        shown["item", item] = min(day, shown.get(("item", item), day))
        shown["user", user] = min(day, shown.get(("user", user), day))
    for item in (3, 4):
        assert items[item]["date"] == shown["item", item] and items[item]["tags"] == items[item]["attributes"] == []
    assert {items[item]["date"] for item in (0, 1, 2)} == {DAYS[0]}
    assert {user: users[user]["date"] for user in range(2, 6)} == {user: shown["user", user] for user in range(2, 6)}


def test_the_same_files_again_write_nothing(spark, case):
    versions = {name: case.lake.version(name) for name in OUTPUTS}
    report = ingest(spark, case.lake, case.config)
    assert report.tables == versions == {name: case.lake.version(name) for name in OUTPUTS}
    touched = case.folder / "log_1.csv"
    touched.touch()  # the time changes and the content does not
    assert done(case.lake, case.config) == report


def test_another_setting_or_file_is_not_done(case):
    assert done(case.lake, config_of(case.folder, time_zone="Asia/Shanghai")) is None
    assert done(case.lake, config_of(case.folder, request_gap_ms=500)) is None
    extra = case.folder / "log_9.csv"
    raw.write(extra, raw.COLUMNS, [])
    assert done(case.lake, case.config) is None
    extra.unlink()
    assert done(case.lake, case.config) is not None


@pytest.mark.long
def test_gzip_gives_the_same_rows_and_upload_days_date_the_items(spark, case, tmp_path):
    other = make_case(tmp_path / "gz", tmp_path / "lake")
    other.write(".gz")
    late = ["90,1,NORMAL,2026-01-02,Web,0.0,5,1,1,5,4.0,7", "91,1,NORMAL,2026-02-02,Web,0.0,5,1,1,5,4.0,7"]
    raw.write_catalogue(other.folder, USERS, [*VIDEOS, *late], ".gz")
    report = ingest(spark, other.lake, config_of(other.folder, items_dated_by="upload"))
    assert report.rows == done(case.lake, case.config).rows
    assert rejected(spark, other.lake) == other.expected(".gz").rejected
    for name in ("impressions", "users"):
        assert_same(spark, name, case.lake, other.lake)
    shown: dict[int, datetime.date] = {}
    for (_, item, _), values in other.expected().kept.items():
        shown[item] = min(values[0], shown.get(item, values[0]))
    dates = {row["item_id"]: row["date"] for row in read(spark, other.lake, "items")}
    uploads = {0: DAYS[0], 1: DAYS[1], 2: datetime.date(2026, 1, 9), 90: DAYS[1]}
    expected = {item: min(day, shown.get(item, day)) for item, day in uploads.items()}
    assert dates == shown | expected  # 91 appears after the log


@pytest.mark.long  # tests/jobs/test_daily.py shows the same of what comes after
def test_nights_one_by_one_equal_one_pass_and_a_correction_moves_its_day_alone(spark, case, tmp_path):
    """The second night brings rows of the first one's last day too; then the last file is corrected."""
    nightly = make_case(tmp_path / "nightly", tmp_path / "lake")
    raw.write_catalogue(nightly.folder, USERS, VIDEOS)
    for names, days in ((["log_0.csv"], 2), (["log_1.csv", "log_2.csv"], 3)):
        for name in names:
            raw.write(nightly.folder / name, raw.COLUMNS, nightly.lines[name])
        assert ingest(spark, nightly.lake, nightly.config).days == tuple(DAYS[:days])
    for name in OUTPUTS:
        assert_same(spark, name, case.lake, nightly.lake)
        assert case.lake.identities(name) == nightly.lake.identities(name)

    nightly.lines["log_2.csv"].pop(0)
    nightly.write()
    ingest(spark, nightly.lake, nightly.config)
    for name in OUTPUTS:
        before, after = case.lake.identities(name), nightly.lake.identities(name)
        changed = {day for day in before if before[day] != after[day]}
        assert changed == {DAYS[2]} if name in ("impressions", "rejected_rows") else changed <= {DAYS[2]}
    assert impressions(spark, nightly.lake) == nightly.expected().kept

    nightly.lines["log_1.csv"].pop(0)
    nightly.write()
    ingest(spark, nightly.lake, nightly.config, days=DAYS[2:])
    assert done(nightly.lake, nightly.config, DAYS[2:]) is not None
    assert done(nightly.lake, nightly.config) is None  # a pass over another day leaves the corrected one stale


@pytest.mark.long
def test_a_time_in_the_future_makes_no_day_and_stays_refused_until_forced(spark, lake, tmp_path):
    """A file with the edges of the rule, one that holds the future alone, and a late one, for which the first is read again
    when all of its times have come."""
    now = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
    then, latest, config = now + 3653 * DAY, now + DAY, config_of(tmp_path)
    lines = [line_at(when) for when in (now - DAY, now, latest, latest + datetime.timedelta(milliseconds=1), then)]
    raw.write_catalogue(tmp_path, USERS, VIDEOS)
    raw.write(tmp_path / "log_b.csv", raw.COLUMNS, [line_at(then)])
    with pytest.raises(ContractViolation, match=r"time_ms is in the future\); check this machine's clock"):
        ingest(spark, lake, config, now=now)
    raw.write(tmp_path / "log_a.csv", raw.COLUMNS, lines)
    refused = {("log_a.csv", 4): lines[3], ("log_a.csv", 5): lines[4], ("log_b.csv", 1): lines[4]}
    expected = {place: ("time_ms is in the future", line, DAYS[0]) for place, line in refused.items()}

    report = ingest(spark, lake, config, now=now)
    assert report.days == tuple(DAYS) and report.reasons == {"time_ms is in the future": 3}
    assert report.rows == {"read": 6, "kept": 3, "duplicates": 0, "rejected": 3, "outside_range": 0}
    assert rejected(spark, lake) == expected

    raw.write(tmp_path / "log_c.csv", raw.COLUMNS, [line_at(now - DAY - datetime.timedelta(hours=1))])
    report = ingest(spark, lake, config, now=then)
    assert report.rows == {"read": 7, "kept": 4, "duplicates": 0, "rejected": 3, "outside_range": 0}
    assert rejected(spark, lake) == expected and report.days == tuple(DAYS)

    report = ingest(spark, lake, config, force=True, now=then)
    assert report.rows == {"read": 7, "kept": 6, "duplicates": 1, "rejected": 0, "outside_range": 0}
    assert report.days == (*DAYS, then.date()) and rejected(spark, lake) == {} and done(lake, config) == report
    versions = {name: lake.version(name) for name in OUTPUTS}
    # By other settings too the moment of the first reading counts, and the same rows leave nothing stale.
    assert ingest(spark, lake, config_of(tmp_path, future_days=0), now=now) == report
    assert {name: lake.version(name) for name in OUTPUTS} == versions


def line_at(when: datetime.datetime) -> str:
    cells = raw.row(random.Random(0), 0)
    cells[raw.NAMES.index("time_ms")] = str(round(when.timestamp() * 1000))
    return ",".join(cells)


@pytest.mark.long
def test_one_day_writes_no_other_and_a_changed_snapshot_holds_from_its_night(spark, tmp_path):
    case = make_case(tmp_path / "logs", tmp_path / "lake")
    case.write()
    config = config_of(case.folder, last_day=DAYS[1])
    with pytest.raises(MissingUpstream, match="2026-01-03 is newer than the log"):
        ingest(spark, case.lake, config, days=DAYS[2:])
    first = ingest(spark, case.lake, config, days=DAYS[:1])
    assert first.days == (DAYS[0],) and set(case.lake.identities("impressions")) == {DAYS[0]}
    assert first.rows["read"] == len(case.lines["log_0.csv"])
    usable = [raw.parse(line) for line in case.lines["log_0.csv"]]
    assert first.rows["outside_range"] == sum(date == DAYS[1] for reason, date, _, _ in usable if reason is None)
    raw.write_catalogue(case.folder, USERS, [VIDEOS[0].replace("77,NORMAL", "77,AD"), *VIDEOS[1:], "0,1,broken"])
    second = ingest(spark, case.lake, config)
    assert second.rows["outside_range"] == len(case.lines["log_2.csv"])  # its undated rows too
    items = [(row["item_id"], row["date"]) for row in read(spark, case.lake, "items") if row["item_id"] < 3]
    assert sorted(items) == [(0, DAYS[0]), (0, DAYS[1]), (1, DAYS[0]), (2, DAYS[0])]
    assert rejected(spark, case.lake)["video_features_basic_x.csv", 4] == ("wrong number of columns", "0,1,broken", DAYS[1])
    assert set(case.lake.identities("users")) == set(DAYS[:2])


def test_a_request_is_a_chain_of_close_times_within_a_day(spark):
    rng = random.Random(3)
    times = sorted({(rng.randrange(3), raw.FIRST_MS + rng.randrange(2 * raw.DAY_MS) // 4000 * 4000) for _ in range(400)})
    times += [(user, ms + rng.choice([500, 1000, 1001])) for user, ms in times]
    rows = spark.createDataFrame(times, "user_id bigint, ms bigint").withColumn("ts", F.timestamp_millis("ms"))
    rows = rows.withColumns({"date": F.to_date("ts"), "item_id": F.lit(1).cast("bigint")})
    found = {(r.user_id, r.ms): r.request_id for r in with_ids(rows, 1000).collect()}
    expected, last, start = {}, None, 0
    for user, ms in sorted(times):
        chained = last and last[0] == user and ms - last[1] <= 1000 and ms // raw.DAY_MS == last[1] // raw.DAY_MS
        start = start if chained else ms
        expected[user, ms], last = (user, start), (user, ms)
    pairs = {(found[key], expected[key]) for key in expected}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) < len(times)


def test_a_table_refuses_a_negative_id(spark, case):
    rows = tables.read(spark, case.lake, "impressions").limit(1).withColumn("user_id", F.lit(-1).cast("bigint"))
    day = rows.first()["date"]
    version = case.lake.version("impressions")
    with pytest.raises(ContractViolation, match="ids_not_negative"):
        tables.replace_days(case.lake, "impressions", rows.where(F.col("date") == day), {day: "forged"})
    assert case.lake.version("impressions") == version


def folder_with(tmp_path: Path, header: str = raw.COLUMNS, lines: tuple[str, ...] = ()) -> Path:
    raw.write(tmp_path / "log_a.csv", header, list(lines))
    raw.write_catalogue(tmp_path, USERS, VIDEOS)
    return tmp_path


def refusal(spark, folder: Path, lake: Lake, error: type[Exception], **settings) -> str:
    with pytest.raises(error) as caught:
        ingest(spark, lake, config_of(folder, **settings))
    assert "\n" not in str(caught.value)
    assert not lake.exists("impressions")
    return str(caught.value)


def test_unusable_sources_are_one_sentence_each(spark, lake, tmp_path):
    def said(name: str, error: type[Exception] = ContractViolation, **settings) -> str:
        return refusal(spark, tmp_path / name, lake, error, **settings)

    for name in ("empty", "column", "all", "cut", "none"):
        (tmp_path / name).mkdir()
    good = ",".join(raw.row(random.Random(1), 0))
    folder_with(tmp_path / "empty")
    assert "log_a.csv: the log has no rows" in said("empty")
    folder_with(tmp_path / "column", raw.COLUMNS.replace("time_ms", "time"), (good,))
    assert "log_a.csv: the header lacks column time_ms" in said("column")
    folder_with(tmp_path / "all", lines=(good + ",1", good + ",2"))
    assert "none of 2 rows is usable" in (sentence := said("all")) and "wrong number of columns" in sentence
    folder_with(tmp_path / "cut", lines=(good,))
    packed = tmp_path / "cut" / "log_b.csv.gz"
    rng = random.Random(2)
    raw.write(packed, raw.COLUMNS, [",".join(raw.row(rng, rng.randrange(3))) for _ in range(2000)])
    packed.write_bytes(packed.read_bytes()[:-4000])
    assert "log_b.csv.gz: cannot be read to its end" in said("cut")
    assert "holds no file log_*.csv" in said("none", ConfigError)
    assert "which does not exist" in said("nowhere", ConfigError)
    assert "time_zone is 'Mars'" in said("cut", ConfigError, time_zone="Mars")
    (tmp_path / "cut" / "log_b.csv.gz").write_bytes(b"")
    assert "log_b.csv.gz: the file is empty" in said("cut")


@pytest.mark.data
@pytest.mark.long
def test_kuairand_part(spark, lake, data_folder):
    config = config_of(data_folder / "kuairand_pure")
    report = ingest(spark, lake, config)
    assert report.rows["read"] == 198_895 and report.rows["rejected"] == 8 and report.rows["duplicates"] == 5_304
    assert report.rows["kept"] == report.rows_by_table["impressions"] == 193_583
    assert report.rows_by_table["items"] == 7_583 and report.rows_by_table["users"] == 27_285
    assert report.days[0] == datetime.date(2022, 4, 24) and report.days[-1] == datetime.date(2022, 5, 6)
    assert done(lake, config) == report
