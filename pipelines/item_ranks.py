"""The order of items that share their codes: a stated tie-break, which appending never changes.

Items of the fit day come by the number of their train positives, most first, then by id; items of later days follow in
the order of the days, then by id.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from pipelines.ray_tables import arrow_parts, read_dataset
from pipelines.split import Roles, roles_by_user
from pipelines.stage import StageContext
from schemas.feedback import mask_of

COLUMNS = ("user_id", "ts_us", "feedback", "item_ids")
ROWS_AT_ONCE = 100_000  # each with a user's events of a day


def train_positives(context: StageContext, item_ids: np.ndarray) -> np.ndarray:
    """int64 [N]: train positives of each of `item_ids` (sorted) up to the fit day, counted in Ray Data tasks."""
    context.engines.ray()
    days = context.calendar.until_fit
    version = context.pins["user_sequences"]
    mask = mask_of(context.config.targets.positive)
    roles = None
    if context.config.split.by == "user":
        roles = roles_by_user(arrow_parts(context.lake, "user_sequences", version, COLUMNS[:3], days, ROWS_AT_ONCE), mask)
    events = read_dataset(context.lake, "user_sequences", version, COLUMNS, days)
    count = partial(count_positives, mask=mask, roles=roles)
    counted = events.map_batches(count, batch_format="pyarrow", batch_size=None)
    return sum_counts(counted.iter_batches(batch_format="pyarrow", batch_size=None), item_ids)


def count_positives(batch: pa.Table, mask: int, roles: Roles | None) -> pa.Table:
    """item_id and count of the positives in a batch of user_sequences; of the train role alone where roles are given."""
    feedback = batch.column("feedback").combine_chunks()
    keep = (feedback.flatten().to_numpy() & mask) != 0
    if roles is not None:
        users = np.repeat(batch.column("user_id").to_numpy(), np.diff(feedback.offsets.to_numpy()))
        times = batch.column("ts_us").combine_chunks().flatten().to_numpy()
        keep &= roles.select(users, times, "train")
    items = batch.column("item_ids").combine_chunks().flatten().to_numpy()[keep]
    ids, counts = np.unique(items, return_counts=True)
    return pa.table({"item_id": ids, "count": counts.astype(np.int64)})


def sum_counts(parts: Iterable[pa.Table], item_ids: np.ndarray) -> np.ndarray:
    """int64 [N] for sorted `item_ids`; other items are left out."""
    total = np.zeros(len(item_ids), np.int64)
    for part in parts:
        ids, counts = part.column("item_id").to_numpy(), part.column("count").to_numpy()
        place = np.searchsorted(item_ids, ids).clip(max=len(item_ids) - 1)
        known = item_ids[place] == ids
        np.add.at(total, place[known], counts[known])
    return total


def ranks(
    codes: np.ndarray, days: Sequence[datetime.date] | np.ndarray, counts: np.ndarray, item_ids: np.ndarray
) -> np.ndarray:
    """int32 [N]: the place of each item among those with the same codes [N, L], by (day, count descending, item id)."""
    order = np.lexsort((item_ids, -counts, np.asarray(days, "datetime64[D]"), *codes.T[::-1]))
    sorted_codes = codes[order]
    starts = np.append(True, (sorted_codes[1:] != sorted_codes[:-1]).any(1))[: len(codes)]
    places = np.arange(len(codes))
    result = np.empty(len(codes), np.int32)
    result[order] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return result
