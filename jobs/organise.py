"""Impressions organised into training examples (OneRec-V2, section 2.1), a day of training_examples at a time.

How is settled by `organise.organiser` (see `jobs.organisers`) and by the role of the day (`schemas.calendar.organised_as`):
days after the fit, which validate, test or come at night, are always organised by newest_only, so that evaluation
counts every positive once whatever the organiser. `user_centric` writes every user's example into the partition of
the fit day, and the train days before it stay empty; it is made anew when that day moves. By a split by user all days
train: naive is refused there, since a repeat would count a held-out positive again, and user_centric is not, since a
request has its own time and with it its role. Alignment reads the last train days by partition: after user_centric
these are all of them.

The day is sliced out of each user's timeline (see `jobs.timelines`), which starts from user_features of the days
before: the work is one shuffle of the day's events, whatever the length of a history, plus the size of the output.
user_centric reads the whole log.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterable, Mapping

from pyspark.sql import DataFrame, SparkSession

from jobs.arrow_files import ArrowRows
from jobs.organisers import ORGANISERS, organised
from jobs.tables import read, read_days, replace_days
from jobs.timelines import newest_rows, tasks_for
from schemas.calendar import Calendar, organised_as
from schemas.config import Config
from schemas.lake import Identities, Lake
from schemas.lineage import ORGANISE

Days = list[datetime.date]


def run(
    spark: SparkSession,
    lake: Lake,
    config: Config,
    calendar: Calendar,
    todo: Mapping[str, Identities],
    pins: Mapping[str, int],
) -> dict[str, int]:
    """Writes the stale days of training_examples in one commit; the version written."""
    days = todo.get("training_examples")
    if not days:
        return {}
    users = read(spark, lake, "users", pins["users"])
    parts: list[ArrowRows] = []
    for name, own in days_by_organiser(config, calendar, days).items():
        wanted = days_read(name, calendar, own)
        sequences, base = history(spark, lake, calendar, pins, wanted)
        known = None if base is None else pins["user_features"]
        tasks = tasks_for(lake, wanted, pins["user_sequences"], known)
        into = calendar.fit_day if ORGANISERS[name].whole else None
        parts.append(organised(name, sequences, base, users, config, tasks, own, into))
    return {"training_examples": replace_days(lake, "training_examples", parts, days)}


def days_by_organiser(config: Config, calendar: Calendar, days: Iterable[datetime.date]) -> dict[str, Days]:
    """The days that each organiser makes, in order; days that stay empty are left out."""
    found: dict[str, Days] = {}
    for day in sorted(days):
        organiser = organised_as(config, calendar, day)
        if organiser in ORGANISERS:
            found.setdefault(organiser, []).append(day)
    return found


def days_read(organiser: str, calendar: Calendar, days: Days) -> Days:
    """The days of user_sequences behind examples of `days`, without a gap."""
    first = calendar.days[0] if ORGANISERS[organiser].whole else min(days)
    return [d for d in calendar.days if first <= d <= max(days)]


def history(
    spark: SparkSession, lake: Lake, calendar: Calendar, pins: Mapping[str, int], days: Days
) -> tuple[DataFrame, DataFrame | None]:
    """The events of `days`, and what user_features holds of their users before them; None at the start of the log."""
    sequences = read_days(spark, lake, "user_sequences", days, pins["user_sequences"])
    earlier = [d for d in calendar.days if d < min(days)]
    if not earlier:
        return sequences, None
    return sequences, newest_rows(read_days(spark, lake, "user_features", earlier, pins["user_features"]), sequences)


if __name__ == "__main__":
    from jobs.main import main

    sys.exit(main(ORGANISE, run))
