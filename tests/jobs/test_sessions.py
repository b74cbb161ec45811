"""Sessions against brute force: every request once, with the marks of its quality."""

from __future__ import annotations

from collections import Counter

import pytest

from jobs.sessions import sessions_of
from schemas.config import Config, SessionsConfig
from schemas.feedback import mask_of
from tests.jobs import logs

SETTINGS = (
    SessionsConfig(watched_ms=1500, watched=("like",), min_watched=2, min_watch_ms=4000, interactions=("follow",)),
    SessionsConfig(watched_ms=700, watched=(), min_watched=1, min_watch_ms=9000, interactions=(), marks_needed=2),
    SessionsConfig(watched_ms=3000, min_watched=1, min_watch_ms=1000, interactions=("like", "hate"), marks_needed=3),
)


def reference(events: list[logs.Event], settings: SessionsConfig) -> list[logs.Row]:
    rows = []
    for (user, day, request), own in logs.grouped(events, "user_id", "date", "request_id").items():
        found = logs.arrays(own, [], Config())
        watched = sum(is_watched(event, settings) for event in own)
        watch_ms = sum(event.play_ms or 0 for event in own)
        interacted = any(event.feedback(4.0) & mask_of(settings.interactions) for event in own)
        marks = (watched >= settings.min_watched) + (watch_ms >= settings.min_watch_ms) + interacted
        rows.append(
            {
                "user_id": user,
                "date": day,
                "request_id": request,
                "start_us": own[0].ts_us,
                "impression_ids": [event.impression_id for event in own],
                **{name: values for name, values in found.items() if name != "author_ids"},
                "watched": watched,
                "watch_ms": watch_ms,
                "interacted": interacted,
                "high_quality": marks >= settings.marks_needed,
            }
        )
    return logs.by_key(rows, "sessions")


def is_watched(event: logs.Event, settings: SessionsConfig) -> bool:
    long_enough = min(settings.watched_ms, event.duration_ms or settings.watched_ms)
    by_time = event.play_ms is not None and event.play_ms >= long_enough
    return by_time or bool(event.feedback(4.0) & mask_of(settings.watched))


@pytest.mark.parametrize("seed", range(3))
def test_sessions_equal_brute_force(spark, seed):
    settings, events = SETTINGS[seed], logs.random_log(80 + seed)
    sequences = logs.table_frame(spark, "user_sequences", logs.reference_sequences(events, [], Config()))
    rows = logs.collected(sessions_of(sequences, settings, tasks=2), "sessions")
    assert rows == reference(events, settings)
    assert Counter(i for row in rows for i in row["impression_ids"]) == Counter(event.impression_id for event in events)
    assert {row["high_quality"] for row in rows} == {True, False}
