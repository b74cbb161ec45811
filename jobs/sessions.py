"""The impressions of one request as a session, and whether it is of high quality (OneRec, section 3.2).

The paper names three marks: the user watched so many of its items, for so long in all, and interacted; whether one or all
of them are needed it leaves open, so that is `sessions.marks_needed`. An item is watched where it was played for
`watched_ms`, or to its end if that is shorter, or has a bit of `watched`. Unknown play times add nothing.

The context of a session is that of its request in `training_examples`: a model that learns whole sessions as targets finds
it there by user_id and request_id.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.arrow_files import ArrowRows, Batches
from jobs.jagged import Ints, dates, lists, pieces, ranges, starts
from jobs.slices import Requests
from jobs.tables import read_days, replace_days
from jobs.timelines import EVENTS_A_BATCH, IDS, Timelines, task_rows, tasks_for
from schemas.calendar import Calendar
from schemas.config import Config, SessionsConfig
from schemas.feedback import mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import SESSIONS

SHOWN = ("impression_ids", "item_ids", "ts_us", "play_ms", "duration_ms", "feedback")


def run(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Mapping[str, Identities],
    pins: Mapping[str, int],
) -> dict[str, int]:
    """Writes the stale days of sessions in one pass; the version written."""
    days = todo.get("sessions")
    if not days:
        return {}
    version = pins["user_sequences"]
    rows = sessions_of(
        read_days(spark, lake, "user_sequences", days, version), config.sessions, tasks_for(lake, sorted(days), version)
    )
    return {"sessions": replace_days(lake, "sessions", [rows], days)}


def sessions_of(sequences: DataFrame, settings: SessionsConfig, tasks: int = 1) -> ArrowRows:
    """Rows of sessions from rows of user_sequences; a request over midnight is two, one a day."""
    nobody = sequences.withColumn("attributes", F.array().cast("array<string>"))
    making = functools.partial(sessions_in, settings=settings)
    return ArrowRows("sessions", task_rows(nobody, None, tasks, IDS), making)


def sessions_in(batches: Batches, settings: SessionsConfig) -> Iterator[pa.RecordBatch]:
    """Rows of sessions, in order of day and start."""
    lines = Timelines.of(batches, 0)
    if lines is None:
        return
    requests = Requests.of(lines)
    days, users = lines.days[requests.rows], lines.users[requests.rows]
    order = np.lexsort((requests.ids, users, requests.first_us, days))
    sizes = np.diff(requests.target_offsets)[order]
    for part in pieces(starts(days[order]), sizes, EVENTS_A_BATCH):
        rows = order[part]
        places, offsets = ranges(requests.target_offsets[rows], requests.target_offsets[rows + 1])
        events = {name: lines.events[name][requests.targets[places]] for name in SHOWN}
        yield pa.record_batch(
            {
                "user_id": users[rows],
                "date": dates(days[rows]),
                "request_id": requests.ids[rows],
                "start_us": requests.first_us[rows],
                **{name: lists(offsets, values) for name, values in events.items()},
                **marks(events, offsets[:-1], settings),
            }
        )


def marks(events: Mapping[str, np.ndarray], first: Ints, settings: SessionsConfig) -> dict[str, np.ndarray]:
    """watched int32, watch_ms int64, interacted and high_quality bool of each session; its events begin at `first`."""
    play_ms, feedback = events["play_ms"], events["feedback"]
    longest = np.where(events["duration_ms"] > 0, events["duration_ms"], settings.watched_ms)
    enough = np.minimum(longest, settings.watched_ms)
    is_watched = (play_ms >= enough) | ((feedback & mask_of(settings.watched)) != 0)
    watched = np.add.reduceat(is_watched.astype(np.int32), first)
    watch_ms = np.add.reduceat(np.maximum(play_ms, 0), first)
    interacted = np.logical_or.reduceat((feedback & mask_of(settings.interactions)) != 0, first)
    found = (watched >= settings.min_watched).astype(int) + (watch_ms >= settings.min_watch_ms) + interacted
    return {
        "watched": watched,
        "watch_ms": watch_ms,
        "interacted": interacted,
        "high_quality": found >= settings.marks_needed,
    }


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(SESSIONS, run))
