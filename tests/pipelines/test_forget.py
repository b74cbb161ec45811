"""A forgotten user is in no table, comes back by no ingest, and makes nothing stale; a rebuild gives the same rows."""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyspark.sql import functions as F

from jobs import ingest as ingest_job
from jobs import organise, rewards, sequences, tables
from jobs.forget import naming, tables_of_users, user_ids
from jobs.ingest_plan import IngestReport, done
from jobs.main import run_job, todo_of
from jobs.mapped_values import Input, identifier
from jobs.mapping import Cell
from pipelines.cli import main
from pipelines.ray_tables import replace_days
from schemas.calendar import log_calendar
from schemas.config import Config
from schemas.errors import EXIT_FAILED, EXIT_RETRY, EXIT_USAGE, ConfigError
from schemas.lake import Lake, lake_of
from schemas.lineage import ORGANISE, REWARDS, SEQUENCES
from schemas.loader import load_config
from schemas.locks import lake_lock
from schemas.source import LogColumns, LogMapping, SourceConfig
from schemas.tables import TABLES
from tests.conftest import RESOURCES
from tests.jobs import raw_logs as raw
from tests.jobs.logs import collected
from tests.pipelines.command_line import answer_of
from tests.pipelines.tracked import PASSED, register_version

pytestmark = pytest.mark.long

USER, STRANGER = 3, 999
USERS = ['0,full_active,12,"(10,50]",1.0', "3,UNKNOWN,3,-124,", "3,UNKNOWN,4,-124,"]
VIDEOS = ['0,77,NORMAL,2026-01-01,Web,0.0,31000.0,1,1,5,9.0,"39,68"']
JOBS = ((SEQUENCES, sequences.run), (ORGANISE, organise.run), (REWARDS, rewards.run))
NAMED = tuple(name for name in tables_of_users() if name not in ("lifelong_sequences", "sessions"))
DELETED = "the user was deleted"
Rows = dict[str, list[dict[str, Any]]]


def build(spark, config: Config, force: bool = False) -> IngestReport:
    report = ingest_job.ingest(spark, lake_of(config), config, force=force)
    for spec, run in JOBS:
        run_job(spec, run, config, force=force)
    return report


def read(spark, lake: Lake, names: tuple[str, ...] = NAMED) -> Rows:
    return {name: collected(tables.read(spark, lake, name), name) for name in names}


def without(found: Rows, user: int) -> Rows:
    return {name: [row for row in rows if row["user_id"] != user] for name, rows in found.items()}


def recommend(lake: Lake) -> None:
    """As delta-rs writes them."""
    day = raw.FIRST
    row = {"date": day, "rank": 0, "item_id": 1, "log_probs": [0.5], "codebook_version": "c", "model_version": "m/1"}
    made = pa.Table.from_pylist([row | {"user_id": user} for user in range(6)], TABLES["recommendations"].schema)
    replace_days(lake, "recommendations", made, {day: "recommended"})


@dataclasses.dataclass
class Case:
    path: Path  # of the configuration
    config: Config
    before: Rows
    refused: dict[tuple[str, int], dict[str, Any]]
    identities: dict[str, dict[datetime.date, str]]
    answer: dict[str, Any]

    @property
    def lake(self) -> Lake:
        return lake_of(self.config)


def refused(spark, lake: Lake) -> dict[tuple[str, int], dict[str, Any]]:
    rows = collected(tables.read(spark, lake, "rejected_rows"), "rejected_rows")
    return {(row["source_file"], row["row_number"]): row for row in rows}


def write_day(folder: Path, day: int) -> None:
    raw.write(folder / f"log_{day}.csv", raw.COLUMNS, raw.lines_of_day(random.Random(day), day, 30))


@pytest.fixture(scope="module")
def own_engines(engines) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.forget.Engines", lambda resources: engines)
        patch.setattr(engines, "stop", lambda: None)
        yield


@pytest.fixture(scope="module")
def case(spark, own_engines, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("forget")
    logs = folder / "logs"
    logs.mkdir()
    for day in range(3):
        write_day(logs, day)
    raw.write_catalogue(logs, USERS, VIDEOS)
    settings = {
        "lake": str(folder / "lake"),
        "source": {"path": str(logs)},
        # quantiles among all users' plays keep a trace of each, as the answer says
        "rewards": {"min_bucket": 1, "backoff": ["neighbours"]},
        "resources": {name: getattr(RESOURCES, name) for name in ("spark_master", "spark_heap", "spark_partitions")}
        | {"spark_conf": list(RESOURCES.spark_conf)},
    }
    path = folder / "conf.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = load_config(path)
    lake = lake_of(config)
    build(spark, config)
    recommend(lake)
    identities = {name: lake.identities(name) for name in lake.tables()}
    before, texts = read(spark, lake), refused(spark, lake)
    arguments = ["forget", "--config", str(path), "--user", str(USER), "--user", str(STRANGER), "--quiet"]
    return Case(path, config, before, texts, identities, answer_of(arguments, folder))


def test_the_user_is_in_no_table_and_nobody_else_has_changed(spark, case: Case) -> None:
    assert all(row["user_id"] >= 0 for rows in case.before.values() for row in rows)
    assert read(spark, case.lake) == without(case.before, USER)
    gone = {name: len(rows) - len(without(case.before, USER)[name]) for name, rows in case.before.items()}
    assert min(gone.values()) > 0
    assert {name: case.answer["rows"][name] for name in NAMED} == gone
    assert (case.answer["users"], case.answer["unknown"]) == ([USER, STRANGER], [STRANGER])
    assert {row["user_id"] for row in read(spark, case.lake, ("deleted_users",))["deleted_users"]} == {USER, STRANGER}


def test_texts_that_name_the_user_go_and_their_rows_stay(spark, case: Case) -> None:
    def kept(row: dict[str, Any]) -> dict[str, Any]:
        named = row["raw"] is not None and re.search(rf"\b({USER}|{STRANGER})\b", row["raw"])
        return row | {"raw": None} if named else row

    expected = {place: kept(row) for place, row in case.refused.items()}
    cleared = sum(expected[place] != row for place, row in case.refused.items())
    assert 0 < cleared < len(expected)
    assert refused(spark, case.lake) == expected and case.answer["rows"]["rejected_rows"] == cleared


def test_nothing_is_stale_and_no_identity_has_changed(case: Case) -> None:
    lake, config = case.lake, case.config
    assert {name: lake.identities(name) for name in case.identities} == case.identities
    assert done(lake, config) is not None
    assert not any(todo_of(spec, config, lake, log_calendar(config, lake), None, False) for spec, _ in JOBS)


def test_to_forget_again_changes_no_table(case: Case) -> None:
    versions = {name: case.lake.version(name) for name in case.lake.tables()}
    again = answer_of(["forget", "--config", str(case.path), "--user", str(USER), "--quiet"], case.path.parent)
    assert set(again["rows"].values()) == {0} and again["unknown"] == [USER]
    assert {name: case.lake.version(name) for name in case.lake.tables()} == versions


def test_a_rebuild_from_the_source_gives_the_same_rows(spark, case: Case) -> None:
    """Last of those on `case`, whose lake it makes anew, with a further file in which the user comes back."""
    lake, config = case.lake, case.config
    names = tuple(name for name in NAMED if name != "recommendations")
    forgotten, texts = read(spark, lake, names), refused(spark, lake)
    write_day(Path(config.source.path), 3)
    report = build(spark, config, force=True)
    later = read(spark, lake, names)
    last = raw.FIRST + datetime.timedelta(days=3)
    assert {n: [row for row in rows if row["date"] < last] for n, rows in later.items()} == forgotten
    assert without(later, USER) == later and any(row["date"] == last for row in later["rewards"])
    rows = refused(spark, lake)
    assert report.rows["read"] == sum(report.rows[k] for k in ("kept", "duplicates", "rejected", "outside_range"))
    own = [row for row in rows.values() if row["reason"] == DELETED]
    catalogue = [row for row in own if row["source_file"].startswith("user_features")]
    assert len(catalogue) == 2 and len(own) - 2 == report.reasons[DELETED] > 0
    assert all(row["raw"] is None for row in own)
    for place, row in texts.items():  # of the user's rows that repeat a key, the reason is another now
        assert rows[place] == row or (rows[place]["reason"], row["raw"]) == (DELETED, None)


def test_a_purge_leaves_no_file_that_holds_the_user(spark, own_engines, tmp_path: Path, tracking_uri: str) -> None:
    config = Config(name="demo", lake=str(tmp_path / "lake"), tracking_uri=tracking_uri, resources=RESOURCES)
    lake = lake_of(config)
    recommend(lake)
    pinned = lake.version("recommendations")
    number = register_version(config, lake, tmp_path, PASSED)
    bundle = lake.artifact("register", "identity of a version") / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "lineage.json").write_text(json.dumps({"tables": {"recommendations": pinned}}))
    state = lake.artifact("train", "broken") / "checkpoints" / "step_000000002" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"position": {"table_version": 0}}))
    path = tmp_path / "conf.yaml"
    path.write_text(yaml.safe_dump({"name": "demo", "lake": config.lake, "tracking_uri": tracking_uri}))
    arguments = ["forget", "--config", str(path), "--source-id", str(USER), "--quiet"]
    answer = answer_of(arguments, tmp_path)
    model = f"models:/lazyrec/{number}"
    until = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=90)
    pins = {model: ["recommendations"]}
    assert answer["old_versions"] == {"purged": False, "readable_until": str(until), "pinned_by": pins}
    assert answer["restarted_trainings"] == ["train/broken"] and not state.exists()
    assert USER in held(lake)
    answer = answer_of([*arguments, "--purge"], tmp_path)
    assert answer["old_versions"]["lost_by"] == pins and answer["old_versions"]["files_removed"] == 1
    assert held(lake) == {0, 1, 2, 4, 5} == {row["user_id"] for row in read(spark, lake, NAMED[-1:])[NAMED[-1]]}
    assert not list(Path(lake.path("recommendations")).rglob("*.bin"))  # no deletion vectors


def held(lake: Lake) -> set[int]:
    """The users in any file of the table, of whatever version."""
    files = Path(lake.path("recommendations")).glob("date=*/*.parquet")
    return {user for file in files for user in pq.ParquetFile(file).read(["user_id"]).column("user_id").to_pylist()}


ORIGINALS = ["anna", "12", "007", "a.b@c.de", "Jürgen K", "urn:user:7"]


@pytest.mark.parametrize("ids", ["auto", "text"])
def test_a_source_id_is_what_ingest_makes_of_it(spark, ids: str) -> None:
    log = LogMapping(LogColumns(user_id="u", item_id="i", ts="t"), files="*.csv")
    source = SourceConfig(kind="mapped", ids=ids, log=log)
    frame = spark.createDataFrame([(text,) for text in ORIGINALS], "u string")
    value = identifier(Input(Cell("user_id", "u", pa.string()), F.col("u"), frame.schema["u"].dataType), ids)
    found = user_ids(spark, source, ORIGINALS)
    assert found == [row[0] for row in frame.select(value.column).collect()]
    lines = [f'{{"u":"{text}","n":5}}' for text in ORIGINALS] + [f"1,{text},x" for text in ORIGINALS] + ["annabel,120,x"]
    schema = "source_file string, row_number long, date date, raw string"
    rows = spark.createDataFrame([("f", n, raw.FIRST, line) for n, line in enumerate(lines)], schema)
    for place, user in enumerate(found):
        named = naming(rows, spark.createDataFrame([(user,)], "user_id long")).collect()
        assert {row.row_number for row in named} == {place, place + len(ORIGINALS)}
    with pytest.raises(ConfigError, match="can be no user"):
        user_ids(spark, SourceConfig(), ["anna"])


def test_refusals_are_one_sentence(tmp_path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["forget", "--config", str(case.path)]
    assert main(start) == EXIT_USAGE
    assert main([*start, "--user", "-1"]) == EXIT_USAGE
    assert main([*start, "--user", "1", "--set", f"lake={tmp_path / 'nowhere'}"]) == EXIT_FAILED
    with lake_lock(case.lake):
        assert main([*start, "--user", "1"]) == EXIT_RETRY
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 4
