"""The events of a task's users as one line of time each, from which the tails of every moment are cut.

The last 20 events and the last 256 engaged events as of many moments (the end of a day, a request) overlap almost wholly.
A task holds the events of its users once, as flat arrays in order of user and time, and a moment is two ranges of places
in them: of events, and of engaged ones. So a moment costs a search, whatever the length of a history, and only the events
that a row holds are copied, when that row is written.

A line starts with the tails that `user_features` kept before the first day of `sequences` (`base`), so that a single day
reads that day's events alone and gives the rows of a full build.

A task holds about 100 bytes an event. Tasks are as many as the events ask for (`tasks_for`); of one user they hold all
events of the days in the pass, and nothing of the days before but the tails.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.arrow_files import Batches
from jobs.as_of import join_as_of
from jobs.jagged import Ints, flat, lists, offsets_of, ranges, starts
from schemas.lake import Lake

# The parallel arrays of an event, as in every table that carries a history.
EVENTS = ("item_ids", "author_ids", "ts_us", "play_ms", "duration_ms", "feedback")
IDS = ("impression_ids", "request_ids")  # which the events of a day have besides
KNOWN_ENGAGED, KNOWN_RECENT, OF_DAY = 0, 1, 2  # kinds of a task's rows, in the order in which they lie on a line
BYTES_A_TASK = 24_000_000  # of compressed rows: about a million events
BYTES_A_FILE = 100_000  # of the task's own input behind a file at least, else a task takes more than BYTES_A_TASK
EVENTS_A_BATCH = 2_000_000  # of a row group: some 100 MB before compression


def has_any(feedback: Column, mask: int) -> Column:
    """Whether any bit of `mask` is set."""
    return feedback.bitwiseAND(F.lit(mask)) != 0


def newest_rows(features: DataFrame, sequences: DataFrame) -> DataFrame:
    """The newest row of `features` (earlier days alone) for each user of `sequences`.

    Which these are is found on two narrow columns; of the arrays only the days are read that hold the newest row of some
    user, so that what is read does not grow with a log whose users come back.
    """
    active = sequences.select("user_id").distinct()
    keys = features.select("user_id", "date").join(active, "user_id", "left_semi")
    newest = keys.groupBy("user_id").agg(F.max("date").alias("date"))
    days = [row["date"] for row in newest.select("date").distinct().collect()]
    return features.where(F.col("date").isin(sorted(days))).join(newest, ["user_id", "date"], "left_semi")


def tasks_for(lake: Lake, days: Collection[datetime.date], version: int | None, base: int | None = None) -> int:
    """Tasks for the events of `days` in user_sequences, and for their users' tails in version `base` of user_features, by
    the bytes in the tables' logs. Each task writes a file a day, so that tasks are fewer where the days are many and small.
    """
    total = sum(lake.bytes_by_day("user_sequences", version).get(day, 0) for day in days)
    if base is not None:
        users = sum(lake.rows_by_day("user_sequences", version).get(day, 0) for day in days)
        bytes_a_row = sum(lake.bytes_by_day("user_features", base).values()) / max(1, lake.row_count("user_features", base))
        total += int(users * bytes_a_row)
    return max(1, min(-(-total // BYTES_A_TASK), total // (BYTES_A_FILE * max(1, len(days)))))


def with_attributes(sequences: DataFrame, users: DataFrame, known_before: bool = False) -> DataFrame:
    """Adds each user's attributes of the day, or of before it (see `jobs.as_of`); empty where there are none."""
    found = join_as_of(sequences, users, "user_id", ["attributes"], known_before)
    return found.withColumn("attributes", F.coalesce("attributes", F.array().cast("array<string>")))


def task_rows(sequences: DataFrame, base: DataFrame | None, tasks: int, ids: Collection[str] = ()) -> DataFrame:
    """Rows of `sequences` (of user_sequences, with `attributes`) and the tails of `base` (at most one row of user_features
    a user), by hash of the user in `tasks` partitions."""
    carried = ("user_id", "date", "attributes", *EVENTS, *ids)
    rows = sequences.select(F.lit(OF_DAY).alias("kind"), *carried)
    if base is not None:
        tails = [
            F.struct(F.lit(kind).alias("kind"), *(F.col(f"{line}_{name}").alias(name) for name in EVENTS))
            for kind, line in ((KNOWN_ENGAGED, "positive"), (KNOWN_RECENT, "short"))
        ]
        known = base.select("user_id", "date", F.explode(F.array(*tails)).alias("tail")).select("user_id", "date", "tail.*")
        rows = rows.unionByName(known, allowMissingColumns=True)
    return rows.repartition(tasks, "user_id")


@dataclass(frozen=True)
class Timelines:
    """The events of a task's users in order of user and time, flat, each user's known tails before them.

    A row is a user and day [R], in order of both: `users` int64, `days` int32 (since 1970), `attributes`, and the half-open
    range of places (int64) [first, stop) of its events. `line_first` is the place at which its user's line begins and
    `engaged_first` the number at which the user's engaged events begin; engaged event n lies at place `engaged[n]`.
    """

    users: Ints
    days: Ints
    attributes: pa.Array
    first: Ints
    stop: Ints
    line_first: Ints
    engaged_first: Ints
    events: Mapping[str, np.ndarray]  # each [E]
    engaged: Ints
    engaged_above: Ints  # [E + 1]: engaged events before a place, those of the known tail included
    recent_engaged_above: Ints  # [E + 1]: events before a place that are on the line of all events and engaged

    @classmethod
    def of(cls, batches: Batches, mask: int) -> Timelines | None:
        """From rows of `task_rows`; None where there are none."""
        found = [batch for batch in batches if len(batch)]
        if not found:
            return None
        table = pa.Table.from_batches(found)
        kinds, users = table.column("kind").to_numpy(), table.column("user_id").to_numpy()
        days = table.column("date").cast(pa.int32()).to_numpy()
        order = np.lexsort((days, kinds, users))
        kinds, users, days = kinds[order], users[order], days[order]
        events, offsets = _events(table, order, kinds)
        kind_of_event = np.repeat(kinds, np.diff(offsets))
        bits = (events["feedback"] & mask) != 0
        engaged = (kind_of_event == KNOWN_ENGAGED) | (bits & (kind_of_event == OF_DAY))
        engaged_above = offsets_of(engaged)
        of_user = np.repeat(starts(users), np.diff(np.append(starts(users), len(users))))  # the user's first row
        known = kinds[of_user] == KNOWN_ENGAGED
        rows = np.flatnonzero(kinds == OF_DAY)
        return cls(
            users[rows],
            days[rows],
            table.column("attributes").combine_chunks().take(pa.array(order[rows])),
            offsets[rows],
            offsets[rows + 1],
            offsets[of_user + known][rows],
            engaged_above[offsets[of_user]][rows],
            events,
            np.flatnonzero(engaged),
            engaged_above,
            offsets_of(bits & (kind_of_event != KNOWN_ENGAGED)),
        )

    def events_of_days(self) -> tuple[Ints, Ints]:
        """Place and row of every event that is not of a known tail, in order."""
        places, offsets = ranges(self.first, self.stop)
        return places, np.repeat(np.arange(len(self.users)), np.diff(offsets))

    def arrays(self, places: Ints, offsets: Ints, prefix: str, names: Iterable[str] = EVENTS) -> dict[str, pa.Array]:
        """Columns of lists: list i has the events at `places[offsets[i]:offsets[i + 1]]`."""
        return {f"{prefix}{name}": lists(offsets, self.events[name][places]) for name in names}


def _events(table: pa.Table, order: Ints, kinds: Ints) -> tuple[dict[str, np.ndarray], Ints]:
    """The arrays of the rows in `order`, flat, and the rows' offsets; ids, which a known tail has not, are 0 there."""
    found: dict[str, np.ndarray] = {}
    for name in EVENTS:
        values, offsets = flat(table.column(name))
        if not found:
            places, in_order = ranges(offsets[order], offsets[order + 1])
        found[name] = values[places]
    of_day = np.repeat(kinds == OF_DAY, np.diff(in_order))
    for name in (name for name in IDS if name in table.column_names):
        values, offsets = flat(table.column(name))
        found[name] = np.zeros(len(of_day), np.int64)
        found[name][of_day] = values[ranges(offsets[order], offsets[order + 1])[0]]
    return found, in_order
