"""Long histories for requests, from the pinned `lifelong_sequences`: a request reads its user's newest row of a day before
its own.

A row of day D holds what happened up to the end of D, so it is known from the first instant of the day after. The row of
the request's own day is never read, since that knows what came after the request.

Rows of one user are days apart and each repeats the history, so two reads follow each other: users and days alone, from
the newest day back until every user has the row that their first request reads; then the arrays of the rows that are
read, and of no other. Memory: those rows, 48 bytes a representative, cut to the newest that the model reads and held once
for all requests of a user; a batch gets copies of its own.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from model.requests import Requests
from pipelines.catalogue import Catalogue
from pipelines.collate import EVENTS, arrow_lists, ranges, to_tensor
from pipelines.ray_tables import day_parts, days_filter
from pipelines.split import day_start_us
from schemas.config import Config
from schemas.errors import ContractViolation
from schemas.lake import Lake, assert_ray_readable
from schemas.tables import PARTITION

TABLE = "lifelong_sequences"
ARRAYS = {name: name.replace("_ids", "s") for name in (*EVENTS, "weights")}  # columns, and what Requests calls them
INDEX_ROWS = 4_000_000  # rows of whole days whose users are read at a time
BATCH_ROWS = 512  # of the rows themselves, each with thousands of representatives
READ_REQUESTS = 4096  # whose rows are read together where batches are smaller


@dataclass(frozen=True)
class LongRows:
    """Rows, and the one that each of R requests reads. Row u owns [offsets[u], offsets[u + 1]) of every array."""

    place_R: np.ndarray  # int64; -1: none
    offsets: np.ndarray  # int64
    arrays: Mapping[str, np.ndarray]  # by the values of ARRAYS; items are dense

    def given_to(self, requests: Requests, numbers: np.ndarray) -> Requests:
        """`requests`, which are those of these `numbers` (int64) among the R, with what they read."""
        place = self.place_R[numbers]
        first, last = (np.where(place < 0, 0, self.offsets[place + side]) for side in (0, 1))
        index, offsets = ranges(first, last)
        given = {f"lifelong_{name}": to_tensor(values[index]) for name, values in self.arrays.items()}
        return replace(requests, lifelong_offsets=to_tensor(offsets), **given)


def long_histories(
    config: Config, lake: Lake, pins: Mapping[str, int], catalogue: Catalogue, length: int
) -> LongHistories | None:
    """What a model reads that has seen the newest `length` representatives; None where that is 0. Raises ContractViolation
    where the stage reads no such table, since the configuration's own model does not."""
    if not length:
        return None
    if TABLE not in pins:
        raise ContractViolation(
            f"The model reads the newest {length} representatives of {TABLE}, the configuration does not; set "
            f"model.lifelong_length to {length} and lifelong.enabled to true, or use another model."
        )
    return LongHistories(lake, pins[TABLE], catalogue, length, config.source.time_zone)


@dataclass(frozen=True)
class LongHistories:
    """The newest `length` representatives of each row, of one pinned version."""

    lake: Lake
    version: int
    catalogue: Catalogue
    length: int
    time_zone: str

    def given_to(self, batches: Iterable[Requests]) -> Iterator[Requests]:
        """The batches with their long histories, in order; the rows of several are read together."""
        held: list[Requests] = []
        for requests in batches:
            held.append(requests)
            if sum(map(len, held)) >= READ_REQUESTS:
                yield from self._given_to(held)
                held = []
        if held:
            yield from self._given_to(held)

    def _given_to(self, batches: list[Requests]) -> Iterator[Requests]:
        users, ts_us = (np.concatenate([getattr(b, name).numpy() for b in batches]) for name in ("user_ids", "ts_us"))
        rows, first = self.rows_of(users, ts_us), 0
        for requests in batches:
            yield rows.given_to(requests, np.arange(first, first + len(requests)))
            first += len(requests)

    def rows_of(self, user_ids: np.ndarray, ts_us: np.ndarray) -> LongRows:
        """For R requests (int64 [R] each, in any order), the rows that they read."""
        users, days = self._rows_of_users(user_ids, ts_us)
        place_R = newest_before(users, self._known_us(days), user_ids, ts_us)
        wanted = np.unique(place_R[place_R >= 0])
        lengths, arrays, found = self._read(users[wanted], days[wanted])
        place_of = np.full(len(users) + 1, -1)  # the last place is that of no row
        place_of[wanted[found]] = np.arange(len(found))
        return LongRows(place_of[place_R], np.concatenate([[0], np.cumsum(lengths)]), arrays)

    def _rows_of_users(self, user_ids: np.ndarray, ts_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Users (int64) and days (datetime64[D]) of the rows among which the requests find theirs, by user and day."""
        pending, place = np.unique(user_ids, return_inverse=True)
        first_us = np.full(len(pending), np.iinfo(np.int64).max)
        np.minimum.at(first_us, place, ts_us)
        last_us = ts_us.max(initial=0)
        known = [day for day in sorted(self._rows_by_day, reverse=True) if self._day_known_us[day] <= last_us]
        users, days = [np.empty(0, np.int64)], [np.empty(0, "datetime64[D]")]
        for part in day_parts(known, self._rows_by_day, INDEX_ROWS):
            if not len(pending):
                break
            here = days_filter(part) & pads.field("user_id").isin(pa.array(pending))
            table = self._dataset.to_table(columns=["user_id", PARTITION], filter=here)
            users.append(table.column("user_id").to_numpy())
            days.append(table.column(PARTITION).to_numpy())
            usable = self._known_us(days[-1]) <= first_us[np.searchsorted(pending, users[-1])]
            waiting = ~np.isin(pending, users[-1][usable])
            pending, first_us = pending[waiting], first_us[waiting]
        user, day = np.concatenate(users), np.concatenate(days)
        order = np.lexsort((day, user))
        return user[order], day[order]

    def _read(self, users: np.ndarray, days: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """Of rows given by user and day, in that order: as they come from the files, the lengths of their arrays, these one
        after the other, and each one's number among those given."""
        parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int32)] for name in ARRAYS.values()}
        lengths, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        distinct_users, distinct_days = np.unique(users), np.unique(days)

        def key(users: np.ndarray, days: np.ndarray) -> np.ndarray:
            return np.searchsorted(distinct_users, users) * len(distinct_days) + np.searchsorted(distinct_days, days)

        given = key(users, days)
        here = days_filter(distinct_days.tolist()) & pads.field("user_id").isin(pa.array(distinct_users))
        scanner = self._dataset.scanner(
            columns=["user_id", PARTITION, *ARRAYS],
            filter=here,
            batch_size=BATCH_ROWS,
            batch_readahead=1,
            fragment_readahead=1,
        )
        for batch in scanner.to_batches() if len(users) else ():
            read = key(*(batch.column(name).to_numpy(zero_copy_only=False) for name in ("user_id", PARTITION)))
            kept = np.flatnonzero(np.isin(read, given))
            found.append(np.searchsorted(given, read[kept]))
            for name, field in ARRAYS.items():
                values, offsets = arrow_lists(batch, name)
                first, last = offsets[kept], offsets[kept + 1]
                index, cut = ranges(np.maximum(first, last - self.length), last)
                parts[field].append(values.to_numpy()[index])
            lengths.append(np.diff(cut))
        arrays = {name: np.concatenate(values) for name, values in parts.items()}
        return np.concatenate(lengths), arrays | {"items": self.catalogue.dense(arrays["items"])}, np.concatenate(found)

    @cached_property
    def _dataset(self) -> pads.Dataset:
        assert_ray_readable(self.lake, TABLE)
        return self.lake.open(TABLE, self.version).to_pyarrow_dataset()

    @cached_property
    def _rows_by_day(self) -> dict[datetime.date, int]:
        return self.lake.rows_by_day(TABLE, self.version)

    @cached_property
    def _day_known_us(self) -> dict[datetime.date, int]:
        """The first instant of the day after each one."""
        after = datetime.timedelta(days=1)
        return {day: day_start_us(day + after, self.time_zone) for day in self._rows_by_day}

    def _known_us(self, days: np.ndarray) -> np.ndarray:
        """int64: from when on rows of these days may be read."""
        distinct, place = np.unique(days, return_inverse=True)
        return np.array([self._day_known_us[day] for day in distinct.tolist()], np.int64)[place]


def newest_before(row_users: np.ndarray, row_us: np.ndarray, user_ids: np.ndarray, ts_us: np.ndarray) -> np.ndarray:
    """int64 [R]: the place of the row of each request's user with the largest `row_us` at or before its time; -1: none."""
    rows = len(row_users)
    order = np.lexsort(
        (np.arange(rows + len(user_ids)) >= rows, np.concatenate([row_us, ts_us]), np.concatenate([row_users, user_ids]))
    )
    is_row = order < rows
    last = np.maximum.accumulate(np.where(is_row, np.arange(len(order)), -1))  # row before each place in the order
    asked = ~is_row & (last >= 0)
    request, place = order[asked] - rows, order[last[asked]]
    found = np.full(len(user_ids), -1)
    found[request] = np.where(row_users[place] == user_ids[request], place, -1)
    return found
