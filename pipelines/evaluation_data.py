"""What evaluation reads, through Ray Data from the pinned `training_examples`: positives to fit on, requests to rank.

A query is one request of a role with at least one positive target; every positive target of it counts, also an item
that the catalogue does not know. Positives take 24 bytes each in this process; requests stream through in batches and
are never held together, but for a few batches whose long histories are read at once.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from model.positives import Positives, keep_targets, take_rows
from model.requests import Requests
from pipelines.catalogue import Catalogue
from pipelines.collate import COLUMNS, requests_of
from pipelines.example_roles import list_column, requests_of_targets
from pipelines.long_histories import LongHistories
from pipelines.ray_tables import read_dataset
from pipelines.sampling import Sample
from pipelines.split import Role, Roles
from schemas.calendar import Calendar
from schemas.lake import Lake

TARGET_COLUMNS = ["user_id", "request_ts_us", "target_start", "target_item_ids", "target_feedback"]


@dataclass(frozen=True)
class TargetRows:
    """Positive targets as parallel arrays: user, time of the request, item id."""

    user_ids: np.ndarray  # int64 [T]
    ts_us: np.ndarray  # int64 [T]
    item_ids: np.ndarray  # int64 [T]

    def requests(self) -> tuple[np.ndarray, np.ndarray]:
        """(user ids, times) of the distinct requests, int64 [R] each."""
        pairs = np.unique(np.stack([self.user_ids, self.ts_us]), axis=1)
        return pairs[0], pairs[1]


@dataclass(frozen=True)
class EvaluationData:
    """The examples of one pinned version, split into roles."""

    lake: Lake
    version: int
    catalogue: Catalogue
    roles: Roles
    calendar: Calendar
    positive_mask: int
    batch_rows: int = 256
    long: LongHistories | None = None  # of the models that are asked

    def targets(self, role: Role) -> TargetRows:
        """Every positive target of the role's requests; reads five columns of the role's days."""
        dataset = read_dataset(self.lake, "training_examples", self.version, TARGET_COLUMNS, self._days(role))
        tables = dataset.iter_batches(batch_size=8192, batch_format="pyarrow")
        return positive_targets(tables, self.roles, role, self.positive_mask)

    def train_positives(self) -> Positives:
        """What baselines are fitted on: the positive targets of train requests, by dense index."""
        rows = self.targets("train")
        return Positives.of(rows.user_ids, rows.ts_us, self.catalogue.dense(rows.item_ids), len(self.catalogue))

    def queries(self, role: Role, sample: Sample | None = None) -> Iterator[Requests]:
        """Batches of the role's queries with their positive targets alone, in the table's order."""
        found = self._queries(role, sample)
        return found if self.long is None else self.long.given_to(found)

    def _queries(self, role: Role, sample: Sample | None) -> Iterator[Requests]:
        dataset = read_dataset(self.lake, "training_examples", self.version, COLUMNS, self._days(role))
        for table in dataset.iter_batches(batch_size=self.batch_rows, batch_format="pyarrow"):
            requests = positive_queries(requests_of(table, self.catalogue, self.roles, role), self.positive_mask)
            if sample is not None:
                kept = sample.keeps(requests.user_ids.numpy(), requests.ts_us.numpy())
                requests = take_rows(requests, torch.from_numpy(np.flatnonzero(kept)))
            if len(requests):
                yield requests

    def _days(self, role: Role) -> list[datetime.date]:
        return list(
            {"train": self.calendar.train, "validation": self.calendar.validation, "test": self.calendar.test}[role]
        )


def positive_targets(tables: Iterable[pa.Table], roles: Roles, role: Role, positive_mask: int) -> TargetRows:
    """From tables with `TARGET_COLUMNS` of `training_examples`, in any order."""
    empty = np.empty(0, np.int64)
    users, times, items = [empty], [empty], [empty]
    for table in tables:
        user_T, ts_T = requests_of_targets(table)
        feedback_T = list_column(table, "target_feedback").flatten().to_numpy()
        keep = roles.select(user_T, ts_T, role) & ((feedback_T & positive_mask) != 0)
        users.append(user_T[keep])
        times.append(ts_T[keep])
        items.append(list_column(table, "target_item_ids").flatten().to_numpy()[keep])
    return TargetRows(np.concatenate(users), np.concatenate(times), np.concatenate(items))


def positive_queries(requests: Requests, positive_mask: int) -> Requests:
    """The requests with a positive target, and of their targets the positive ones."""
    return keep_targets(requests, (requests.target_feedback & positive_mask) != 0)
