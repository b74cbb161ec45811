"""A Parquet log of which hardly a column has the type of its field in the lake, for `tests.jobs.broken_rows`."""

from __future__ import annotations

import datetime
import random
from decimal import Decimal
from functools import cache

import pyarrow as pa

from tests.jobs.broken_formats import BAD_NUMERALS, FIRST, LATEST, NUMERALS, TEXTS, ZONE, as_text, bad, f32, micros, of
from tests.jobs.broken_rows import Choice, Column, Format


def _naive_ns(rng: random.Random) -> Choice:
    """Nanoseconds without a zone: the source's own."""
    local = micros(FIRST) + rng.randrange(3 * 86_400) * 1_000_000 + 5
    if rng.random() < 0.02:
        local = micros(LATEST) + 8 * 3_600_000_000 + rng.randrange(2)
    return local * 1000 + 789, local - 8 * 3_600_000_000


_NAN, _INF = float("nan"), float("inf")
_NUMBERS = (
    *bad("is not a number", _NAN, _INF, -_INF, 1e300),
    *bad("is negative", -1.0),
    *bad("is out of range", 1e30, 604_800_001.0),
)
OWN_PARQUET = Format(
    (
        Column(
            "uid",
            "user_id",
            lambda rng: (float(n := rng.choice((rng.randrange(1000), 2**53))), n),
            [
                *bad("is missing", None, _NAN),
                *bad("is out of range", _INF, 1e300, 2.0**63, 2.0**53 + 2),
                (1.5, "is not an integer"),
                (-1.0, "is negative"),
            ],
        ),
        Column(
            "sku",
            "item_id",
            lambda rng: (n := rng.randrange(2**63), n),
            [(None, "is missing"), *bad("is out of range", 2**63, 2**64 - 1)],
        ),
        Column("at", "ts", _naive_ns, [(None, "is missing"), *bad("is out of range", 0, -1, 2**63 - 1, -(2**63) + 1)]),
        Column("req", "request_id", of((None, None), (7, "7"), (-1, "-1"))),
        Column("page", "scene", of(*map(as_text, (*TEXTS, "a\x00b")), (None, None))),
        Column("watch", "play_ms", of((None, None), (0.0, 0), (1500.4, 1500), (0.5, 1), (-0.0, 0)), _NUMBERS),
        Column("length", "duration_ms", of(*((t, v or None) for t, v in NUMERALS), (None, None)), BAD_NUMERALS),
        Column("stars", "rating", of((None, None), (Decimal("4.5"), 4.5), (Decimal("-0.1"), f32(-0.1)))),
        Column(
            "clicked",
            "click",
            of((None, None), (0, False), (1, True), (127, True)),
            bad("is neither a flag nor a count", -1),
        ),
        Column("hearts", "like", of((None, None), (True, True), (False, False))),
        Column(
            "lp",
            "behaviour_log_probs",
            of((None, None), ([], None), ([-0.5, -1.25], (-0.5, -1.25))),
            [*bad("is not a list of numbers", [None], [-1.0, _NAN], [-_INF]), ([0.5], "has a value above 0")],
        ),
        Column("cb", "behaviour_codebook", of((None, None), (20260101, "20260101"))),
        Column(
            "who",
            "behaviour_policy",
            of((None, None), (datetime.date(2026, 1, 1), "2026-01-01"), (datetime.date.max, "9999-12-31")),
        ),
    ),
    ZONE,
    now=LATEST - datetime.timedelta(days=1),
    future_days=1,
)


@cache
def parquet_types() -> dict[str, pa.DataType]:
    """Not one column is of the type that its field has in the lake."""
    return {
        "uid": pa.float64(),
        "sku": pa.uint64(),
        "at": pa.timestamp("ns"),
        "req": pa.int8(),
        "page": pa.large_string(),
        "watch": pa.float64(),
        "length": pa.string(),
        "stars": pa.decimal128(10, 4),
        "clicked": pa.int8(),
        "hearts": pa.bool_(),
        "lp": pa.list_(pa.float64()),
        "cb": pa.int32(),
        "who": pa.date32(),
    }
