"""The three ways to organise impressions into examples (OneRec-V2, section 2.1 and Figure 3), behind one interface.

`newest_only` gives one example a user and slice: the context that collate needs, once, and the slice's requests with
their targets. Every impression is a target exactly once, and its context ends strictly before its request's
first ts, ties excluded. The context is the union in time order of the last `positive_length` engaged events and the
last `short_length` events before the slice's first request, and whatever happened from there to its last one. Which
targets bear a loss is a choice of the collate step.

`naive` gives one example an impression, with the same context, and every event of the context is a target again: a
request of its own, at its own time, that sees the context's events strictly before it. Contexts carry no ids of
impressions, so impression and request of such a repeat are -1; what counts impressions counts each once.

`user_centric` gives one example a user: all requests and the whole history, without the limits of short and positive.
A history of more than `organise.user_events` events is cut into pieces of about that many, each with the
`organise.user_events` events before it as further context, so that no row grows without bound and every impression
still is a target exactly once. Attributes are those known before the day of the example's first request.

A row is cut from the timelines of its task's users (`jobs.timelines`); tasks write their rows in order of the day and of
slice_us, so that a reader of a part of a day skips most of each file.

None of them lets a target see its user's own future. What they let another user's future do to the weights by the order
of examples is measured by `lazyrec organisation-report`.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame

from jobs.arrow_files import ArrowRows, Batches
from jobs.jagged import Ints, dates, days_since_1970, lists, pieces, ranges, starts
from jobs.slices import Requests, Slices, slices_by_impression, slices_by_piece, slices_by_time, target_starts
from jobs.timelines import EVENTS, EVENTS_A_BATCH, IDS, Timelines, task_rows, with_attributes
from schemas.config import Config
from schemas.feedback import mask_of

TARGETS = ("impression_ids", "item_ids", "play_ms", "duration_ms", "feedback")
REPEATED = -1  # the impression and the request of a context's event that is a target again
Columns = dict[str, Any]


@dataclass(frozen=True)
class Reach:
    """How far a context goes back before its slice: the last `recent` events and the last `engaged` engaged ones."""

    recent: int
    engaged: int
    mask: int


@dataclass(frozen=True)
class Organiser:
    """One of the three ways. `slices` cuts the requests of a task's users; with `repeats` the events of a context are
    targets again; `whole` organises the whole log, without the limits of short and positive."""

    slices: Callable[[Requests, Timelines, Config], Slices]
    repeats: bool = False
    whole: bool = False

    def reach(self, config: Config) -> Reach:
        return whole_reach(config) if self.whole else bounded_reach(config)


ORGANISERS: dict[str, Organiser] = {
    "newest_only": Organiser(lambda requests, lines, config: slices_by_time(requests, config.organise.slice)),
    "naive": Organiser(lambda requests, lines, config: slices_by_impression(requests), repeats=True),
    "user_centric": Organiser(
        lambda requests, lines, config: slices_by_piece(requests, lines, config.organise.user_events), whole=True
    ),
}


def bounded_reach(config: Config) -> Reach:
    settings = config.sequences
    return Reach(settings.short_length, settings.positive_length, mask_of(settings.engaged))


def whole_reach(config: Config) -> Reach:
    return Reach(config.organise.user_events, 0, mask_of(config.sequences.engaged))


def organised(
    name: str,
    sequences: DataFrame,
    base: DataFrame | None,
    users: DataFrame,
    config: Config,
    tasks: int = 1,
    days: Collection[datetime.date] | None = None,
    into: datetime.date | None = None,
) -> ArrowRows:
    """Rows of training_examples by the organiser `name`, dated by their first request; with `days`, those of these alone,
    with `into`, all of them in the partition of that day.

    `sequences` holds whole days without a gap, `base` each user's newest row of user_features before the first of them, or
    None at the start of the log. user_centric needs the whole log and no base: a history that goes on from `user_features`
    would be no whole one. Attributes are those known before the day of the first request (see `jobs.as_of`), or empty.
    """
    rows = task_rows(with_attributes(sequences, users, known_before=True), base, tasks, IDS)
    making = functools.partial(examples_in, name=name, config=config, days=days, into=into)
    return ArrowRows("training_examples", rows, making)


def examples_in(
    batches: Batches,
    name: str,
    config: Config,
    days: Collection[datetime.date] | None,
    into: datetime.date | None,
) -> Iterator[pa.RecordBatch]:
    """Rows of training_examples from rows of `jobs.timelines.task_rows`."""
    organiser = ORGANISERS[name]
    reach = organiser.reach(config)
    lines = Timelines.of(batches, reach.mask)
    if lines is None:
        return
    slices = organiser.slices(Requests.of(lines), lines, config)
    contexts = Contexts.of(lines, slices, reach)
    rows = slices.requests.rows[slices.first]
    day_of = lines.days[rows] if into is None else np.full(len(rows), days_since_1970([into])[0])
    order = np.lexsort((lines.users[rows], slices.slice_us, day_of))
    if days is not None:
        order = order[np.isin(day_of[order], days_since_1970(days))]
    sizes = contexts.sizes[order] * (2 if organiser.repeats else 1)
    for part in pieces(starts(day_of[order]), sizes, EVENTS_A_BATCH):
        columns = example_columns(lines, slices, contexts, order[part])
        columns["date"] = dates(day_of[order[part]])
        yield pa.record_batch(with_repeats(columns) if organiser.repeats else columns)


@dataclass(frozen=True)
class Contexts:
    """The context of each slice: the engaged events numbered [engaged_start, engaged_stop) of the timelines, then the
    events at the places [start, stop). The two have none in common: engaged ones among the recent come with those."""

    engaged_start: Ints
    engaged_stop: Ints
    start: Ints
    stop: Ints

    @classmethod
    def of(cls, lines: Timelines, slices: Slices, reach: Reach) -> Contexts:
        requests = slices.requests
        first, stop = requests.before[slices.first], requests.before[slices.stop - 1]
        rows = requests.rows[slices.first]
        start = np.maximum(first - reach.recent, lines.line_first[rows])
        engaged_start = np.maximum(lines.engaged_above[first] - reach.engaged, lines.engaged_first[rows])
        among_recent = lines.recent_engaged_above[stop] - lines.recent_engaged_above[start]
        return cls(engaged_start, np.maximum(lines.engaged_above[stop] - among_recent, engaged_start), start, stop)

    @property
    def sizes(self) -> Ints:
        return self.engaged_stop - self.engaged_start + self.stop - self.start

    def places(self, lines: Timelines, chosen: Ints) -> tuple[Ints, Ints]:
        """Of the chosen contexts, the places of their events, and the offsets."""
        both = (np.stack(ends, axis=1)[chosen].ravel() for ends in self._ranges())
        places, offsets = ranges(*both)
        engaged = np.repeat(np.tile([True, False], len(chosen)), np.diff(offsets))
        places[engaged] = lines.engaged[places[engaged]]
        return places, offsets[::2]

    def _ranges(self) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        return (self.engaged_start, self.start), (self.engaged_stop, self.stop)


def example_columns(lines: Timelines, slices: Slices, contexts: Contexts, chosen: Ints) -> Columns:
    """Columns of training_examples but the date, a row for each chosen slice."""
    requests = slices.requests
    rows = requests.rows[slices.first[chosen]]
    places, offsets = contexts.places(lines, chosen)
    own, own_offsets = ranges(slices.first[chosen], slices.stop[chosen])
    # All events from the slice's first request on are in the context, so offsets count back from its end.
    size, stop = (np.repeat(n[chosen], np.diff(own_offsets)) for n in (contexts.sizes, contexts.stop))
    begins, begin_offsets = target_starts(slices, chosen)
    targets, target_offsets = ranges(requests.target_offsets[own], requests.target_offsets[own + 1])
    return {
        "user_id": lines.users[rows],
        "slice_us": slices.slice_us[chosen],
        "attributes": lines.attributes.take(pa.array(rows)),
        **lines.arrays(places, offsets, "context_"),
        "request_ids": lists(own_offsets, requests.ids[own]),
        "request_ts_us": lists(own_offsets, requests.first_us[own]),
        "history_end": lists(own_offsets, (size - (stop - requests.before[own])).astype(np.int32)),
        "target_start": lists(begin_offsets, begins),
        **lines.arrays(requests.targets[targets], target_offsets[own_offsets], "target_", TARGETS),
    }


def with_repeats(columns: Columns) -> Columns:
    """Rows with one request and target each, and before it one for every event of the context, in time order."""
    times, offsets = columns["context_ts_us"].values.to_numpy(), columns["context_ts_us"].offsets.to_numpy()
    repeated = np.full(len(times), REPEATED)
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    first_of_ts = starts(row, times)
    strictly_earlier = np.repeat(first_of_ts, np.diff(np.append(first_of_ts, len(times)))) - offsets[row]
    before = {"request_ids": repeated, "request_ts_us": times, "history_end": strictly_earlier.astype(np.int32)}
    before |= {"target_impression_ids": repeated}
    before |= {f"target_{name}": columns[f"context_{name}"].values.to_numpy() for name in TARGETS if name in EVENTS}
    begins, begin_offsets = ranges(np.zeros(len(offsets) - 1, np.int64), np.diff(offsets) + 2)
    return {
        **columns,
        "target_start": lists(begin_offsets, begins.astype(np.int32)),
        **{name: _followed(offsets, values, columns[name].values.to_numpy()) for name, values in before.items()},
    }


def _followed(offsets: Ints, values: np.ndarray, last: np.ndarray) -> pa.ListArray:
    """The lists with one more value each."""
    longer = offsets + np.arange(len(offsets))
    at_end = np.zeros(longer[-1], bool)
    at_end[longer[1:] - 1] = True
    joined = np.empty(longer[-1], values.dtype)
    joined[at_end], joined[~at_end] = last, values
    return lists(longer, joined)
