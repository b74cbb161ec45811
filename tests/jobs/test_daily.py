"""The four jobs on a lake: days one by one by the command line equal one full pass by the stages; reruns are harmless."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import yaml

from jobs import item_pairs, organise, rewards, sequences
from jobs.main import main
from jobs.tables import read, replace_days
from pipelines import features
from pipelines.stage import StageContext
from schemas.calendar import calendar_of
from schemas.config import Config
from schemas.errors import EXIT_FAILED, EXIT_RETRY, EXIT_USAGE
from schemas.lake import Lake
from schemas.lineage import ITEM_PAIRS, ORGANISE, REWARDS, SEQUENCES, plan
from schemas.loader import load_config
from schemas.tables import TABLES
from tests.jobs import logs

DAYS = logs.days_from(3)
INPUTS = ("impressions", "items", "users")
OUTPUTS = ("user_sequences", "user_features", "item_pairs", "training_examples", "rewards")
JOBS = ((SEQUENCES, sequences), (ITEM_PAIRS, item_pairs), (ORGANISE, organise), (REWARDS, rewards))
STAGES = (features.sequences, features.item_pairs, features.organise, features.rewards)  # in the order of JOBS
Versions = dict[str, int]


def write_config(folder: Path) -> Path:
    path = folder / "conf.yaml"
    settings = {
        "sequences": {"short_length": 3, "positive_length": 5},
        "rewards": {"min_bucket": 4, "population_days": 1, "min_population": 20},
    }
    path.write_text(yaml.safe_dump({"lake": str(folder / "lake"), **settings}))
    return path


def write_inputs(spark, lake: Lake) -> None:
    identities = {day: f"file of {day}" for day in DAYS}
    frames = (
        logs.impressions_frame(spark, logs.random_log(40, users=12, days=3)),
        logs.table_frame(spark, "items", logs.random_catalogue(40, days=3)),
        logs.table_frame(spark, "users", logs.random_users(40, users=12, days=3)),
    )
    for name, frame in zip(INPUTS, frames, strict=True):
        replace_days(lake, name, frame, identities)


def stage_context(engines, config: Config, spec) -> StageContext:
    lake = Lake(config.lake)
    calendar = calendar_of(lake.identities("impressions"), config.split)
    pins: Versions = {name: version for name in TABLES if (version := lake.version(name)) is not None}
    return StageContext(config, lake, calendar, plan(spec, config, lake, calendar), engines, pins, say=lambda line: None)


def rows_of(spark, lake: Lake, name: str) -> list[logs.Row]:
    return logs.collected(read(spark, lake, name), name)


@pytest.fixture(scope="module")
def full(spark, engines, tmp_path_factory):
    """(configuration file, rows by table as the stages count them): one pass a stage over all days."""
    path = write_config(tmp_path_factory.mktemp("full"))
    config = load_config(path)
    write_inputs(spark, Lake(config.lake))
    rows = {}
    for (spec, _), stage in zip(JOBS, STAGES, strict=True):
        result = stage(stage_context(engines, config, spec))
        rows |= result.rows
        assert plan(spec, config, Lake(config.lake), calendar_of(DAYS, config.split)).done
    return path, rows


@pytest.fixture(scope="module")
def daily(full, tmp_path_factory):
    """The configuration file of a copy of the lake, in which the command lines of the jobs made days again one by one,
    while the days after them were there to be looked at by mistake."""
    path = write_config(tmp_path_factory.mktemp("daily"))
    shutil.copytree(load_config(full[0]).lake, load_config(path).lake)
    for day in DAYS[1:]:
        for spec, job in JOBS:
            assert main(spec, job.run, ["--config", str(path), "--date", day.isoformat(), "--force"]) == 0
    return path


@pytest.mark.parametrize("name", OUTPUTS)
def test_days_one_by_one_equal_one_full_pass(spark, full, daily, name):
    whole, singly = Lake(load_config(full[0]).lake), Lake(load_config(daily).lake)
    rows = rows_of(spark, whole, name)
    assert rows == rows_of(spark, singly, name)
    assert len(rows) == full[1][name] > 0
    assert whole.identities(name) == singly.identities(name)


def test_the_command_line_skips_what_is_there(daily, capsys):
    for spec, job in JOBS:
        assert main(spec, job.run, ["--config", str(daily)]) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "skipped"


def test_the_newest_day_alone_is_not_built_on_missing_days(spark, full, tmp_path, capsys):
    path = write_config(tmp_path)
    for name in INPUTS:
        shutil.copytree(Path(load_config(full[0]).lake) / name, Path(load_config(path).lake) / name)
    assert main(SEQUENCES, sequences.run, ["--config", str(path), "--date", DAYS[2].isoformat()]) == EXIT_RETRY
    assert "run stage sequences" in capsys.readouterr().err
    assert main(ORGANISE, organise.run, ["--config", str(path)]) == EXIT_RETRY


@pytest.mark.parametrize(("day", "code"), [("2026-03-33", EXIT_USAGE), ("2031-01-01", EXIT_RETRY)])
def test_a_bad_date_is_one_sentence_and_an_exit_code(full, capsys, day, code):
    assert main(REWARDS, rewards.run, ["--config", str(full[0]), "--date", day]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_full_disk_is_one_sentence_and_a_defect_keeps_its_traceback(full, capsys):
    def broken(error):
        def run(*arguments):
            raise error

        return run

    command = ["--config", str(full[0]), "--force"]
    assert main(REWARDS, broken(OSError(errno.ENOSPC, "No space left on device")), command) == EXIT_FAILED
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("No space is left for the lake")
    with pytest.raises(IndexError):
        main(REWARDS, broken(IndexError()), command)
