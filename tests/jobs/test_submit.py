"""A Spark job by `python -m` and by `spark-submit` gives what the stage gives, and tells a scheduler the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.session import write_submit_defaults
from pipelines import features
from schemas.config import Config
from schemas.errors import EXIT_DONE, EXIT_RETRY, EXIT_USAGE
from schemas.lake import lake_of
from schemas.lineage import REWARDS, SEQUENCES
from schemas.loader import load_config
from schemas.locks import lake_lock
from tests.conftest import REPOSITORY
from tests.jobs.test_daily import rows_of, stage_context, write_inputs

PROGRAMS = Path(sys.executable).parent
RESOURCES = {"spark_master": "local[2]", "spark_heap": "1g", "spark_partitions": 2}
MODULE = [sys.executable, "-m", "jobs.rewards"]
SUBMIT = [str(PROGRAMS / "spark-submit"), "--master", "local[2]", "--driver-memory", "1g", "jobs/rewards.py"]


def config_file(folder: Path) -> Path:
    folder.mkdir()
    settings = {"lake": str(folder / "lake"), "rewards": {"min_bucket": 1}, "resources": RESOURCES}
    path = folder / "conf.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """As from a shell in which the environment is active: its programs first, the code below the working directory."""
    env = os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    env.pop("PYSPARK_GATEWAY_PORT", None)
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=REPOSITORY, env=env, check=False)


@pytest.fixture(scope="module")
def by_stage(spark, engines, tmp_path_factory) -> Path:
    """The configuration of a lake whose rewards the stage made."""
    path = config_file(tmp_path_factory.mktemp("submit") / "stage")
    config: Config = load_config(path)
    write_inputs(spark, lake_of(config))
    features.sequences(stage_context(engines, config, SEQUENCES))
    shutil.copytree(config.lake, f"{config.lake}-before")
    features.rewards(stage_context(engines, config, REWARDS))
    return path


@pytest.mark.long
def test_spark_submit_gives_what_the_stage_gives(by_stage: Path, spark, tmp_path: Path) -> None:
    write_submit_defaults()
    path = config_file(tmp_path / "job")
    expected, lake = lake_of(load_config(by_stage)), lake_of(load_config(path))
    shutil.copytree(f"{expected.root}-before", lake.root)
    done = run(SUBMIT, "--config", str(path))
    assert done.returncode == EXIT_DONE, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["stage"], answer["status"]) == ("rewards", "done")
    assert answer["tables"] == {"rewards": lake.version("rewards")}
    assert lake.identities("rewards") == expected.identities("rewards") != {}
    assert rows_of(spark, lake, "rewards") == rows_of(spark, expected, "rewards") != []


@pytest.mark.parametrize("command", [MODULE, pytest.param(SUBMIT, marks=pytest.mark.long)], ids=["python", "spark-submit"])
def test_both_ways_tell_a_scheduler_the_same(command: list[str], by_stage: Path) -> None:
    skipped = run(command, "--config", str(by_stage))
    assert skipped.returncode == EXIT_DONE, skipped.stderr[-2000:]
    answer = json.loads(skipped.stdout.splitlines()[-1])
    assert (answer["stage"], answer["status"]) == ("rewards", "skipped")
    with lake_lock(lake_of(load_config(by_stage))):
        busy = run(command, "--config", str(by_stage), "--force")
    assert busy.returncode == EXIT_RETRY
    assert "Another run (process " in busy.stdout + busy.stderr  # spark-submit joins the two
    assert '{"stage"' not in busy.stdout
    assert run(command, "--config", "nowhere.yaml").returncode == EXIT_USAGE
