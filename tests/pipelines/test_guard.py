"""A day unlike the days before it stops the run, with day, measure, value and band; every other day passes."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.guard import DayRates, add_flag_rates, check_days, counts_of, faults_of
from pipelines.ray_tables import replace_days
from schemas.config import Config, GuardConfig
from schemas.errors import ContractViolation
from schemas.feedback import FLAGS
from schemas.lake import Lake
from schemas.tables import TABLES

FIRST = datetime.date(2026, 1, 1)
GUARD = GuardConfig(days=3, min_rows=50, rows_at_least=0.3, rows_at_most=3.0)
ROWS = 400


def day_of(place: int) -> datetime.date:
    return FIRST + datetime.timedelta(days=place)


def impressions(
    place: int, rows: int = ROWS, click: float = 0.3, like: float | None = 0.05, known: float = 1.0
) -> pa.Table:
    """One day: the rates of clicks and likes (null: the source has none), the share of rows with a play time."""
    numbers = np.arange(rows)
    values: dict[str, Any] = {
        "impression_id": place * 100_000 + numbers,
        "request_id": numbers,
        "user_id": numbers,
        "item_id": numbers,
        "ts": pa.array([datetime.datetime.combine(day_of(place), datetime.time(), datetime.UTC)] * rows),
        "date": [day_of(place)] * rows,
        "click": numbers < click * rows,
        "play_ms": pa.array(numbers, mask=numbers >= known * rows),
        "like": pa.nulls(rows, pa.bool_()) if like is None else numbers < like * rows,
    }
    schema = TABLES["impressions"].schema
    return pa.table(
        {f.name: pa.array(values[f.name], f.type) if f.name in values else pa.nulls(rows, f.type) for f in schema}
    )


def lake_of_days(lake: Lake, days: list[pa.Table]) -> Lake:
    tables = pa.concat_tables(days)
    replace_days(lake, "impressions", tables, {day_of(place): f"identity {place}" for place in range(len(days))})
    return lake


def test_rates_are_those_of_the_rows(lake: Lake) -> None:
    lake_of_days(lake, [impressions(0), impressions(1, rows=200, click=0.5, like=None, known=0.25)])
    rates = counts_of(lake, [day_of(0), day_of(1)])
    add_flag_rates(lake, rates)
    assert (rates[day_of(0)].rows, rates[day_of(1)].rows) == (400, 200)
    assert rates[day_of(0)].flags == {"click": 0.3, "like": 0.05}
    assert rates[day_of(1)].flags == {"click": 0.5}
    assert rates[day_of(1)].nulls["play_ms"] == 0.75 and rates[day_of(0)].nulls["play_ms"] == 0
    assert rates[day_of(1)].nulls["like"] == rates[day_of(0)].nulls["hate"] == 1


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({}, None),
        ({"rows": 110}, "the number of rows is 110, and the days before it allow 120 to 1200"),
        ({"rows": 1300}, "the number of rows is 1300"),
        ({"rows": 0}, "the number of rows is 0"),
        ({"known": 0.5}, "the null rate of play_ms is 0.5, and the days before it allow 0 to 0.2"),
        ({"known": 0.85}, None),
        ({"like": None}, "the null rate of like is 1"),
        ({"click": 0.0}, "the rate of click is 0"),
        ({"click": 1.0, "rows": 1200, "like": 0.9}, "the rate of like is 0.9"),
        ({"like": 0.0}, None),  # 20 expected likes a day may be none by a factor of 4 and chance
    ],
)
def test_only_a_day_outside_the_band_is_refused(lake: Lake, last: dict[str, Any], words: str | None) -> None:
    lake_of_days(lake, [*(impressions(place) for place in range(3)), impressions(3, **last)])
    config = Config(guard=GUARD)
    if words is None:
        check_days(lake, config)
        return
    version = lake.version("impressions")
    with pytest.raises(ContractViolation, match="Day 2026-01-04 is unlike the 3 days before it") as caught:
        check_days(lake, config)
    assert words in str(caught.value) and "guard.enabled=false" in str(caught.value) and "\n" not in str(caught.value)
    assert lake.version("impressions") == version
    check_days(lake, dataclasses.replace(config, guard=dataclasses.replace(GUARD, enabled=False)))
    check_days(lake, config, [day_of(2)])  # another day, with too few before it


rates = st.builds(
    DayRates,
    rows=st.integers(50, 10**6),
    nulls=st.fixed_dictionaries({name: st.floats(0, 1) for name in FLAGS}),
    flags=st.fixed_dictionaries({name: st.floats(0, 1) for name in FLAGS}),
)


@settings(max_examples=50, deadline=None)
@given(rates, st.integers(1, 9))
def test_a_day_like_the_days_before_it_always_passes(day: DayRates, days: int) -> None:
    nulls = {name: min(rate, 0.9) for name, rate in day.nulls.items()}
    same = dataclasses.replace(day, nulls=nulls)
    assert list(faults_of(same, [same] * days, GUARD)) == []


@settings(max_examples=50, deadline=None)
@given(rates, st.floats(0, 1))
def test_a_wider_band_never_refuses_more(day: DayRates, slack: float) -> None:
    before = [DayRates(1000, dict.fromkeys(FLAGS, 0.5), dict.fromkeys(FLAGS, 0.1))] * 3
    wider = dataclasses.replace(
        GUARD,
        rows_at_least=GUARD.rows_at_least * (1 - slack),
        rows_at_most=GUARD.rows_at_most + slack,
        null_rate_band=GUARD.null_rate_band + slack,
        flag_rate_factor=GUARD.flag_rate_factor + slack,
    )
    nulls = {name: min(rate, 0.9) for name, rate in day.nulls.items()}
    day = dataclasses.replace(day, nulls=nulls)
    strict = {fault.measure for fault in faults_of(day, before, GUARD)}
    assert {fault.measure for fault in faults_of(day, before, wider)} <= strict


def test_few_rows_a_day_say_nothing() -> None:
    before = [DayRates(40), DayRates(10), DayRates(49)]
    assert list(faults_of(DayRates(4000), before, GUARD)) == []
