"""Duration-aware quantile of each play among earlier ones of like duration (OneRec-V2, section 3.1.1).

    bucket F(d) = floor(log_beta(d + epsilon)), d in SECONDS        q_i = |{p_j in P : p_j <= p_i}| / |P|

P is the first of these pools that holds enough plays (the paper leaves the window, the target's own membership and
small buckets open), and the column `pool` names it:

1. `own`: the user's plays in the own bucket at times strictly before ts_i, on the day of i or the `history_days` before
   it; at least `min_bucket`;
2. `neighbours`: those of the own bucket and the two beside it; at least `min_bucket`;
3. `population`: all users' plays in the bucket on the `population_days` days before the day of i, by play time in
   hundredths of the bucket's upper end; at least `min_population`.

The target is never in its pool, and ties in ts see nothing of each other. A play of more than ten times the bucket's upper
end counts as one of ten times in the population. The quantile is null where no pool of
`rewards.backoff` is large enough, or where play or duration is unknown; negative is any bit of `negative`.
"""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.arrow_files import ArrowRows, Batches
from jobs.earlier_plays import earlier_counts, earlier_plays
from jobs.jagged import Ints, dates, days_since_1970, flat, pieces, starts
from jobs.population import NO_BUCKET, Buckets, Population, known_plays
from jobs.tables import read_days, replace_days
from jobs.timelines import tasks_for
from schemas.calendar import Calendar
from schemas.config import Config, RewardsConfig
from schemas.feedback import mask_of
from schemas.lake import Identities, Lake
from schemas.lineage import REWARDS

ROWS_A_BATCH = 1_000_000
READ = ("user_id", "date", "impression_ids", "ts_us", "play_ms", "duration_ms", "feedback")  # of user_sequences
NOTHING_OLDER = np.iinfo(np.int64).min
Counts = tuple[Ints, Ints]  # of each play: those before it, and those of them that are no longer


class Pool(NamedTuple):
    """Of each play [N] the plays in its pool and those of them that are no longer; how many plays a pool needs."""

    earlier: Ints
    no_longer: Ints
    least: int


def run(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Mapping[str, Identities],
    pins: Mapping[str, int],
) -> dict[str, int]:
    """Writes the stale days of rewards in one pass; the version written."""
    days = todo.get("rewards")
    if not days:
        return {}
    version, first = pins["user_sequences"], min(days)

    def sequences_of(wanted: Collection[datetime.date]) -> DataFrame:
        return read_days(spark, lake, "user_sequences", wanted, version)

    back = datetime.timedelta(days=config.rewards.history_days)
    known = [d for d in calendar.days if first - back <= d <= max(days)]
    current = sequences_of([d for d in known if first <= d])
    earlier = [d for d in known if d < first]
    history = before = None
    if earlier:
        active = current.select("user_id").distinct()
        history = sequences_of(earlier).join(active, "user_id", "left_semi")
        before = sequences_of([d for d in earlier if (first - d).days <= config.rewards.population_days])
    rows = quantiles(current, history, before, config.rewards, tasks_for(lake, known, version), sorted(days))
    return {"rewards": replace_days(lake, "rewards", [rows], days)}


def quantiles(
    current: DataFrame,
    history: DataFrame | None,
    before: DataFrame | None,
    settings: RewardsConfig,
    tasks: int = 1,
    days: Collection[datetime.date] | None = None,
) -> ArrowRows:
    """Rows of rewards for every impression of `current` (rows of user_sequences, whole days); with `days`, of these alone.

    `history` holds the `history_days` days of the same users before `current` and `before` the last `population_days` days
    of all users; both are None at the start of the log.
    """
    shown = current if before is None else current.unionByName(before)
    population = Population.of(shown, buckets_of(settings)) if "population" in settings.backoff else None
    rows = current.select(F.lit(True).alias("asks"), *READ)
    if history is not None:
        rows = rows.unionByName(history.select(F.lit(False).alias("asks"), *READ))
    making = functools.partial(rewards_in, settings=settings, population=population, days=days)
    return ArrowRows("rewards", rows.repartition(tasks, "user_id"), making)


def rewards_in(
    batches: Batches, settings: RewardsConfig, population: Population | None, days: Collection[datetime.date] | None
) -> Iterator[pa.RecordBatch]:
    """Rows of rewards for the plays of `batches` that ask, in order of day, user and time."""
    plays = Plays.of(batches, settings)
    if plays is None:
        return
    order = np.flatnonzero(plays.asks if days is None else plays.asks & np.isin(plays.days, days_since_1970(days)))
    order = order[np.lexsort((plays.ts_us[order], plays.users[order], plays.days[order]))]
    quantile, pool = np.full(len(plays.asks), np.nan), np.full(len(plays.asks), -1)
    found = pools(plays, settings, population)
    for number, (earlier, no_longer, least) in enumerate(found.values()):
        enough = plays.known & (pool < 0) & (earlier >= least)
        quantile[enough], pool[enough] = no_longer[enough] / earlier[enough], number
    names = pa.array([*found, None])  # of pool -1 the last
    for part in pieces(starts(plays.days[order]), np.ones(len(order), np.int64), ROWS_A_BATCH):
        rows = order[part]
        yield pa.record_batch(
            {
                "impression_id": plays.impressions[rows],
                "user_id": plays.users[rows],
                "date": dates(plays.days[rows]),
                "bucket": pa.array(plays.buckets[rows], mask=plays.buckets[rows] == NO_BUCKET),
                "quantile": pa.array(quantile[rows], mask=pool[rows] < 0),
                "pool": names.take(pa.array(pool[rows] % len(names))),
                "negative": plays.negative[rows],
            }
        )


@dataclass(frozen=True)
class Plays:
    """The events of a task's users, in no order [N]; `known` where play and duration are."""

    asks: np.ndarray
    users: Ints
    user_numbers: Ints
    days: Ints
    impressions: Ints
    ts_us: Ints
    since_us: Ints  # from which plays of the user count, or NOTHING_OLDER
    play_ms: Ints
    buckets: Ints
    known: np.ndarray
    negative: np.ndarray

    @classmethod
    def of(cls, batches: Batches, settings: RewardsConfig) -> Plays | None:
        """From rows of READ and `asks`; None where there are none."""
        found = [batch for batch in batches if len(batch)]
        if not found:
            return None
        table = pa.Table.from_batches(found)
        arrays = {name: flat(table.column(name)) for name in READ[2:]}
        values = {name: array for name, (array, _) in arrays.items()}
        sizes = np.diff(arrays["ts_us"][1])
        users, days = table.column("user_id").to_numpy(), table.column("date").cast(pa.int32()).to_numpy()
        numbers = np.unique(users, return_inverse=True)[1]
        first_us = values["ts_us"][arrays["ts_us"][1][:-1]]
        since_us = window_starts(numbers, days, first_us, settings.history_days)
        of_row = {"asks": table.column("asks").to_numpy(), "users": users, "user_numbers": numbers, "days": days}
        of_row["since_us"] = since_us
        play_ms, duration_ms = values["play_ms"], values["duration_ms"]
        return cls(
            **{name: np.repeat(rows, sizes) for name, rows in of_row.items()},
            impressions=values["impression_ids"],
            ts_us=values["ts_us"],
            play_ms=play_ms,
            buckets=buckets_of(settings).of(duration_ms),
            known=known_plays(play_ms, duration_ms),
            negative=(values["feedback"] & mask_of(settings.negative)) != 0,
        )


def window_starts(users: Ints, days: Ints, first_us: Ints, days_back: int) -> Ints:
    """int64 of each user and day: the time of the user's first play on that day or the `days_back` before it, NOTHING_OLDER
    where there is none before those. `first_us` is that of the first play of each."""
    keys = users.astype(np.int64) << 32 | days  # in order of user and day
    order = np.argsort(keys)
    place = np.searchsorted(keys[order], users.astype(np.int64) << 32 | np.maximum(days - days_back, 0))
    older = (place > 0) & (users[order][place - 1] == users)
    return np.where(older, first_us[order][place], NOTHING_OLDER)


def pools(plays: Plays, settings: RewardsConfig, population: Population | None) -> dict[str, Pool]:
    """By name in the order in which they are asked; counts of plays that are not known mean nothing."""
    enough = max(1, settings.min_bucket)
    near = "neighbours" in settings.backoff
    own, beside = own_and_beside(plays, enough if near else 0)
    found = {"own": Pool(*own, enough)} | ({"neighbours": Pool(*beside, enough)} if near else {})
    if population is not None:
        asked = (plays.asks & plays.known, plays.days, plays.play_ms, plays.buckets)
        counts = population.earlier(*asked, settings.population_days)
        found["population"] = Pool(*counts, max(1, settings.min_population))
    return found


def buckets_of(settings: RewardsConfig) -> Buckets:
    return Buckets(settings.bucket_base, settings.epsilon)


def own_and_beside(plays: Plays, visit_below: int) -> tuple[Counts, Counts]:
    """(earlier, no longer) of each known play within the user's own bucket, and within it and the two beside it; the latter
    mean something for plays with fewer than `visit_below` earlier ones, which visit the buckets beside to ask there.

    A play whose user has plays that are too old asks twice: for all before it, and for all before the window, to be taken
    off.
    """
    known = np.flatnonzero(plays.known)
    ts_us, since_us, play_ms, buckets = (a[known] for a in (plays.ts_us, plays.since_us, plays.play_ms, plays.buckets))
    lowest = buckets.min(initial=0) - 1
    width = buckets.max(initial=0) - lowest + 2
    groups = plays.user_numbers[known] * width + (buckets - lowest)
    asks, is_old = plays.asks[known], since_us != NOTHING_OLDER
    every, old = np.arange(len(known)), np.flatnonzero(asks & is_old)
    natives = np.arange(len(known) + len(old)) < len(known)
    at_all = earlier_counts(np.append(groups, groups[old]), np.append(ts_us, since_us[old]), natives)
    at_all[old] -= at_all[len(known) :]
    few = np.flatnonzero(asks & (at_all[: len(known)] < visit_below))
    few_old = few[is_old[few]]
    asked = (every, old, few, few, few_old, few_old)
    sizes, rows = [len(part) for part in asked], np.concatenate(asked)
    beside, sign = np.repeat([0, 0, -1, 1, -1, 1], sizes), np.repeat([1, -1, 1, 1, -1, -1], sizes)
    when = np.where(sign > 0, ts_us[rows], since_us[rows])
    found = earlier_plays(groups[rows] + beside, when, play_ms[rows], np.arange(len(rows)) < len(every))

    def summed(chosen: np.ndarray) -> Counts:
        at = known[rows[chosen]]
        sums = (np.bincount(at, (values * sign)[chosen], len(plays.known)).astype(np.int64) for values in found)
        return next(sums), next(sums)

    return summed(beside == 0), summed(np.ones(len(rows), bool))


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(REWARDS, run))
