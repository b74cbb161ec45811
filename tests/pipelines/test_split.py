"""The split by user and by day against a brute-force reference."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipelines.split import NEVER, Roles, roles_by_day, roles_by_user
from schemas.calendar import calendar_of
from schemas.config import SplitConfig

POSITIVE = 1
EVENTS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12), st.booleans()), min_size=1, max_size=40)


def sequences(events: list[tuple[int, int, bool]]) -> pa.Table:
    """One row a user and event, as user_sequences may split a user over days."""
    return pa.table(
        {
            "user_id": pa.array([u for u, _, _ in events], pa.int64()),
            "ts_us": pa.array([[t] for _, t, _ in events], pa.list_(pa.int64())),
            "feedback": pa.array([[POSITIVE if p else 2] for _, _, p in events], pa.list_(pa.int32())),
        }
    )


def reference(events: list[tuple[int, int, bool]], user: int, ts: int) -> str:
    times = sorted({t for u, t, positive in events if u == user and positive})
    if len(times) >= 2 and ts >= times[-1]:
        return "test"
    if len(times) >= 3 and ts >= times[-2]:
        return "validation"
    return "train"


def role_of(roles: Roles, user: int, ts: int) -> list[str]:
    asked = (np.array([user]), np.array([ts]))
    return [role for role in ("train", "validation", "test") if roles.select(*asked, role)[0]]


@given(EVENTS)
def test_by_user_the_last_positive_request_tests_and_the_one_before_validates(events: list[tuple[int, int, bool]]) -> None:
    roles = roles_by_user([sequences(events)], POSITIVE)
    for user, ts, _ in events:
        assert role_of(roles, user, ts) == [reference(events, user, ts)]


def test_by_day_in_the_zone_of_the_source() -> None:
    days = [datetime.date(2026, 1, day) for day in range(1, 5)]
    roles = roles_by_day(calendar_of(days, SplitConfig(validation_days=1, test_days=1)), "Asia/Shanghai")

    def at(day: int, hour: int) -> int:
        return int(datetime.datetime(2026, 1, day, hour, tzinfo=datetime.UTC).timestamp() * 1e6)

    assert role_of(roles, 1, at(2, 15)) == ["train"]  # 23 o'clock of day 2 in Shanghai
    assert role_of(roles, 1, at(2, 16)) == ["validation"]  # midnight of day 3
    assert role_of(roles, 1, at(3, 16)) == ["test"]


def test_a_user_with_one_positive_only_trains() -> None:
    roles = roles_by_user([sequences([(1, 5, True), (2, 1, True), (2, 2, True)])], POSITIVE)
    assert role_of(roles, 1, 5) == ["train"]
    assert role_of(roles, 2, 2) == ["test"]
    assert roles.thresholds(np.array([1, 9]))[1].tolist() == [NEVER, NEVER]
