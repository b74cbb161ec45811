"""The split as the organised examples tell it: which of their requests train, validate and test.

Training and evaluation ask here, so that a request has one role for both. By days nothing is read; by user the targets
of all examples stream through once.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipelines.ray_tables import read_dataset
from pipelines.split import Roles, roles_of
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.lake import Lake

COLUMNS = ["user_id", "request_ts_us", "target_start", "target_feedback"]
READ_ROWS = 8192


def load_roles(lake: Lake, version: int, config: Config, calendar: Calendar) -> Roles:
    """The roles of the requests of `training_examples` at a pinned version."""
    if config.split.by == "days":
        return roles_of(config, calendar, ())
    dataset = read_dataset(lake, "training_examples", version, COLUMNS)
    tables = dataset.iter_batches(batch_size=READ_ROWS, batch_format="pyarrow")
    return roles_of(config, calendar, (role_events(table) for table in tables))


def role_events(table: pa.Table) -> pa.Table:
    """user_id, ts_us, feedback with a row an example: each target at the time of its request."""
    feedback = list_column(table, "target_feedback")
    offsets = feedback.offsets.to_numpy()
    ts_us = pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), pa.array(requests_of_targets(table)[1]))
    return pa.table({"user_id": table.column("user_id"), "ts_us": ts_us, "feedback": feedback})


def requests_of_targets(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """User and time (int64 [T] each) of the request that each target belongs to."""
    starts, requests = list_column(table, "target_start"), list_column(table, "request_ts_us")
    sizes = np.diff(starts.flatten().to_numpy())
    # Between two examples lies the difference of one's last and the next one's first offset, which is no request.
    ends = np.cumsum(np.diff(starts.offsets.to_numpy()))
    sizes = np.delete(sizes, ends[:-1] - 1)
    user_R = np.repeat(table.column("user_id").to_numpy(), np.diff(requests.offsets.to_numpy()))
    return np.repeat(user_R, sizes), np.repeat(requests.flatten().to_numpy(), sizes)


def list_column(table: pa.Table, name: str) -> pa.ListArray:
    column = table.column(name).combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
