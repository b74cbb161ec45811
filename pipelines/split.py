"""Which requests train, validate and test, as two thresholds of time for each user.

By days the thresholds are the same for all users: the first instant of the validation and of the test days. By user,
they are the times of the user's last-but-one and last positive request: a user with one positive request has no
validation, one with none trains only.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from schemas.calendar import Calendar
from schemas.config import Config
from schemas.feedback import mask_of

Role = Literal["train", "validation", "test"]
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Roles:
    """Thresholds by user (sorted ids), and the default for all others; times in UTC microseconds."""

    user_ids: np.ndarray  # int64 [U], sorted
    validation_us: np.ndarray  # int64 [U]
    test_us: np.ndarray  # int64 [U]
    default: tuple[int, int]

    def thresholds(self, user_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [R] each: the first instant of validation and of test of every given user."""
        validation = np.full(len(user_ids), self.default[0], dtype=np.int64)
        test = np.full(len(user_ids), self.default[1], dtype=np.int64)
        if len(self.user_ids):
            place = np.searchsorted(self.user_ids, user_ids).clip(max=len(self.user_ids) - 1)
            found = self.user_ids[place] == user_ids
            validation[found], test[found] = self.validation_us[place[found]], self.test_us[place[found]]
        return validation, test

    def select(self, user_ids: np.ndarray, ts_us: np.ndarray, role: Role) -> np.ndarray:
        """bool [R]: the requests that have the role."""
        validation, test = self.thresholds(user_ids)
        if role == "train":
            return ts_us < np.minimum(validation, test)
        if role == "validation":
            return (ts_us >= validation) & (ts_us < test)
        return ts_us >= test


def day_start_us(day: datetime.date, time_zone: str) -> int:
    """UTC microseconds of the first instant of `day` in the zone."""
    start = datetime.datetime.combine(day, datetime.time(), ZoneInfo(time_zone))
    return int(start.timestamp() * 1_000_000)


def roles_by_day(calendar: Calendar, time_zone: str) -> Roles:
    empty = np.empty(0, dtype=np.int64)
    test = day_start_us(calendar.test[0], time_zone) if calendar.test else NEVER
    validation = day_start_us(calendar.validation[0], time_zone) if calendar.validation else test
    return Roles(empty, empty, empty, (validation, test))


def roles_by_user(sequences: Iterable[pa.Table], positive_mask: int) -> Roles:
    """Thresholds from tables with the columns user_id, ts_us, feedback of `user_sequences`, in any order."""
    users, times = [], []
    for table in sequences:
        feedback = table.column("feedback").combine_chunks()
        lengths = np.diff(feedback.offsets.to_numpy())
        positive = (feedback.flatten().to_numpy() & positive_mask) != 0
        users.append(np.repeat(table.column("user_id").to_numpy(), lengths)[positive])
        times.append(table.column("ts_us").combine_chunks().flatten().to_numpy()[positive])
    pairs = np.unique(np.stack([np.concatenate(users), np.concatenate(times)]), axis=1)  # sorted by user, then time
    if pairs.shape[1] == 0:  # nobody liked anything: everything trains, and there is nothing to test
        return Roles(pairs[0], pairs[0], pairs[0], (NEVER, NEVER))
    user_ids, ends = np.unique(pairs[0], return_index=True)
    last = np.append(ends[1:], pairs.shape[1]) - 1
    counts = last - ends + 1
    before_last = pairs[1, np.maximum(last - 1, 0)]
    test = np.where(counts >= 2, pairs[1, last], NEVER)  # a lone positive stays in train: nothing would precede it
    validation = np.where(counts >= 3, before_last, test)
    return Roles(user_ids, validation, test, (NEVER, NEVER))


def roles_of(config: Config, calendar: Calendar, sequences: Iterable[pa.Table]) -> Roles:
    """`sequences` is read only where the split is by user."""
    if config.split.by == "days":
        return roles_by_day(calendar, config.source.time_zone)
    return roles_by_user(sequences, mask_of(config.targets.positive))
