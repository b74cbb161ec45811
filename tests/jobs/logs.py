"""Random logs full of ties, and what the four feature jobs should make of them, by brute force in plain Python.

The references look at all events of a user for each answer, so they are slow, short and free of clever steps.
"""

from __future__ import annotations

import datetime
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from jobs.arrow_files import ArrowRows
from schemas.config import Config
from schemas.feedback import BITS, FLAGS, RATED_HIGH, mask_of
from schemas.tables import TABLES

FIRST_DAY = datetime.date(2026, 3, 1)
DAY_US = 86_400_000_000
EPOCH = datetime.date(1970, 1, 1)
Row = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """One impression. `flags` maps the feedback columns to True, False or None."""

    impression_id: int
    request_id: int
    user_id: int
    item_id: int
    ts_us: int
    play_ms: int | None = None
    duration_ms: int | None = None
    rating: float | None = None
    flags: dict[str, bool | None] = field(default_factory=dict)

    @property
    def date(self) -> datetime.date:
        return EPOCH + datetime.timedelta(days=self.ts_us // DAY_US)

    def feedback(self, threshold: float) -> int:
        bits = sum(BITS[name] for name in FLAGS if self.flags.get(name))
        return bits | (BITS[RATED_HIGH] if self.rating is not None and self.rating >= threshold else 0)


def midnight_us(day: datetime.date) -> int:
    return (day - EPOCH).days * DAY_US


def days_from(count: int) -> list[datetime.date]:
    return [FIRST_DAY + datetime.timedelta(days=i) for i in range(count)]


def random_log(seed: int, users: int = 40, days: int = 5, items: int = 15, requests: int = 6) -> list[Event]:
    """Up to `requests` a day, each of 1 to 4 impressions on a coarse clock: ties within and between requests, overlapping
    requests of a user, repeated items, a request over midnight, users who skip days, unknown plays and durations."""
    rng = np.random.default_rng(seed)
    events: list[Event] = []
    for user in range(users):
        for day in days_from(days):
            if rng.random() < 0.3:
                continue
            for _ in range(rng.integers(1, requests + 1)):
                request = int(rng.integers(1 << 62))
                start = midnight_us(day) + int(rng.integers(0, 12)) * 7_200_000_000
                for _ in range(rng.integers(1, 5)):
                    late = int(rng.choice([0, 0, 1, 3_600_000_000, 7_200_000_000]))
                    events.append(random_event(rng, user, request, start + late, items))
    last = FIRST_DAY + datetime.timedelta(days=days)
    return [event for event in events if event.date < last]


def random_event(rng: np.random.Generator, user: int, request: int, ts_us: int, items: int) -> Event:
    flags = {name: [None, False, True][rng.choice(3, p=[0.2, 0.6, 0.2])] for name in FLAGS}
    return Event(
        impression_id=int(rng.integers(1 << 62)),
        request_id=request,
        user_id=user,
        item_id=int(rng.integers(items)),
        ts_us=ts_us,
        play_ms=None if rng.random() < 0.15 else int(rng.integers(0, 6)) * 1000,
        duration_ms=None if rng.random() < 0.15 else int(rng.choice([500, 1000, 3000, 4000, 9000])),
        rating=None if rng.random() < 0.5 else float(rng.integers(1, 11)) / 2,
        flags=flags,
    )


def random_catalogue(seed: int, days: int = 5, items: int = 15) -> list[Row]:
    """Rows of `items`: some change their author, some have none, some appear late, one is never there."""
    rng = np.random.default_rng(seed)
    rows = []
    for item in range(items - 1):
        for day in sorted(rng.choice(days, size=rng.integers(1, 4), replace=False)):
            author = None if rng.random() < 0.2 else int(rng.integers(100))
            rows.append({"item_id": item, "date": days_from(days)[day], "author_id": author, "tags": [], "attributes": []})
    return rows


def random_users(seed: int, users: int = 40, days: int = 5) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(1, users):
        for day in sorted(rng.choice(days, size=rng.integers(1, 4), replace=False)):
            rows.append({"user_id": user, "date": days_from(days)[day], "attributes": [f"age={rng.integers(9)}"]})
    return rows


def poisoned_after(events: list[Event], day: datetime.date) -> list[Event]:
    """Every event after `day` with other items, plays and feedback, and one more of each."""
    changed = []
    for event in events:
        if event.date <= day:
            changed.append(event)
            continue
        other = replace(
            event, item_id=event.item_id + 7, play_ms=99_000, duration_ms=3000, flags=dict.fromkeys(FLAGS, True)
        )
        changed += [other, replace(other, impression_id=event.impression_id ^ (1 << 62), request_id=event.request_id ^ 1)]
    return changed


def impressions_frame(spark: SparkSession, events: list[Event]) -> DataFrame:
    rows = [
        {
            "impression_id": e.impression_id,
            "request_id": e.request_id,
            "user_id": e.user_id,
            "item_id": e.item_id,
            "ts": datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(microseconds=e.ts_us),
            "date": e.date,
            "duration_ms": e.duration_ms,
            "play_ms": e.play_ms,
            "rating": e.rating,
            **e.flags,
        }
        for e in events
    ]
    return table_frame(spark, "impressions", rows)


def table_frame(spark: SparkSession, name: str, rows: list[Row]) -> DataFrame:
    """`rows` with the columns of the table's contract; a missing key is null."""
    schema = TABLES[name].schema
    return spark.createDataFrame(pa.Table.from_pylist([{n: r.get(n) for n in schema.names} for r in rows], schema))


def collected(rows: DataFrame | ArrowRows, name: str) -> list[Row]:
    """The rows as plain data in the order of the table's key."""
    table, rows = TABLES[name], rows.frame() if isinstance(rows, ArrowRows) else rows
    assert set(rows.columns) == set(table.columns)
    return by_key(rows.select(*table.columns).toArrow().to_pylist(), name)


def by_key(rows: list[Row], name: str) -> list[Row]:
    return sorted(rows, key=lambda row: [row[k] for k in (*TABLES[name].key, "date")])


# --- references ---------------------------------------------------------------------------------------------------------


def author_of(items: list[Row], item: int, day: datetime.date) -> int:
    known = [row for row in items if row["item_id"] == item and row["date"] <= day]
    author = max(known, key=lambda row: row["date"])["author_id"] if known else None
    return -1 if author is None else author


def attributes_of(users: list[Row], user: int, day: datetime.date, known_before: bool) -> list[str]:
    rows = sorted((row for row in users if row["user_id"] == user), key=lambda row: row["date"])
    before = [row for row in rows if row["date"] < day]
    if not known_before or not before:
        before = [row for row in rows if row["date"] <= day]
    return before[-1]["attributes"] if before else []


def in_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda e: (e.ts_us, e.impression_id))


def minus_one(value: int | None) -> int:
    return -1 if value is None else value


def arrays(events: list[Event], items: list[Row], config: Config, prefix: str = "") -> Row:
    """The six parallel arrays of an event history."""
    return {
        f"{prefix}item_ids": [e.item_id for e in events],
        f"{prefix}author_ids": [author_of(items, e.item_id, e.date) for e in events],
        f"{prefix}ts_us": [e.ts_us for e in events],
        f"{prefix}play_ms": [minus_one(e.play_ms) for e in events],
        f"{prefix}duration_ms": [minus_one(e.duration_ms) for e in events],
        f"{prefix}feedback": [e.feedback(config.source.rating_threshold) for e in events],
    }


def tails(events: list[Event], config: Config) -> tuple[list[Event], list[Event]]:
    """The last events and the last engaged events, each in time order."""
    mask, ordered = mask_of(config.sequences.engaged), in_order(events)
    engaged = [e for e in ordered if e.feedback(config.source.rating_threshold) & mask]
    return ordered[-config.sequences.short_length :], engaged[-config.sequences.positive_length :]


def grouped(events: list[Event], *names: str) -> dict[tuple[Any, ...], list[Event]]:
    groups: dict[tuple[Any, ...], list[Event]] = defaultdict(list)
    for event in in_order(events):
        groups[tuple(getattr(event, name) for name in names)].append(event)
    return groups


def reference_sequences(events: list[Event], items: list[Row], config: Config) -> list[Row]:
    rows = []
    for (user, day), own in grouped(events, "user_id", "date").items():
        ids = {"impression_ids": [e.impression_id for e in own], "request_ids": [e.request_id for e in own]}
        rows.append({"user_id": user, "date": day, **ids, **arrays(own, items, config)})
    return by_key(rows, "user_sequences")


def reference_features(events: list[Event], items: list[Row], users: list[Row], config: Config) -> list[Row]:
    rows = []
    for user, day in grouped(events, "user_id", "date"):
        short, positive = tails([e for e in events if e.user_id == user and e.date <= day], config)
        row = {"user_id": user, "date": day, "attributes": attributes_of(users, user, day, known_before=False)}
        rows.append({**row, **arrays(short, items, config, "short_"), **arrays(positive, items, config, "positive_")})
    return by_key(rows, "user_features")


def figure_3(a: int, b: int, c: int) -> tuple[int, list[Event]]:
    """The start of the day, and the paper's two users in milliseconds after it: user 1 sees a, b at 1, 2 and c at 4; user 2
    sees b at 2 and c at 3."""
    start = midnight_us(FIRST_DAY)
    shown = [(1, a, 1), (1, b, 2), (1, c, 4), (2, b, 2), (2, c, 3)]
    return start, [
        Event(i, i, user, item, start + t * 1000, play_ms=1000, duration_ms=2000, flags={"click": True})
        for i, (user, item, t) in enumerate(shown)
    ]


def reference_examples(events: list[Event], items: list[Row], users: list[Row], config: Config) -> list[Row]:
    """One row a user, day and slice by the first ts of a request."""
    slice_of = {"request": lambda us: us, "hour": lambda us: us // 3_600_000_000, "day": lambda us: 0}[
        config.organise.slice
    ]
    examples = defaultdict(list)
    for (user, day, request), targets in grouped(events, "user_id", "date", "request_id").items():
        examples[user, day, slice_of(targets[0].ts_us)].append((targets[0].ts_us, request, targets))
    rows = []
    for (user, day, _), requests in examples.items():
        requests.sort(key=lambda found: found[:2])
        first, last = requests[0][0], requests[-1][0]
        own = [e for e in events if e.user_id == user and e.ts_us < last]
        short, positive = tails([e for e in own if e.ts_us < first], config)
        within = [e for e in own if e.ts_us >= first]
        context = in_order(list({e.impression_id: e for e in [*short, *positive, *within]}.values()))
        attributes = attributes_of(users, user, day, known_before=True)
        rows.append(reference_example(user, day, attributes, context, requests, items, config))
    return by_key(rows, "training_examples")


def reference_example(
    user: int,
    day: datetime.date,
    attributes: list[str],
    context: list[Event],
    requests: list[tuple[int, int, list[Event]]],
    items: list[Row],
    config: Config,
) -> Row:
    """A row of training_examples from its context and its requests (first ts, id, targets), both in time order."""
    targets = [e for *_, own in requests for e in own]
    target_arrays = arrays(targets, items, config, "target_")
    return {
        "user_id": user,
        "date": day,
        "slice_us": requests[0][0],
        "attributes": attributes,
        **arrays(context, items, config, "context_"),
        "request_ids": [request for _, request, _ in requests],
        "request_ts_us": [first for first, *_ in requests],
        "history_end": [sum(e.ts_us < first for e in context) for first, *_ in requests],
        "target_start": np.cumsum([0, *(len(own) for *_, own in requests)]).tolist(),
        "target_impression_ids": [e.impression_id for e in targets],
        **{
            f"target_{name}": target_arrays[f"target_{name}"] for name in ("item_ids", "play_ms", "duration_ms", "feedback")
        },
    }


def reference_pairs(events: list[Event], config: Config) -> list[Row]:
    """Sums in the order of distances, as the job does: floating-point sums depend on it."""
    mask, settings = mask_of(config.targets.positive), config.item_pairs
    counts: dict[tuple[int, int, datetime.date], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    positive = [e for e in events if e.feedback(config.source.rating_threshold) & mask]
    for own in grouped(positive, "user_id").values():
        for later, event in enumerate(own):
            for earlier in range(max(0, later - settings.window), later):
                other = own[earlier]
                gap = event.ts_us - other.ts_us
                if other.item_id != event.item_id and gap <= settings.max_gap_hours * 3_600_000_000:
                    key = (min(event.item_id, other.item_id), max(event.item_id, other.item_id), event.date)
                    counts[key][later - earlier] += 1
    rows = []
    for (a, b, day), distances in counts.items():
        weight = 0.0
        for distance in sorted(distances):
            weight += distances[distance] / distance
        rows.append({"item_a": a, "item_b": b, "kind": "cooccurrence", "weight": weight, "date": day})
    return by_key(rows, "item_pairs")


def reference_rewards(events: list[Event], config: Config) -> list[Row]:
    settings, negative = config.rewards, mask_of(config.rewards.negative)

    def bucket(event: Event) -> int | None:
        if event.duration_ms is None:
            return None
        return math.floor(math.log(event.duration_ms / 1000 + settings.epsilon, settings.bucket_base))

    def play_bin(event: Event) -> int:
        return min(1000, math.floor(event.play_ms * 100 / (settings.bucket_base ** (bucket(event) + 1) * 1000)))

    known = [event for event in events if event.play_ms is not None and event.duration_ms is not None]

    def pools(event: Event) -> Iterator[tuple[str, int, list[bool]]]:
        """Name, least size, and for each play of the pool whether it is no longer."""
        own = [e for e in known if e.user_id == event.user_id and e.ts_us < event.ts_us]
        own = [e for e in own if (event.date - e.date).days <= settings.history_days]
        beside = [e for e in own if abs(bucket(e) - bucket(event)) <= 1]
        yield "own", settings.min_bucket, [e.play_ms <= event.play_ms for e in beside if bucket(e) == bucket(event)]
        if "neighbours" in settings.backoff:
            yield "neighbours", settings.min_bucket, [e.play_ms <= event.play_ms for e in beside]
        if "population" in settings.backoff:
            days = range(1, settings.population_days + 1)
            shown = [e for e in known if (event.date - e.date).days in days and bucket(e) == bucket(event)]
            yield "population", settings.min_population, [play_bin(e) <= play_bin(event) for e in shown]

    rows = []
    for event in events:
        found = (pool for pool in (pools(event) if event in known else ()) if len(pool[2]) >= max(1, pool[1]))
        name, _, no_longer = next(found, (None, 0, []))
        rows.append(
            {
                "impression_id": event.impression_id,
                "user_id": event.user_id,
                "date": event.date,
                "bucket": bucket(event),
                "quantile": sum(no_longer) / len(no_longer) if name else None,
                "pool": name,
                "negative": bool(event.feedback(config.source.rating_threshold) & negative),
            }
        )
    return by_key(rows, "rewards")
