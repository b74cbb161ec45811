"""Plays of all users by day, bucket of duration and bin of play time, as what a single play is compared with.

    bucket F(d) = floor(log_beta(d + epsilon)), d in SECONDS (OneRec-V2, section 3.1.1)

Counts are as large as the days, whatever the log: a bucket has at most LAST_BIN + 1 bins, hundredths of its upper end; a
play of more than ten times that end counts as one of ten times.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.arrow_files import Batches
from jobs.jagged import Ints, flat
from schemas.config import SequencesConfig
from schemas.feedback import BITS, WATCHED_HIGH

BINS = 100  # of play time up to the upper end of a bucket
LAST_BIN = 10 * BINS
NO_BUCKET = np.iinfo(np.int32).min


@dataclass(frozen=True)
class Buckets:
    """Logarithmic buckets of duration: the base beta, and epsilon."""

    base: float
    epsilon: float

    def of(self, duration_ms: Ints) -> Ints:
        """int32; negative below a second, NO_BUCKET where the duration is unknown."""
        seconds = np.maximum(duration_ms, 1) / 1000.0
        buckets = np.floor(np.log(seconds + self.epsilon) / np.log(self.base)).astype(np.int32)
        return np.where(duration_ms > 0, buckets, NO_BUCKET)

    def bins(self, play_ms: Ints, buckets: Ints) -> Ints:
        """int64: play time in hundredths of the upper end of the bucket's durations, at most LAST_BIN."""
        upper_ms = np.power(float(self.base), buckets + 1.0) * 1000
        return np.minimum(np.floor(play_ms * BINS / upper_ms), LAST_BIN).astype(np.int64)


def known_plays(play_ms: Ints, duration_ms: Ints) -> np.ndarray:
    """bool: both are known; -1 stands for unknown."""
    return (duration_ms > 0) & (play_ms >= 0)


@dataclass(frozen=True)
class Population:
    """Known plays of all users by day (since 1970), bucket and bin."""

    cut: Buckets
    days: Ints
    buckets: Ints
    bins: Ints
    plays: Ints

    @classmethod
    def of(cls, shown: DataFrame, cut: Buckets) -> Population:
        """From the columns date, play_ms and duration_ms of impressions (-1: unknown) or of user_sequences, in one pass
        that shuffles sums alone."""
        parts = shown.select("date", "play_ms", "duration_ms").mapInArrow(
            functools.partial(binned_in, cut=cut), "date int, bucket int, bin bigint, plays bigint"
        )
        table = parts.groupBy("date", "bucket", "bin").agg(F.sum("plays").alias("plays")).toArrow()
        return cls(cut, *(table.column(name).to_numpy() for name in ("date", "bucket", "bin", "plays")))

    def earlier(self, asking: np.ndarray, days: Ints, play_ms: Ints, buckets: Ints, days_back: int) -> tuple[Ints, Ints]:
        """earlier, no_longer [N] of the plays that are asking: those of the bucket on the `days_back` days before the day,
        and those of them in no higher bin; 0 for the others."""
        earlier, no_longer = np.zeros((2, len(days)), np.int64)
        for day in np.unique(days[asking]):
            before = (self.days < day) & (self.days >= day - days_back)
            if not before.any():
                continue
            low, high = self.buckets[before].min(), self.buckets[before].max()
            counted = np.zeros((high - low + 1, LAST_BIN + 1), np.int64)
            np.add.at(counted, (self.buckets[before] - low, self.bins[before]), self.plays[before])
            counted = counted.cumsum(axis=1)
            rows = np.flatnonzero(asking & (days == day) & (buckets >= low) & (buckets <= high))
            bucket = buckets[rows] - low
            earlier[rows] = counted[bucket, -1]
            no_longer[rows] = counted[bucket, self.cut.bins(play_ms[rows], buckets[rows])]
        return earlier, no_longer


@dataclass(frozen=True)
class WatchRule:
    """Which plays get the bit `watched_high`; see `SequencesConfig`."""

    population: Population
    share: float
    days_back: int
    least: int

    @classmethod
    def of(cls, impressions: DataFrame, settings: SequencesConfig) -> WatchRule:
        """With the plays of `impressions`, rows of the days before."""
        assert settings.watch_quantile is not None
        known = impressions.select("date", *(F.coalesce(n, F.lit(-1)).alias(n) for n in ("play_ms", "duration_ms")))
        population = Population.of(known, Buckets(base=2.0, epsilon=1e-6))
        return cls(population, settings.watch_quantile, settings.watch_days, settings.watch_plays)

    def bits(self, events: Mapping[str, np.ndarray]) -> np.ndarray:
        """int32: the bit, or 0, of each event."""
        play_ms, duration_ms = events["play_ms"], events["duration_ms"]
        known, buckets = known_plays(play_ms, duration_ms), self.population.cut.of(duration_ms)
        earlier, no_longer = self.population.earlier(known, events["date"], play_ms, buckets, self.days_back)
        return np.where((earlier >= self.least) & (no_longer >= self.share * earlier), BITS[WATCHED_HIGH], 0)


def binned_in(batches: Batches, cut: Buckets) -> Iterator[pa.RecordBatch]:
    """date, bucket, bin, plays: counts of the known plays of each batch."""
    for batch in (batch for batch in batches if len(batch)):
        days, play_ms, duration_ms = _plays_of(pa.Table.from_batches([batch]))
        known = known_plays(play_ms, duration_ms)
        buckets = cut.of(duration_ms[known])
        keys = {"date": days[known], "bucket": buckets, "bin": cut.bins(play_ms[known], buckets)}
        counted = pa.table(keys).group_by(list(keys)).aggregate([([], "count_all")])
        yield from counted.rename_columns([*keys, "plays"]).to_batches()


def _plays_of(table: pa.Table) -> tuple[Ints, Ints, Ints]:
    days = table.column("date").cast(pa.int32()).to_numpy()
    if not pa.types.is_list(table.schema.field("play_ms").type):
        return days, table.column("play_ms").to_numpy(), table.column("duration_ms").to_numpy()
    play_ms, offsets = flat(table.column("play_ms"))
    return np.repeat(days, np.diff(offsets)), play_ms, flat(table.column("duration_ms"))[0]
