"""Maintenance changes no row, order or identity; what a registered model pins stays readable, whatever its age."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from pipelines.cli import main
from pipelines.maintenance import File, days_to_merge, maintain
from pipelines.ray_tables import days_filter, replace_days
from schemas.config import Config
from schemas.errors import EXIT_DONE, EXIT_RETRY
from schemas.lake import Lake, lake_of
from schemas.lineage import TRAIN, plan
from schemas.loader import to_mapping
from schemas.locks import lake_lock
from schemas.tables import TABLES
from tests.jobs.test_tables import rows_of
from tests.pipelines.test_operator import NAME, arguments_of
from tests.pipelines.tracked import PASSED, register_version
from tests.schemas.test_lineage import CALENDAR, DAYS, commit, ingest

FILLED = ("users", "training_examples", "rewards")
SIZES = {"config": {"model": to_mapping(Config().model)}}
VERSION = "identity of a version"  # of the artifact behind what `register_version` registers


def rows(name: str, day: datetime.date, first: int, count: int = 3) -> pa.Table:
    """Rows whose key descends, so that an order by key would show."""
    made = [row | {"date": day, TABLES[name].key[0]: first - n} for n, row in enumerate(rows_of(TABLES[name], count))]
    return pa.Table.from_pylist(made, TABLES[name].schema)


@pytest.fixture
def config(tmp_path: Path, tracking_uri: str) -> Config:
    """Every day of three tables in four files; of impressions and items there are no rows."""
    config = Config(name="demo", lake=str(tmp_path / "lake"), tracking_uri=tracking_uri)
    lake = lake_of(config)
    ingest(lake)
    for name in FILLED:
        first = pa.concat_tables([rows(name, day, 100) for day in DAYS])
        replace_days(lake, name, first, {day: f"{name}{day}" for day in DAYS})
        for start in (300, 50, 200):
            write_deltalake(lake.path(name), pa.concat_tables([rows(name, day, start) for day in DAYS]), mode="append")
    return config


def contents(lake: Lake, name: str, version: int | None = None) -> list[list[dict[str, Any]]]:
    """The rows of each day in the order in which a reader meets them."""
    dataset = lake.open(name, version).to_pyarrow_dataset()
    return [dataset.to_table(filter=days_filter([day])).to_pylist() for day in DAYS]


def rewrite(lake: Lake, name: str) -> None:
    replace_days(lake, name, pa.concat_tables([rows(name, day, 400) for day in DAYS]), dict.fromkeys(DAYS, "rewritten"))


def made_ago(lake: Lake, days: int, stage: str, identity: str, **content: Any) -> Path:
    """A complete artifact of an age."""
    lake.write_manifest(stage, identity, content)
    folder = lake.artifact(stage, identity)
    then = datetime.datetime.now().timestamp() - days * 86_400
    for path in (folder / "manifest.json", folder):
        os.utime(path, (then, then))
    return folder


def test_small_files_of_closed_days_become_one_and_nothing_else_changes(config: Config) -> None:
    lake = lake_of(config)
    before = {name: (contents(lake, name), lake.identities(name), lake.version(name)) for name in FILLED}
    planned = maintain(config, dry_run=True)
    assert [planned["tables"][name]["days_merged"] for name in FILLED] == [5, 5, 5]
    assert [lake.version(name) for name in FILLED] == [before[name][2] for name in FILLED]
    answer = maintain(config)
    for name in FILLED:
        facts = answer["tables"][name]
        # the newest day may still be replaced, so it is left alone
        assert (facts["files_before"], facts["files_after"], facts["days_merged"]) == (24, 5 + 4, 5)
        assert (contents(lake, name), lake.identities(name)) == before[name][:2]
        assert contents(lake, name, before[name][2]) == before[name][0]
    versions = {name: lake.version(name) for name in lake.tables()}
    again = maintain(config)
    assert again["status"] == "skipped"
    assert {name: lake.version(name) for name in lake.tables()} == versions


def test_what_a_registered_model_pins_stays_readable_and_nothing_else(config: Config, tmp_path: Path) -> None:
    lake = lake_of(config)
    pinned = {name: (lake.version(name), contents(lake, name)) for name in FILLED}
    number = register_version(config, lake, tmp_path, PASSED)
    bundle = lake.artifact("register", VERSION) / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "lineage.json").write_text(json.dumps({"tables": {"users": pinned["users"][0]}, "inputs": {}}))
    reads = {"training_examples": {"version": pinned["training_examples"][0]}}
    lake.write_manifest("align", "a", {"inputs": reads, "codebook_version": "c", "trained_until": "2026-01-01"} | SIZES)
    lake.write_manifest("register", VERSION, {"inputs": {"align": {"version": None, "identities": {"2026-01-01": "a"}}}})
    made_ago(lake, 0, "align", "b", codebook_version="c", trained_until="2026-01-02", **SIZES)
    made_ago(lake, 0, "register", "later")
    for name in FILLED:
        rewrite(lake, name)
    answer = maintain(config, retention_days=0)
    for name in ("users", "training_examples"):
        assert contents(lake, name, pinned[name][0]) == pinned[name][1]
        assert answer["tables"][name]["versions_kept"] == {str(pinned[name][0]): [f"models:/{NAME}/{number}"]}
    assert answer["tables"]["rewards"]["files_removed"] == 24 and answer["tables"]["rewards"]["bytes_freed"] > 0
    with pytest.raises(FileNotFoundError):
        contents(lake, "rewards", pinned["rewards"][0])
    assert maintain(config, retention_days=0)["status"] == "skipped"
    mlflow.MlflowClient(config.tracking_uri, config.tracking_uri).delete_model_version(NAME, number)
    answer = maintain(config, retention_days=0)
    assert set(answer["artifacts"]["removed"]) == {f"register/{VERSION}", "align/a"}
    with pytest.raises(FileNotFoundError):
        contents(lake, "users", pinned["users"][0])


def test_a_model_whose_pins_cannot_be_read_stops_everything(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = lake_of(config)
    version = lake.version("users")
    register_version(config, lake, tmp_path, PASSED)  # neither the lake nor the registry has its lineage
    rewrite(lake, "users")
    assert main(arguments_of("maintain", config, "--retention-days", "0")) == 1
    assert f"models:/{NAME}/1 does not tell which tables it pins" in capsys.readouterr().err
    assert contents(lake, "users", version)


def test_the_registrys_copy_tells_what_a_model_pins(config: Config, tmp_path: Path) -> None:
    lake = lake_of(config)
    version, before = lake.version("users"), contents(lake, "users")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "lineage.json").write_text(json.dumps({"tables": {"users": version}, "inputs": {}}))
    register_version(config, lake, tmp_path, PASSED)
    rewrite(lake, "users")
    assert maintain(config, retention_days=0)["tables"]["users"]["versions_kept"] == {str(version): [f"models:/{NAME}/1"]}
    assert contents(lake, "users", version) == before


def test_old_artifacts_go_unless_something_needs_them(config: Config) -> None:
    lake = lake_of(config)
    commit(lake, "semantic_ids", {DAYS[3]: "c"})
    expected = plan(TRAIN, config, lake, CALENDAR).identity
    kept = [
        made_ago(lake, 300, "train", expected),  # the whole run of this configuration
        made_ago(
            lake,
            299,
            "align",
            "candidate",
            codebook_version="c",
            trained_until="2026-01-03",
            inputs={
                "train": {"version": None, "identities": {"2026-01-03": "weights"}},
                "candidate": {"version": None, "identities": {"2026-01-03": "ancestor"}},
            },
            **SIZES,
        ),
        made_ago(lake, 298, "train", "weights"),
        made_ago(lake, 200, "align", "of no codebook", codebook_version="d", trained_until="2026-01-04", **SIZES),
        made_ago(lake, 1, "evaluate", "young"),
        made_ago(lake, 0, "evaluate", "newest"),
    ]
    gone = [
        made_ago(lake, 300, "evaluate", "old"),
        made_ago(lake, 300, "align", "ancestor", codebook_version="c", trained_until="2026-01-01", **SIZES),
    ]
    made_ago(lake, 297, "train", "newest")
    draft = made_ago(lake, 300, "train", "draft")
    (draft / "manifest.json").unlink()
    os.utime(draft, (0, 0))
    assert set(maintain(config, dry_run=True)["artifacts"]["removed"]) == {"evaluate/old", "align/ancestor", "train/draft"}
    assert all(path.is_dir() for path in (*kept, *gone, draft))
    maintain(config)
    assert all(path.is_dir() for path in kept) and not any(path.exists() for path in (*gone, draft))


def test_a_training_that_was_broken_off_keeps_its_place(config: Config) -> None:
    lake = lake_of(config)
    state = lake.artifact("train", "broken") / "checkpoints" / "step_000000002" / "state.json"
    state.parent.mkdir(parents=True)
    version = lake.version("training_examples")
    state.write_text(json.dumps({"position": {"table_version": version}}))
    answer = maintain(config, retention_days=0)
    assert state.is_file() and lake.version("training_examples") == version
    assert "broken-off" in answer["tables"]["training_examples"]["left_alone"]
    assert answer["tables"]["users"]["days_merged"] == 5
    rewrite(lake, "training_examples")  # it can go on no more
    assert "train/broken" in maintain(config, retention_days=0)["artifacts"]["removed"]


def test_the_order_of_a_large_day_is_not_touched_where_it_matters() -> None:
    files = [File(DAYS[0], 60, 1)] * 4 + [File(DAYS[1], 40, 1)] * 2 + [File(DAYS[2], 100, 1)] + [File(DAYS[5], 1, 1)] * 9
    assert days_to_merge(files, 100, DAYS[5], whole=False) == [DAYS[0], DAYS[1]]
    assert days_to_merge(files, 100, DAYS[5], whole=True) == [DAYS[1]]


def test_the_command_tells_people_and_schedulers(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for argument in arguments_of("maintain", config, "--dry-run") if argument != "--quiet"]
    assert main(arguments) == EXIT_DONE
    *lines, last = capsys.readouterr().out.splitlines()
    assert "Nothing was changed" in lines[0] and any("24 -> ?" in line for line in lines)
    assert json.loads(last)["dry_run"] is True
    with lake_lock(lake_of(config)):
        assert main(arguments_of("maintain", config)) == EXIT_RETRY
