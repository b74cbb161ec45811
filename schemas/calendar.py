"""Days of a log and their roles: what trains, what validates, what tests.

By days, the last days are test, those before validate, the rest train, and `fit_day` is the last train day. By user,
all days hold train, validation and test events; the split is then a threshold of time for each user, and `fit_day` is
the last day of the log. At night the codebook stays the one of an earlier fit day, and one new day is first test and
then train.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from schemas.config import Config, SplitConfig
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake

WITH_FIT_DAY = "with the fit day"


@dataclass(frozen=True)
class DayRange(Collection[datetime.date]):
    """The days from `first` to `last`, those that no log holds included; without a `last`, all from `first` on."""

    first: datetime.date
    last: datetime.date = datetime.date.max

    def __contains__(self, day: object) -> bool:
        return isinstance(day, datetime.date) and self.first <= day <= self.last

    def __iter__(self) -> Iterator[datetime.date]:
        return (self.first + datetime.timedelta(days=n) for n in range(len(self)))

    def __len__(self) -> int:
        return max(0, (self.last - self.first).days + 1)

    def __str__(self) -> str:
        return f"from {self.first} on" if self.last == datetime.date.max else f"from {self.first} to {self.last}"


@dataclass(frozen=True)
class Calendar:
    """The days of a log in order, and the roles that the split gives them."""

    days: tuple[datetime.date, ...]
    train: tuple[datetime.date, ...]
    validation: tuple[datetime.date, ...]
    test: tuple[datetime.date, ...]
    codebook_day: datetime.date | None = None  # null: the last train day

    @property
    def fit_day(self) -> datetime.date:
        """The vectors and the codebook were fitted on events up to the end of this day."""
        return self.codebook_day or self.train[-1]

    @property
    def trained_until(self) -> datetime.date:
        """The model has seen no event after the end of this day."""
        return self.train[-1]

    @property
    def until_fit(self) -> tuple[datetime.date, ...]:
        """The days up to the fit day, whose events what is fitted may know."""
        return tuple(day for day in self.days if day <= self.fit_day)

    @property
    def appended(self) -> tuple[datetime.date, ...]:
        """Days after the fit, on which new items are appended to what was fitted."""
        return tuple(day for day in self.days if day > self.fit_day)


def calendar_of(days: Iterable[datetime.date], split: SplitConfig) -> Calendar:
    """Raises ContractViolation where the log has too few days for the split."""
    ordered = tuple(sorted(set(days)))
    if split.by == "user":
        if not ordered:
            raise ContractViolation("The log has no days: table impressions is empty. Check source.path.")
        return Calendar(ordered, ordered, ordered, ordered)
    held_out = split.validation_days + split.test_days
    if len(ordered) <= held_out:
        raise ContractViolation(
            f"The log has {len(ordered)} day(s), but the split holds out {held_out}; "
            "use a longer log, lower split.validation_days and split.test_days, or set split.by to user."
        )
    first_test = len(ordered) - split.test_days
    first_validation = first_test - split.validation_days
    return Calendar(ordered, ordered[:first_validation], ordered[first_validation:first_test], ordered[first_test:])


def log_calendar(config: Config, lake: Lake) -> Calendar:
    """The roles of the days that ingest has committed. Raises MissingUpstream where there are none."""
    days = lake.identities("impressions")
    if not days:
        raise MissingUpstream(f"Table impressions is not in {lake.root} yet; run `lazyrec ingest` first.")
    return calendar_of(days, config.split)


def before_training(
    days: Iterable[datetime.date], night: datetime.date, codebook_day: datetime.date, trained_until: datetime.date
) -> Calendar:
    """The night's first half: a model trained up to `trained_until` meets the day `night`; days between validate."""
    known = tuple(sorted(day for day in set(days) if day <= night))
    train = tuple(day for day in known if day <= trained_until)
    between = tuple(day for day in known if trained_until < day < night)
    return Calendar(known, train, between, (night,), codebook_day)


def training(scored: Calendar) -> Calendar:
    """The night's second half: what was scored, and the days between, train the next candidate."""
    return Calendar(scored.days, (*scored.validation, *scored.test), (), (), scored.codebook_day)


def organised_as(config: Config, calendar: Calendar, day: datetime.date) -> str:
    """How the partition `day` of training_examples is made: the name of an organiser, or WITH_FIT_DAY where its events
    are in the partition of the fit day. Days after the fit are for evaluation, which counts every positive once."""
    organiser = config.organise.organiser
    if day > calendar.fit_day:
        return "newest_only"
    return WITH_FIT_DAY if organiser == "user_centric" and day < calendar.fit_day else organiser


def organised_otherwise(config: Config, calendar: Calendar, day: datetime.date) -> str:
    """`organised_as` for the identity of a partition; empty where the organiser makes all days in one way."""
    return "" if config.organise.organiser == "newest_only" else organised_as(config, calendar, day)
