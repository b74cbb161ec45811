"""A small lake of training examples, codes and items, and the same requests computed one by one."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import pyarrow as pa

from pipelines.ray_tables import replace_days
from schemas.calendar import Calendar, calendar_of
from schemas.config import Config, SplitConfig, TokenizeConfig, TrainConfig
from schemas.lake import Lake
from schemas.model_config import ModelConfig
from schemas.tables import ITEMS, LIFELONG_SEQUENCES, SEMANTIC_IDS, TRAINING_EXAMPLES

FIRST = datetime.date(2026, 1, 1)
DAYS = tuple(FIRST + datetime.timedelta(days=i) for i in range(5))  # three train, one validates, one tests
CODES = 8
CONFIG = Config(
    split=SplitConfig(validation_days=1, test_days=1),
    tokenize=TokenizeConfig(codes=CODES),
    model=ModelConfig(
        d_model=16, layers=2, heads=2, g_kv=2, embed_dim=4, short_length=3, positive_length=5, hash_buckets=50
    ),
    train=TrainConfig(epochs=2, batch_requests=8, segment_rows=30, checkpoint_steps=4, warmup_steps=3, min_log_interval=2),
)


def calendar() -> Calendar:
    return calendar_of(DAYS, CONFIG.split)


def day_us(day: datetime.date) -> int:
    return int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()) * 1_000_000


def example(rng: np.random.Generator, user: int, day: datetime.date, num_items: int) -> dict:
    """A random row of training_examples: 1 to 3 requests of 1 to 3 targets, a context of 0 to 9 events."""
    start = day_us(day) + int(rng.integers(0, 10**10))
    events, requests = int(rng.integers(0, 10)), int(rng.integers(1, 4))
    sizes = rng.integers(1, 4, requests)
    targets = int(sizes.sum())

    def ints(low: int, high: int, size: int) -> list[int]:
        return rng.integers(low, high, size).tolist()

    return {
        "user_id": user,
        "date": day,
        "slice_us": start,
        "attributes": [f"a={x}" for x in ints(0, 3, int(rng.integers(0, 3)))],
        "context_item_ids": ints(0, num_items + 3, events),
        "context_author_ids": ints(-1, 5, events),
        "context_ts_us": sorted(ints(start - 10**9, start, events)),
        "context_play_ms": ints(-1, 9000, events),
        "context_duration_ms": ints(-1, 9000, events),
        "context_feedback": ints(0, 4, events),
        "request_ids": ints(0, 10**6, requests),
        "request_ts_us": [start + i for i in range(requests)],
        "history_end": sorted(ints(0, events + 1, requests)),
        "target_start": [0, *np.cumsum(sizes).tolist()],
        "target_impression_ids": ints(0, 10**12, targets),
        "target_item_ids": ints(0, num_items + 3, targets),
        "target_play_ms": ints(-1, 9000, targets),
        "target_duration_ms": ints(-1, 9000, targets),
        "target_feedback": ints(0, 4, targets),
    }


def example_rows(rows_a_day: int, num_items: int = 40, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [example(rng, int(rng.integers(0, 10)), day, num_items) for day in DAYS for _ in range(rows_a_day)]


def table_of(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=TRAINING_EXAMPLES.schema)


def write_lake(lake: Lake, rows: list[dict], num_items: int = 40) -> dict[str, int]:
    """training_examples, semantic_ids and items (all known on the fit day but the last two); the pins."""
    rng = np.random.default_rng(1)
    known = [DAYS[4] if item >= num_items - 2 else DAYS[2] for item in range(num_items)]
    codes = [
        {"item_id": i, "date": known[i], "codes": rng.integers(0, CODES, 3).tolist(), "codebook_version": "c1", "rank": i}
        for i in range(num_items)
    ]
    items = [
        {"item_id": i, "date": known[i], "author_id": i % 5, "tags": [f"t{i % 4}"] * (i % 5), "attributes": []}
        for i in range(num_items)
    ]
    stamps = dict.fromkeys(DAYS, "x")
    lake.write_manifest("tokenize", "c1", {"levels": 3, "codes": CODES})
    return {
        "training_examples": replace_days(lake, "training_examples", table_of(rows), stamps),
        "semantic_ids": replace_days(lake, "semantic_ids", pa.Table.from_pylist(codes, schema=SEMANTIC_IDS.schema), stamps),
        "items": replace_days(lake, "items", pa.Table.from_pylist(items, schema=ITEMS.schema), stamps),
    }


def lifelong_rows(seed: int = 0, num_items: int = 40) -> list[dict]:
    """Random rows of lifelong_sequences, from two days before the examples on: seven of the ten users have some of them."""
    rng = np.random.default_rng(seed)
    rows = []
    for day in (FIRST - datetime.timedelta(days=2), FIRST - datetime.timedelta(days=1), *DAYS):
        for user in np.flatnonzero(rng.random(7) < 0.5).tolist():
            size = int(rng.integers(1, 7))
            lists = {"item_ids": (0, num_items + 3), "author_ids": (-1, 5), "ts_us": (0, day_us(day) + 86_400_000_000)}
            lists |= {"play_ms": (-1, 9000), "duration_ms": (-1, 9000), "feedback": (0, 4), "weights": (1, 90)}
            values = {name: rng.integers(low, high, size).tolist() for name, (low, high) in lists.items()}
            rows.append({"user_id": user, "date": day, **values, "ts_us": sorted(values["ts_us"])})
    return rows


def write_lifelong(lake: Lake, rows: list[dict]) -> int:
    table = pa.Table.from_pylist(rows, schema=LIFELONG_SEQUENCES.schema)
    return replace_days(lake, "lifelong_sequences", table, dict.fromkeys(sorted({row["date"] for row in rows}), "x"))


def with_lifelong(config: Config, **sizes: int) -> Config:
    """The model has the lifelong pathway."""
    made = dataclasses.replace(config.lifelong, enabled=True)
    return dataclasses.replace(config, lifelong=made, model=dataclasses.replace(config.model, **sizes))


def with_train(**changes: object) -> Config:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))
