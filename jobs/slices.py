"""Requests of a task's users, and the slices of a user's time that share an example's context.

A slice is a run of a user's requests in the order of their first ts. Requests with the same first ts are always in one
slice, since neither may see the other; a request that a source spreads over midnight is two, one a day.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jobs.jagged import Ints, ranges, starts
from jobs.timelines import Timelines

HOUR_US = 3_600_000_000

# From a request's first ts, a Spark column or an array, to what its slice of a day is called. Days are those of the column
# `date`.
SLICES: dict[str, Callable[[Any], Any]] = {
    "request": lambda first_us: first_us,
    "hour": lambda first_us: first_us - first_us % HOUR_US,
    "day": lambda first_us: first_us * 0,
}


def piece_of(recent_stop: Any, events: int) -> Any:
    """Requests of a user that agree in it share a piece of the whole history, of about `events` events each."""
    return recent_stop - recent_stop % events


@dataclass(frozen=True)
class Requests:
    """Requests in order of user, day, first ts and id [Q].

    `rows` are rows of the timelines, `before` the place of the first event at first_us: those of the user's line before it
    are strictly earlier. The targets of request q are the events at `targets[target_offsets[q]:target_offsets[q + 1]]`.
    """

    rows: Ints
    ids: Ints
    first_us: Ints
    before: Ints
    targets: Ints
    target_offsets: Ints

    @classmethod
    def of(cls, lines: Timelines) -> Requests:
        """The requests of every user and day of `lines`."""
        places, rows = lines.events_of_days()
        ts_us, ids = lines.events["ts_us"][places], lines.events["request_ids"][places]
        first_of_ts = starts(rows, ts_us)
        before = np.repeat(places[first_of_ts], np.diff(np.append(first_of_ts, len(places))))
        by_request = np.lexsort((ids, rows))  # stable, so the events of a request stay in order of time
        first = starts(rows[by_request], ids[by_request])
        stop = np.append(first[1:], len(by_request))
        earliest = by_request[first]
        order = np.lexsort((ids[earliest], ts_us[earliest], rows[earliest]))
        targets, offsets = ranges(first[order], stop[order])
        chosen = earliest[order]
        return cls(rows[chosen], ids[chosen], ts_us[chosen], before[chosen], places[by_request[targets]], offsets)

    def single(self) -> Requests:
        """A request for each target, with the times of the one that it comes from."""
        each = np.repeat(np.arange(len(self.ids)), np.diff(self.target_offsets))
        alone = np.arange(len(each) + 1)
        return Requests(self.rows[each], self.ids[each], self.first_us[each], self.before[each], self.targets, alone)


@dataclass(frozen=True)
class Slices:
    """Slice s has the requests [first[s], stop[s]) and is called by the time `slice_us[s]`, unique within its user."""

    requests: Requests
    first: Ints
    stop: Ints
    slice_us: Ints


def slices_by_time(requests: Requests, name: str) -> Slices:
    """Requests of a user and day that agree in the slice `name`."""
    return _runs(requests, requests.rows, SLICES[name](requests.first_us))


def slices_by_piece(requests: Requests, lines: Timelines, events: int) -> Slices:
    """Requests of a user that share a piece of the whole history."""
    place = requests.before - lines.line_first[requests.rows]
    return _runs(requests, lines.users[requests.rows], piece_of(place, events))


def slices_by_impression(requests: Requests) -> Slices:
    """A slice an impression, each the only target of its request.

    Of impressions of equal times each is a microsecond later than the one before it, by slice_us alone, so that
    user_id and slice_us stay a key: slice_us is the smallest ascending sequence of a day that is at or after their times.
    """
    single = requests.single()
    number = np.arange(len(single.ids))
    latest = pd.Series(single.first_us - number).groupby(single.rows).cummax().to_numpy()
    return Slices(single, number, number + 1, latest + number)


def _runs(requests: Requests, *keys: Ints) -> Slices:
    first = starts(*keys)
    return Slices(requests, first, np.append(first[1:], len(requests.ids)), requests.first_us[first])


def target_starts(slices: Slices, chosen: Ints) -> tuple[Ints, Ints]:
    """int32: of each chosen slice where its requests' targets begin among the slice's own, and where the last ends; and the
    offsets of these lists."""
    places, offsets = ranges(slices.first[chosen], slices.stop[chosen] + 1)
    ends = slices.requests.target_offsets
    begins = np.repeat(ends[slices.first[chosen]], np.diff(offsets))
    return (ends[places] - begins).astype(np.int32), offsets
