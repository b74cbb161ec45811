"""The log that every system reads: simulated impressions, items and users as Delta tables, a tenth of the rows a day.

Sizes grow by users. A user has about 100 events on ten days, and one in a thousand has 10,000, which is a tenth of all
rows: a share of the log stays as skewed at every size. A request shows 3 to 8 items at one time, on a clock of seconds, so
that requests of a heavy user tie now and then. A tenth of the items changes its author in the middle of the log.
"""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, WriterProperties, write_deltalake

from schemas.lake import Lake, commit_metadata
from schemas.tables import PARTITION, TABLES

FIRST_DAY = datetime.date(2026, 3, 1)
DAYS = [FIRST_DAY + datetime.timedelta(days=number) for number in range(10)]
EVENTS_A_USER = 100
HEAVY_EVENTS, ONE_IN = 10_000, 1_000
MEAN_REQUEST = 5.0
ITEMS, AUTHORS = 50_000, 5_000
LONGEST_MS = 300_000
DAY_S = 86_400
MIXERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
Column = np.ndarray


def make(root: Path, impressions: int, seed: int = 0) -> Lake:
    """The lake below `root` with the tables impressions, items and users; made once, whole or not at all."""
    done = root / "impressions.done"
    lake = Lake(str(root))
    if done.is_file():
        return lake
    shutil.rmtree(root, ignore_errors=True)
    rng = np.random.default_rng([impressions, seed])
    durations = np.exp(rng.normal(9.6, 0.9, ITEMS)).astype(np.int64).clip(500, LONGEST_MS)
    requests = requests_of(rng, impressions)
    for number, day in enumerate(DAYS):
        write(lake, "impressions", day_of(rng, requests, number, durations), [day])
    write(lake, "items", items(rng, durations), DAYS)
    write(lake, "users", users(rng, int(requests["user"].max()) + 1), DAYS)
    done.touch()
    return lake


def write(lake: Lake, name: str, columns: dict[str, Column | pa.Array], days: list[datetime.date]) -> None:
    schema = TABLES[name].schema
    size = len(columns[schema.names[0]])
    arrays = [columns[f.name] if f.name in columns else pa.nulls(size, f.type) for f in schema]
    rows = pa.table([pa.array(a).cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)
    stamp = commit_metadata("ingest", dict.fromkeys(days, "simulated"))
    properties = CommitProperties(custom_metadata={"userMetadata": stamp})
    write_deltalake(
        lake.path(name),
        rows,
        mode="append",
        partition_by=[PARTITION],
        commit_properties=properties,
        writer_properties=WriterProperties(compression="ZSTD"),
    )


def requests_of(rng: np.random.Generator, impressions: int) -> dict[str, Column]:
    """user, day, second and size of each request; sizes sum to `impressions`."""
    total = impressions // EVENTS_A_USER
    mean = (EVENTS_A_USER - HEAVY_EVENTS / ONE_IN) / MEAN_REQUEST
    counts = rng.geometric(1 / mean, total * 6 // 5)  # more than needed: the last users are cut off
    counts[::ONE_IN] = int(HEAVY_EVENTS / MEAN_REQUEST)
    sizes = 3 + rng.binomial(5, 0.4, counts.sum())
    kept = int(np.searchsorted(np.cumsum(sizes), impressions)) + 1
    sizes = sizes[:kept]
    sizes[-1] -= sizes.sum() - impressions
    return {
        "user": np.repeat(np.arange(len(counts)), counts)[:kept],
        "day": rng.integers(0, len(DAYS), kept),
        "second": rng.integers(0, DAY_S, kept),
        "size": sizes,
    }


def day_of(
    rng: np.random.Generator, requests: dict[str, Column], number: int, durations: Column
) -> dict[str, Column | pa.Array]:
    """The columns of impressions of one day, in the order in which ingest writes them: by user and time."""
    chosen = np.flatnonzero(requests["day"] == number)
    chosen = chosen[np.lexsort((requests["second"][chosen], requests["user"][chosen]))]
    sizes = requests["size"][chosen]
    user, request = (np.repeat(values, sizes) for values in (requests["user"][chosen], chosen))
    slot = np.arange(len(request)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    start = (DAYS[number] - datetime.date(1970, 1, 1)).days * DAY_S
    ts_us = np.repeat((start + requests["second"][chosen]) * 1_000_000, sizes)
    item = np.minimum((ITEMS * rng.random(len(user)) ** 2.5).astype(np.int64), ITEMS - 1)
    return {
        "impression_id": mixed(request, slot + 1),
        "request_id": mixed(request, np.zeros_like(slot)),
        "user_id": user,
        "item_id": item,
        "ts": pa.array(ts_us).cast(pa.timestamp("us", tz="UTC")),
        "date": pa.array(np.full(len(user), start // DAY_S, np.int32)).cast(pa.date32()),
        "scene": pa.array(np.where(rng.random(len(user)) < 0.85, "1", "0")),
        **feedback(rng, durations[item]),
    }


def feedback(rng: np.random.Generator, duration: Column) -> dict[str, Column]:
    """A third of the impressions is positive and played for long; what is left is skipped after a glance."""
    size = len(duration)
    positive = rng.random(size) < 0.33
    share = np.where(positive, 1.5 * rng.random(size) ** 0.5, 0.3 * rng.random(size))
    play = (share * duration).astype(np.int64)
    rare = {"like": 0.1, "follow": 0.01, "comment": 0.008, "forward": 0.004, "profile_enter": 0.04}
    return {
        "duration_ms": duration,
        "play_ms": play,
        "click": positive & (rng.random(size) < 0.9),
        "long_view": positive & (play >= np.minimum(0.8 * duration, 18_000)),
        **{name: positive & (rng.random(size) < probability) for name, probability in rare.items()},
        "hate": ~positive & (rng.random(size) < 0.02),
    }


def items(rng: np.random.Generator, durations: Column) -> dict[str, Column | pa.Array]:
    changed = np.flatnonzero(rng.random(ITEMS) < 0.1)
    size = ITEMS + len(changed)
    dates = np.concatenate([np.full(ITEMS, 0), np.full(len(changed), len(DAYS) // 2)])
    item = np.concatenate([np.arange(ITEMS), changed])
    return {
        "item_id": item,
        "date": pa.array([DAYS[number] for number in dates]),
        "author_id": rng.integers(0, AUTHORS, size),
        "duration_ms": durations[item],
        "tags": pa.array([[]] * size, pa.list_(pa.string())),
        "attributes": pa.array([[]] * size, pa.list_(pa.string())),
    }


def users(rng: np.random.Generator, count: int) -> dict[str, Column | pa.Array]:
    attributes = np.char.add("age=", rng.integers(0, 8, (count, 3)).astype(str)).ravel()
    return {
        "user_id": np.arange(count),
        "date": pa.array([FIRST_DAY] * count),
        "attributes": pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * 3), pa.array(attributes)),
    }


def mixed(first: Column, second: Column) -> Column:
    """int64 as scattered as the hashes of a real log (splitmix64)."""
    with np.errstate(over="ignore"):
        x = first.astype(np.uint64) * np.uint64(16) + second.astype(np.uint64) + np.uint64(1)
        x = x * np.uint64(MIXERS[0])
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIXERS[1])
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIXERS[2])
        return (x ^ (x >> np.uint64(31))).view(np.int64)
