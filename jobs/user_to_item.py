"""What led a user to an item: each positive target with the nearest of the user's latest positives (QARM, item alignment).

The candidates of a target t are the user's latest `latest` distinct positive items other than t, strictly before its time
and on its day or the `days_back` days before. The trigger is the candidate h with the largest cosine of co-occurrence
c(h, t) / sqrt(c(h) c(t)) as of the target's day; the smaller item id wins a tie, and without a candidate that co-occurs
with t there is no pair. A pair is directed, item_a the trigger and item_b the target; its weight is the number of targets
on the day, so that the sum over days counts each target once.

c(t) is the same for all candidates of a target, hence c(h, t)^2 / c(h) ranks them. It comes from counts in a fixed order
(see `jobs.item_pairs.closeness`), so that the choice is the same whatever the partitioning.

The latest distinct items are no window of SQL: a frame has no bound as long as repetitions fill it. Instead the events
pass through Python in order of user and time, and a task remembers `latest` + 1 items of the user at hand. The work is the
positives times `latest`.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Collection, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from schemas.config import PairsConfig

KIND = "user_to_item"
ORDER = ("user_id", "ts_us", "impression_id")
CANDIDATES = pa.schema(
    [("item_a", pa.int64()), ("item_b", pa.int64()), ("date", pa.date32()), ("impression_id", pa.int64())]
)


def triggers(
    events: DataFrame, closeness: DataFrame, settings: PairsConfig, days_back: int, days: Collection[datetime.date]
) -> DataFrame:
    """Rows of item_pairs of `days` from positives (user_id, date, ts_us, impression_id, item_id) of those days and the
    `days_back` before each; `closeness` has item_a, item_b, date, closeness: of a trigger and a target as of a day."""
    in_order = events.select(*ORDER, "date", "item_id").repartition("user_id").sortWithinPartitions(*ORDER)
    looked_back = in_order.mapInArrow(
        looking_back(settings.latest, days_back, frozenset(days)), from_arrow_schema(CANDIDATES)
    )
    near = looked_back.join(closeness, ["item_a", "item_b", "date"])
    nearest = F.min(F.struct(-F.col("closeness"), "item_a"))["item_a"]
    chosen = near.groupBy("impression_id", "item_b", "date").agg(nearest.alias("item_a"))
    weight = F.count("*").cast("double").alias("weight")
    counted = chosen.groupBy("item_a", "item_b", "date").agg(weight)
    return counted.select("item_a", "item_b", F.lit(KIND).alias("kind"), "weight", "date")


def looking_back(latest: int, days_back: int, days: frozenset[datetime.date]) -> Callable[..., Iterator[pa.RecordBatch]]:
    """What a task does with events in order of user and time: a row for each target of `days` and candidate."""

    def candidates(batches):  # type: ignore[no-untyped-def]  # Spark reads hints and cannot resolve postponed ones
        history = LatestItems(latest, days_back)
        for batch in batches:
            users, times, items, dates = (batch[n].to_pylist() for n in ("user_id", "ts_us", "item_id", "date"))
            seen = [history.before(*event) for event in zip(users, dates, times, items, strict=True)]
            asked = [earlier if day in days else [] for day, earlier in zip(dates, seen, strict=True)]
            row = np.repeat(np.arange(len(asked)), [len(earlier) for earlier in asked])
            target = (batch[name].take(pa.array(row)) for name in ("item_id", "date", "impression_id"))
            trigger = pa.array(itertools.chain.from_iterable(asked), pa.int64())
            yield pa.RecordBatch.from_arrays([trigger, *target], schema=CANDIDATES)

    return candidates


class LatestItems:
    """The latest distinct items of one user at a time."""

    def __init__(self, latest: int, days_back: int) -> None:
        self.latest, self.days_back = latest, datetime.timedelta(days=days_back)
        self.now: tuple[int, int] | None = None  # user and time of the events in `waiting`
        self.waiting: list[tuple[int, datetime.date]] = []  # events of one time do not see each other
        self.days: dict[int, datetime.date] = {}  # by item, the latest last

    def before(self, user: int, day: datetime.date, ts_us: int, item: int) -> list[int]:
        """The items other than `item` strictly before `ts_us` and within the days, latest first; then takes `item` in.
        Calls come in order of user and time."""
        if self.now != (user, ts_us):
            self._settle(user)
            self.now = (user, ts_us)
        self.waiting.append((item, day))
        first = day - self.days_back
        return [other for other, last in reversed(self.days.items()) if other != item and last >= first][: self.latest]

    def _settle(self, user: int) -> None:
        if self.now is None or self.now[0] != user:
            self.days = {}
        else:
            for item, day in self.waiting:
                self.days.pop(item, None)
                self.days[item] = day
            for item in list(self.days)[: -self.latest - 1]:  # one more, for the target itself may be among them
                del self.days[item]
        self.waiting = []
