"""A tiny lake for the stages that read the catalogue: items in topics, pairs within topics, a few plays."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.engines import Engines
from pipelines.ray_tables import read_arrow, replace_days
from pipelines.stage import StageContext
from schemas.calendar import Calendar, calendar_of
from schemas.config import Config
from schemas.feedback import BITS
from schemas.lake import Lake
from schemas.lineage import STAGES, plan
from schemas.tables import TABLES

DAYS = tuple(datetime.date(2026, 1, day) for day in range(1, 6))  # three train, one validates, one tests
FIT_DAY = DAYS[2]
TOPICS = 6
DAY_US = 86_400_000_000


def topic_of(item: int) -> int:
    return item % TOPICS


def item_row(item: int, day: datetime.date, **values: Any) -> dict[str, Any]:
    topic = topic_of(item)
    row = dict.fromkeys(TABLES["items"].columns)
    row |= {"item_id": item, "date": day, "author_id": 100 + topic * 10 + item // TOPICS % 3, "tags": [f"topic {topic}"]}
    return row | {"attributes": ["type=normal"], "duration_ms": 10_000 + item} | values


def catalogue(old: int = 120, new_a_day: int = 10) -> list[dict[str, Any]]:
    """`old` items on the first day, then `new_a_day` on each later one."""
    rows = [item_row(item, DAYS[0]) for item in range(old)]
    for place, day in enumerate(DAYS[1:]):
        rows += [item_row(1000 + place * new_a_day + i, day) for i in range(new_a_day)]
    return rows


def pairs(day: datetime.date, items: int = 120) -> list[dict[str, Any]]:
    """Each item with three others of its topic; every seventh item has none."""
    chosen = np.random.default_rng(day.day).integers(1, items // TOPICS, (items, 3))
    found = set()
    for item in range(items):
        for step in chosen[item]:
            other = (item + int(step) * TOPICS) % items
            if item % 7 and other % 7 and other != item:
                found.add((min(item, other), max(item, other)))
    return [
        {"item_a": a, "item_b": b, "kind": "cooccurrence", "weight": 1.0 + a % 3, "date": day} for a, b in sorted(found)
    ]


def sequence(user: int, day: datetime.date, items: list[int], liked: list[bool]) -> dict[str, Any]:
    start = (day - datetime.date(1970, 1, 1)).days * DAY_US
    n = len(items)
    return {
        "user_id": user,
        "date": day,
        "impression_ids": [user * 10_000 + day.day * 100 + i for i in range(n)],
        "request_ids": list(range(n)),
        "item_ids": items,
        "author_ids": [-1] * n,
        "ts_us": [start + 1000 + i for i in range(n)],
        "play_ms": [-1] * n,
        "duration_ms": [-1] * n,
        "feedback": [BITS["click"] if like else 0 for like in liked],
    }


def write(lake: Lake, name: str, rows: list[dict[str, Any]], days: tuple[datetime.date, ...], mark: str = "1") -> int:
    """Replaces the partitions of `days` by those of `rows` that lie in them."""
    kept = [row for row in rows if row["date"] in days]
    return replace_days(lake, name, pa.Table.from_pylist(kept, schema=TABLES[name].schema), {d: f"{d}{mark}" for d in days})


def small_lake(lake: Lake, days: tuple[datetime.date, ...] = DAYS, items: list[dict[str, Any]] | None = None) -> None:
    write(lake, "items", items or catalogue(), days)
    write(lake, "item_pairs", [row for day in days for row in pairs(day)], days)
    plays = [sequence(user, day, [user, user + 6, 5], [True, day.day > 1, False]) for user in range(20) for day in days]
    write(lake, "user_sequences", plays, days)


def rows_by_item(lake: Lake, table: str) -> dict[int, dict[str, Any]]:
    """All rows of a table that has one an item."""
    return {row["item_id"]: row for row in read_arrow(lake, table, lake.open(table).version()).to_pylist()}


def calendar(days: tuple[datetime.date, ...] = DAYS, config: Config | None = None) -> Calendar:
    """The whole log's roles, cut at the last of `days`: a log that grows keeps the fit day of its split."""
    whole = calendar_of(DAYS, (config or Config()).split)
    return Calendar(tuple(d for d in whole.days if d in days), whole.train, whole.validation, whole.test)


def context(
    stage: str,
    lake: Lake,
    engines: Engines,
    config: Config,
    days: tuple[datetime.date, ...] = DAYS,
    force: bool = False,
) -> StageContext:
    spec = next(s for s in STAGES if s.name == stage)
    stage_plan = plan(spec, config, lake, calendar(days, config), force)
    assert not stage_plan.missing
    names = {read.source for output in spec.outputs for read in spec.reads(output, config) if read.source in TABLES}
    pins = {name: v for name in names if (v := lake.version(name)) is not None}
    return StageContext(config, lake, calendar(days, config), stage_plan, engines, pins, lambda _: None)
