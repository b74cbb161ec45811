"""What a night reads and writes: as much as the day's users ask for, however long the log of others is."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from jobs import rewards, sequences
from pipelines.ray_tables import replace_days
from schemas.calendar import calendar_of
from schemas.config import Config, RewardsConfig
from schemas.lake import Lake
from schemas.tables import PARTITION, TABLES

FIRST = datetime.date(2026, 3, 1)
TODAY = FIRST + datetime.timedelta(days=40)
SEEN_BEFORE = TODAY - datetime.timedelta(days=3)  # when the day's users were there last
ACTIVE, OTHERS, EVENTS = range(20), range(100, 400), 60  # users of today and of the quiet days; events of a row
CONFIG = Config(rewards=RewardsConfig(history_days=5, population_days=3))


@dataclass(frozen=True)
class Night:
    """Bytes that the stages read, and the bytes of the tables' files."""

    read: Mapping[str, int]
    there: Mapping[str, int]


def rows(name: str, day: datetime.date, users: range) -> pa.Table:
    """A row a user, with arrays that do not compress."""
    chance = np.random.default_rng(day.toordinal())
    columns = {}
    for field in TABLES[name].schema:
        if field.name == PARTITION:
            values = [day] * len(users)
        elif field.name == "attributes":
            values = [[]] * len(users)
        elif pa.types.is_list(field.type):
            numbers = chance.integers(0, 1 << 30, (len(users), EVENTS))
            values = list(numbers % 512 if field.name.endswith("feedback") else np.sort(numbers, axis=1))
        else:
            values = list(users)
        columns[field.name] = pa.array(values, field.type)
    return pa.table(columns)


def bytes_by_stage(spark: SparkSession) -> dict[int, int]:
    """Read by each of Spark's stages that the session still remembers (it forgets the oldest)."""
    context = spark.sparkContext
    jvm = context._jvm
    quantiles = context._gateway.new_array(jvm.double, 0)
    stages = context._jsc.sc().statusStore().stageList(None, False, False, quantiles, jvm.java.util.ArrayList())
    listed = (stages.apply(number) for number in range(stages.size()))
    return {stage.stageId(): stage.inputBytes() for stage in listed}


def bytes_read(spark: SparkSession, work: Callable[[], object]) -> int:
    """By the stages of ``work``."""
    before = max(bytes_by_stage(spark), default=-1)
    work()
    return sum(read for stage, read in bytes_by_stage(spark).items() if stage > before)


def night(spark: SparkSession, lake: Lake, quiet_days: int) -> Night:
    """A night over a log whose first days are of other users alone."""
    days = [*(FIRST + datetime.timedelta(days=n) for n in range(quiet_days)), SEEN_BEFORE, TODAY]
    stamps = dict.fromkeys(days, "made")
    for name in ("user_sequences", "user_features"):
        made = [rows(name, day, ACTIVE if day >= SEEN_BEFORE else OTHERS) for day in days]
        replace_days(lake, name, pa.concat_tables(made[: len(days) - (name == "user_features")]), stamps)
    replace_days(lake, "users", TABLES["users"].schema.empty_table(), stamps)
    calendar, before = calendar_of(days, CONFIG.split), lake.rows_by_day("user_features")
    pins = {name: lake.open(name).version() for name in lake.tables()}
    todo = {TODAY: "new"}
    work: dict[str, Callable[[], object]] = {
        "user_features": lambda: sequences.write_features(
            spark, lake, CONFIG, calendar, todo, pins, pins["user_sequences"]
        ),
        "rewards": lambda: rewards.run(spark, lake, CONFIG, calendar, {"rewards": todo}, pins),
    }
    read = {stage: bytes_read(spark, made) for stage, made in work.items()}
    assert lake.rows_by_day("user_features") == before | {TODAY: len(ACTIVE)}
    assert lake.rows_by_day("rewards") == {TODAY: len(ACTIVE) * EVENTS}
    there = {name: sum(lake.bytes_by_day(name).values()) for name in ("user_sequences", "user_features")}
    return Night(read, there)


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> list[Night]:
    """Over a log, and over one with as many days more."""
    return [night(spark, Lake(str(tmp_path_factory.mktemp("log"))), quiet_days) for quiet_days in (10, 20)]


@pytest.mark.parametrize(("stage", "grown"), [("user_features", "user_features"), ("rewards", "user_sequences")])
def test_what_a_night_reads_does_not_grow_with_the_days_of_other_users(nights: list[Night], stage: str, grown: str) -> None:
    short, long = nights
    more = long.there[grown] - short.there[grown]
    assert short.read[stage] > 1_000 * len(ACTIVE)  # the counter counts
    assert long.read[stage] - short.read[stage] < 0.05 * more  # footers and keys
