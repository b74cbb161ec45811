"""Rows of `training_examples` from plain requests, for tests of whatever reads them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from schemas.tables import TRAINING_EXAMPLES

DAY_US = 86_400_000_000
FIRST_DAY = datetime.date(2026, 1, 1)
FIRST_US = 20_454 * DAY_US  # its first instant in UTC


@dataclass(frozen=True)
class Request:
    """One user's request; events are (item, feedback), the history oldest first."""

    user: int
    ts_us: int
    targets: Sequence[tuple[int, int]]
    history: Sequence[tuple[int, int]] = ()

    @property
    def day(self) -> datetime.date:
        return FIRST_DAY + datetime.timedelta(days=(self.ts_us - FIRST_US) // DAY_US)


def examples_of(requests: Sequence[Request]) -> pa.Table:
    """One example a request, as the organiser's default slice makes them."""
    return slices_of([[request] for request in requests])


def slices_of(slices: Sequence[Sequence[Request]]) -> pa.Table:
    """One example a slice: requests of one user in time order that share the context of the last."""
    return pa.Table.from_pylist([_row(requests) for requests in slices], schema=TRAINING_EXAMPLES.schema)


def _row(requests: Sequence[Request]) -> dict[str, object]:
    first, context = requests[0], requests[-1].history
    targets = [target for request in requests for target in request.targets]
    starts = [0]
    for request in requests:
        starts.append(starts[-1] + len(request.targets))
    return {
        "user_id": first.user,
        "date": first.day,
        "slice_us": first.ts_us,
        "attributes": [],
        "context_item_ids": [item for item, _ in context],
        "context_author_ids": [-1] * len(context),
        "context_ts_us": [first.ts_us - len(context) + place for place in range(len(context))],
        "context_play_ms": [-1] * len(context),
        "context_duration_ms": [-1] * len(context),
        "context_feedback": [feedback for _, feedback in context],
        "request_ids": list(range(len(requests))),
        "request_ts_us": [request.ts_us for request in requests],
        "history_end": [len(request.history) for request in requests],
        "target_start": starts,
        "target_impression_ids": list(range(len(targets))),
        "target_item_ids": [item for item, _ in targets],
        "target_play_ms": [-1] * len(targets),
        "target_duration_ms": [-1] * len(targets),
        "target_feedback": [feedback for _, feedback in targets],
    }
