"""The training set as an ordered list of segments of one pinned version, and a position in it that a checkpoint holds.

A segment is a run of days, or a part of a large day, with about `segment_rows` examples at most: the unit that is read
(its own small Ray Data set, while the one before trains), ordered and shuffled. Within a segment requests are sorted by
(time, user), so that neither files nor workers decide the order. Mode "stream" is one pass in that order; mode "epochs"
permutes segments by (seed, epoch) and requests by (seed, epoch, segment). A resumed run skips whole segments without
reading them. Memory: the requests with a loss of two segments, each with the history that the model reads; long histories
once a user and row, however many of the segment's requests read it.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import numpy as np
import pyarrow.dataset as pads
import torch

from model.positives import take_rows
from model.requests import Requests
from pipelines.collate import COLUMNS, ExampleCollate, concat_requests
from pipelines.long_histories import LongHistories, LongRows
from pipelines.ray_tables import read_dataset
from schemas.config import TrainConfig
from schemas.errors import ContractViolation
from schemas.lake import Lake, assert_ray_readable

TABLE = "training_examples"
READ_ROWS = 4096  # examples collated at a time


@dataclass(frozen=True)
class Segment:
    """Examples of `days`, or those of one day whose slice_us lies in [between[0], between[1])."""

    days: tuple[datetime.date, ...]
    rows: int  # by the log's statistics; of a part of a day, its share
    between: tuple[int, int] | None = None


@dataclass(frozen=True)
class Position:
    """The next batch: `segment` is a place in the order of the epoch, `batch` one in the segment."""

    table_version: int
    epoch: int = 0
    segment: int = 0
    batch: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Requests to train on, the position after them, and what part of the whole run lies before them."""

    requests: Requests
    segment: Segment
    after: Position
    progress: float
    ends_epoch: bool


@dataclass(frozen=True)
class Content:
    """The requests of a segment, and the long histories that they read, where the model does."""

    requests: Requests
    long: LongRows | None

    def take(self, numbers: np.ndarray) -> Requests:
        """Those of these numbers (int64), each with its long history."""
        chosen = take_rows(self.requests, torch.from_numpy(numbers))
        return chosen if self.long is None else self.long.given_to(chosen, numbers)


def segments_of(lake: Lake, version: int, days: Collection[datetime.date], limit: int) -> list[Segment]:
    """Segments in time order, by the statistics in the table's log; reads no data."""
    actions = lake.open(TABLE, version).get_add_actions(flatten=True)
    files: dict[datetime.date, list[tuple[int, int, int]]] = {}
    names = ("partition.date", "num_records", "min.slice_us", "max.slice_us")
    for day, rows, low, high in zip(*(actions.column(name).to_pylist() for name in names), strict=True):
        if day in days and rows:
            files.setdefault(day, []).append((rows, low, high))
    segments: list[Segment] = []
    for day in sorted(files):
        rows = sum(f[0] for f in files[day])
        if rows > limit:
            segments += _parts_of_day(day, rows, min(f[1] for f in files[day]), max(f[2] for f in files[day]) + 1, limit)
        elif segments and segments[-1].between is None and segments[-1].rows + rows <= limit:
            segments[-1] = Segment((*segments[-1].days, day), segments[-1].rows + rows)
        else:
            segments.append(Segment((day,), rows))
    return segments


def _parts_of_day(day: datetime.date, rows: int, low: int, high: int, limit: int) -> list[Segment]:
    parts = math.ceil(rows / limit)
    bounds = [low + (high - low) * i // parts for i in range(parts + 1)]
    return [Segment((day,), rows // parts, (bounds[i], bounds[i + 1])) for i in range(parts)]


def read_segment(lake: Lake, version: int, segment: Segment, collate: ExampleCollate) -> Requests:
    """The segment's requests, sorted by (time, user); those of one example keep their order."""
    where = None
    if segment.between is not None:
        low, high = segment.between
        where = (pads.field("slice_us") >= low) & (pads.field("slice_us") < high)
    dataset = read_dataset(lake, TABLE, version, COLUMNS, segment.days, where)
    parts = [collate(table) for table in dataset.iter_batches(batch_size=READ_ROWS, batch_format="pyarrow")]
    if not parts:
        return empty_requests()
    requests = concat_requests(parts)
    order = np.lexsort((requests.user_ids.numpy(), requests.ts_us.numpy()))
    return take_rows(requests, torch.from_numpy(order))


def empty_requests() -> Requests:
    return Requests(**{f.name: torch.zeros(int(f.name.endswith("offsets")), dtype=torch.int64) for f in fields(Requests)})


class ExampleStream:
    """Batches from any position on; `worker` of `workers` gets its share of every batch."""

    def __init__(
        self,
        lake: Lake,
        version: int,
        days: Collection[datetime.date],
        collate: ExampleCollate,
        config: TrainConfig,
        long: LongHistories | None = None,
    ) -> None:
        assert_ray_readable(lake, TABLE)
        self.lake, self.version, self.collate, self.config, self.long = lake, version, collate, config, long
        self.segments = segments_of(lake, version, days, config.segment_rows)
        if not self.segments:
            raise ContractViolation(f"Table {TABLE} version {version} has no examples on the train days; check the split.")
        self.epochs = config.epochs if config.mode == "epochs" else 1
        self._kept: tuple[int, Content] | None = None

    def order(self, epoch: int) -> list[int]:
        """The segments of an epoch."""
        if self.config.mode == "stream":
            return list(range(len(self.segments)))
        return np.random.default_rng([self.config.seed, epoch]).permutation(len(self.segments)).tolist()

    def batches(self, start: Position) -> Iterator[Batch]:
        """Every batch from `start` to the end of the last epoch. The next segment is read while one is in use."""
        if start.table_version != self.version:
            raise ContractViolation(
                f"A checkpoint stands in version {start.table_version} of {TABLE}, the run is pinned to {self.version}; "
                "remove the checkpoint or pin the same version."
            )
        plan = [
            (epoch, place, number)
            for epoch in range(start.epoch, self.epochs)
            for place, number in enumerate(self.order(epoch))
            if (epoch, place) >= (start.epoch, start.segment)
        ]
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[Content] | None = None
            for i, (epoch, place, number) in enumerate(plan):
                content = ahead.result() if ahead else self._read(number)
                ahead = reader.submit(self._read, plan[i + 1][2]) if i + 1 < len(plan) else None
                first = start.batch if (epoch, place) == (start.epoch, start.segment) else 0
                yield from self._segment_batches(content, epoch, place, number, first)

    def _read(self, number: int) -> Content:
        if self._kept is None or self._kept[0] != number:  # a small log is one segment, and is read once
            requests = read_segment(self.lake, self.version, self.segments[number], self.collate)
            asked = (requests.user_ids.numpy(), requests.ts_us.numpy())
            long = None if self.long is None else self.long.rows_of(*asked)
            self._kept = (number, Content(requests, long))
        return self._kept[1]

    def _segment_batches(self, content: Content, epoch: int, place: int, number: int, first: int) -> Iterator[Batch]:
        rows = np.arange(len(content.requests))
        if self.config.mode == "epochs":
            rows = np.random.default_rng([self.config.seed, epoch, number]).permutation(len(rows))
        count = max(1, round(len(rows) / self.config.batch_requests))  # of equal size: no small last batch
        pieces = np.array_split(rows, count) if len(rows) else []
        done, share = self._done(epoch, place), self.segments[number].rows
        total = self.epochs * sum(s.rows for s in self.segments)
        for i in range(first, len(pieces)):
            last = i + 1 == len(pieces)
            after = self._next_segment(epoch, place) if last else Position(self.version, epoch, place, i + 1)
            progress = (done + share * i / len(pieces)) / total
            yield Batch(content.take(pieces[i]), self.segments[number], after, progress, after.epoch > epoch)

    def _next_segment(self, epoch: int, place: int) -> Position:
        at_end = place + 1 == len(self.segments)
        return Position(self.version, epoch + at_end, 0 if at_end else place + 1)

    def _done(self, epoch: int, place: int) -> int:
        """Examples before the segment at `place` of `epoch`."""
        earlier = sum(self.segments[number].rows for number in self.order(epoch)[:place])
        return epoch * sum(s.rows for s in self.segments) + earlier
