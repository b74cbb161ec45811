"""The job on a lake: whose histories, of which days and with which vectors; what a row is, `compress` alone decides."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyspark.sql import functions as F

from jobs import lifelong
from jobs.history_clusters import compress
from jobs.main import main
from jobs.tables import read
from pipelines import features
from pipelines.ray_tables import replace_days
from schemas.calendar import Calendar, calendar_of
from schemas.config import Config, LifelongConfig
from schemas.lake import Lake
from schemas.lineage import LIFELONG, STAGES, plan
from schemas.loader import load_config
from schemas.tables import TABLES
from tests.jobs import logs
from tests.jobs.test_daily import stage_context

DAYS = logs.days_from(6)
FIT_DAY = DAYS[3]  # the last train day; 4 validates, 5 tests
SETTINGS = LifelongConfig(enabled=True, history=40, tokens=12, max_cluster=1, iterations=4, every_days=2)
USERS = 14
ITEMS = 15
CALENDAR: Calendar = calendar_of(DAYS, Config().split)


def write_config(folder: Path, enabled: bool = True) -> Path:
    path = folder / "conf.yaml"
    settings = dataclasses.asdict(SETTINGS) | {"enabled": enabled}
    path.write_text(yaml.safe_dump({"lake": str(folder / "lake"), "lifelong": settings}))
    return path


def events_of(seed: int = 5) -> list[logs.Event]:
    """Some users have fewer events than `tokens`, most more than `history` by the last day."""
    events = logs.random_log(seed, users=USERS, days=len(DAYS), items=ITEMS)
    return [event for event in events if event.user_id >= 3 or event.request_id % 5 == 0]


def vector_rows(late_mark: float = 0.0) -> list[logs.Row]:
    """Ten items on the fit day, two on each later day, three never."""
    rng = np.random.default_rng(0)
    dates = [FIT_DAY] * 10 + [DAYS[4]] * 2 + [DAYS[5]] * 2
    rows = []
    for item, day in enumerate(dates):
        vector = rng.integers(-3, 4, 4).astype(float) + (late_mark if day == DAYS[5] else 0.0)
        rows.append({"item_id": item, "date": day, "vector": vector.tolist(), "sources": ["pairs"]})
    return rows


def write_inputs(lake: Lake, events: list[logs.Event], vectors: list[logs.Row]) -> list[logs.Row]:
    """Writes what the stage reads; the rows of user_sequences."""
    sequences = logs.reference_sequences(events, [], Config())
    for name, rows in {"impressions": [], "user_sequences": sequences, "item_embeddings": vectors}.items():
        stamps = {day: f"rows of {day}" for day in DAYS if name != "item_embeddings" or day >= FIT_DAY}
        replace_days(lake, name, pa.Table.from_pylist(rows, TABLES[name].schema), stamps)
    return sequences


@pytest.fixture(scope="module")
def built(engines, tmp_path_factory):
    """(configuration file, rows of user_sequences) after the stage's one pass over all days."""
    path = write_config(tmp_path_factory.mktemp("lifelong"))
    config = load_config(path)
    rows = write_inputs(Lake(config.lake), events_of(), vector_rows())
    result = features.lifelong(stage_context(engines, config, LIFELONG))
    assert result.rows["lifelong_sequences"] == Lake(config.lake).row_count("lifelong_sequences") > 0
    return path, rows


def written(spark: Any, path: Path) -> list[logs.Row]:
    return logs.collected(read(spark, Lake(load_config(path).lake), "lifelong_sequences"), "lifelong_sequences")


def shift_of(spark: Any) -> dict[int, int]:
    """How far each user's blocks of days are shifted."""
    shifts = F.pmod(F.xxhash64("id"), F.lit(SETTINGS.every_days))
    return {row["id"]: row["shift"] for row in spark.range(USERS).select("id", shifts.alias("shift")).collect()}


def reference(sequences: list[logs.Row], shift: dict[int, int]) -> list[logs.Row]:
    """Every due day of every user by itself, from all events of the days up to it."""
    made, last_block = [], {}
    for row in sorted(sequences, key=lambda r: (r["user_id"], r["date"])):
        user, day = row["user_id"], row["date"]
        block = ((day - logs.EPOCH).days + shift[user]) // SETTINGS.every_days
        if last_block.get(user) != block:
            last_block[user] = block
            made.append({"user_id": user, "date": day} | compressed(sequences, user, day))
    return made


def compressed(sequences: list[logs.Row], user: int, day: datetime.date) -> logs.Row:
    past = [row for row in sequences if row["user_id"] == user and row["date"] <= day]
    history = {name: np.array([value for row in past for value in row[name]]) for name in lifelong.ARRAYS}
    known = [row for row in vector_rows() if row["date"] <= max(day, FIT_DAY)]
    vectors = {"item_ids": np.array([row["item_id"] for row in known])}
    vectors["vectors"] = np.array([row["vector"] for row in known], np.float32)
    return {name: values.tolist() for name, values in compress(history, vectors, SETTINGS).items()}


def test_a_row_is_the_compressed_history_of_an_active_day(spark, built):
    path, sequences = built
    rows = written(spark, path)
    assert rows == logs.by_key(reference(sequences, shift_of(spark)), "lifelong_sequences")
    lengths = [sum(row["weights"]) for row in rows]
    assert max(lengths) == SETTINGS.history
    assert {len(row["weights"]) <= SETTINGS.tokens for row in rows} == {True}
    assert any(max(row["weights"]) == 1 for row in rows) and any(max(row["weights"]) > 1 for row in rows)
    assert len(rows) < len(sequences)  # not every active day


def test_days_by_themselves_equal_one_pass_whatever_comes_after_them(spark, built, tmp_path):
    """A day before the fit day and one after it are made again, while the events and vectors of the last day are others."""
    path = write_config(tmp_path)
    lake = Lake(load_config(path).lake)
    shutil.copytree(load_config(built[0]).lake, lake.root)
    write_inputs(lake, logs.poisoned_after(events_of(), DAYS[4]), vector_rows(late_mark=50.0))
    for day in (DAYS[2], DAYS[4]):
        before = lake.version("lifelong_sequences")
        assert main(LIFELONG, lifelong.run, ["--config", str(path), "--date", day.isoformat(), "--force"]) == 0
        assert lake.version("lifelong_sequences") == before + 1
    assert written(spark, path) == written(spark, built[0])
    assert lake.identities("lifelong_sequences") == Lake(load_config(built[0]).lake).identities("lifelong_sequences")


def test_other_vectors_make_stale_the_days_that_may_use_them(built, tmp_path):
    path = write_config(tmp_path)
    config, lake = load_config(path), Lake(load_config(path).lake)
    shutil.copytree(load_config(built[0]).lake, lake.root)
    for changed, stale in ((DAYS[4], DAYS[4:]), (FIT_DAY, DAYS)):
        replace_days(lake, "item_embeddings", TABLES["item_embeddings"].schema.empty_table(), {changed: "other"})
        assert plan(LIFELONG, config, lake, CALENDAR).todo["lifelong_sequences"] == tuple(stale)


def test_switched_off_it_writes_nothing_and_is_part_of_no_identity(built, tmp_path, capsys):
    path = write_config(tmp_path, enabled=False)
    config, lake = load_config(path), Lake(load_config(built[0]).lake)
    shutil.copytree(lake.root, load_config(path).lake, ignore=shutil.ignore_patterns("lifelong_sequences"))
    assert main(LIFELONG, lifelong.run, ["--config", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "skipped"
    assert not Lake(config.lake).exists("lifelong_sequences")
    assert plan(LIFELONG, config, lake, CALENDAR).done  # the switch is no part of the table's identity either
    other = dataclasses.replace(config, lifelong=LifelongConfig(enabled=True, tokens=7))
    for spec in STAGES:
        same = plan(spec, config, lake, CALENDAR).expected == plan(spec, other, lake, CALENDAR).expected
        assert same == (spec.name != "lifelong")
