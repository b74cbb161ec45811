"""Promotion, rollback and status on a real registry; the answers are the last line, the refusals one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipelines.cli import main
from pipelines.promotion import history, move_champion, promote, rollback
from pipelines.registry import champion_of
from schemas.config import Config
from schemas.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, LazyRecError
from schemas.lake import Lake, lake_of
from schemas.locks import lake_lock
from schemas.tables import TABLES
from tests.conftest import REPOSITORY
from tests.pipelines.tracked import FAILED, PASSED, assert_complete, bare_version, register_version, tracked_run

DEMO = str(REPOSITORY / "conf" / "demo.yaml")
NAME = "lazyrec"


@pytest.fixture
def config(tmp_path: Path, tracking_uri: str) -> Config:
    return Config(name="demo", lake=str(tmp_path / "lake"), tracking_uri=tracking_uri)


def arguments_of(command: str, config: Config, *more: str) -> list[str]:
    places = ["--set", f"lake={config.lake}", "--set", f"tracking_uri={config.tracking_uri}"]
    return [command, "--config", DEMO, *places, "--quiet", *more]


def versions_of(config: Config, count: int) -> mlflow.MlflowClient:
    """A registry with `count` bare versions, whose gates passed."""
    for _ in range(count):
        bare_version(config, PASSED)
    return mlflow.MlflowClient(config.tracking_uri, config.tracking_uri)


def champion(client: mlflow.MlflowClient) -> str:
    found = champion_of(client, NAME)
    assert found is not None
    return str(found["version"])


def test_the_ui_finds_parent_stages_tables_metrics_and_plots(config: Config) -> None:
    assert_complete(config, tracked_run(config, lake_of(config)))


def test_each_rollback_goes_one_further_back(config: Config) -> None:
    client = versions_of(config, 3)
    for version in ("1", "3", "2"):
        promote(config, version)
    assert promote(config, "2")["status"] == "skipped"
    assert rollback(config)["model"]["version"] == champion(client) == "3"
    assert rollback(config) | {"seconds": 0} == {
        "stage": "rollback",
        "status": "done",
        "model": {"name": NAME, "version": "1", "alias": "champion"},
        "champion_before": "3",
        "seconds": 0,
    }
    with pytest.raises(LazyRecError, match="first champion"):
        rollback(config)
    assert champion(client) == "1"
    promote(config, "2")
    assert history(client, NAME) == ["1", "2"]


@pytest.mark.parametrize("last", ["2", "3"])
def test_an_alias_moved_by_a_hand_or_left_by_a_kill_is_the_truth(config: Config, last: str) -> None:
    client = versions_of(config, 3)
    move_champion(client, NAME, "1")
    move_champion(client, NAME, "2")
    client.set_registered_model_alias(NAME, "champion", last)
    assert rollback(config)["model"]["version"] == {"2": "1", "3": "2"}[last]


def test_a_version_is_promoted_only_after_its_gates(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    client = versions_of(config, 1)
    client.set_model_version_tag(NAME, "1", "gates", json.dumps(FAILED))
    refused = main(arguments_of("promote", config, "--version", "1"))
    printed = capsys.readouterr()
    assert (refused, printed.out) == (EXIT_FAILED, "")
    assert "recall@10 is not above popularity; --force" in printed.err
    assert main(arguments_of("promote", config, "--version", "9")) == EXIT_USAGE
    assert main(arguments_of("rollback", config)) == EXIT_FAILED
    assert "has no champion" in capsys.readouterr().err
    assert main(arguments_of("promote", config, "--version", "1", "--force")) == EXIT_DONE
    assert json.loads(capsys.readouterr().out)["model"] == {"name": NAME, "version": "1", "alias": "champion"}
    assert champion(client) == "1"


def test_status_tells_what_is_there(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = lake_of(config)
    tracked_run(config, lake)
    number = register_version(config, lake, tmp_path, FAILED)
    promote(config, number, force=True)
    with lake_lock(lake):
        assert main([argument for argument in arguments_of("status", config) if argument != "--quiet"]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    facts = found["tables"]["impressions"]
    assert (facts["version"], facts["rows"], facts["days"]) == (lake.version("impressions"), 0, 6)
    assert (facts["first_day"], facts["last_day"]) == ("2026-01-01", "2026-01-06")
    assert facts["disk_bytes"] > 0
    assert found["lock"].startswith("process ")
    (version,) = found["versions"]
    assert (version["alias"], version["fit_day"], version["gates"]) == ("champion", "2026-01-04", FAILED)
    assert version["metrics"] == {"recall@10": 0.25}
    register, first = found["runs"]
    assert register["stages"] == {"register": "FINISHED"}
    assert list(first["stages"]) == ["first", "second"]
    table = "\n".join(lines[:-1])
    assert "recall@10 0.2500" in table and "recall@10 is not above popularity" in table


def test_looking_at_a_lake_that_is_not_there_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(lake=str(tmp_path / "lake"), tracking_uri="''")
    assert main(arguments_of("status", config)) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["tables"], found["versions"], found["runs"], found["lock"]) == ({}, [], [], None)
    assert main(arguments_of("rollback", config)) == EXIT_FAILED
    assert "no registry" in capsys.readouterr().err
    assert not (tmp_path / "lake").exists()


def test_the_contracts_need_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert set(json.loads(printed.splitlines()[-1])["tables"]) == set(TABLES)
    assert all(field.name in printed for table in TABLES.values() for field in table.schema)
    assert main(["tables", "rewards"]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tables"]["rewards"]["bucket"] == "int32"
    assert main(["tables", "reward"]) == EXIT_USAGE


def test_artifacts_on_a_mount_serve_a_lake_whose_tables_are_a_uri(tmp_path: Path, tracking_uri: str) -> None:
    uri, mount = (tmp_path / "store").as_uri(), tmp_path / "mount"
    config = dataclasses.replace(Config(), lake=uri, artifacts=str(mount), tracking_uri="")
    lake = lake_of(config)
    with lake_lock(lake):
        tracked_run(dataclasses.replace(config, tracking_uri=tracking_uri), lake)
        lake.write_manifest("train", "1", {"config": {}})
    assert lake.manifest("train", "1") is not None
    assert lake.newest_artifact("train") == "1"
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"impressions", "items", "users"}
    assert {path.name for path in mount.iterdir()} == {"_artifacts", "_mlflow", ".lock"}
    assert Lake(lake.root, lake.mount).tables() == ["impressions", "items", "users"]
