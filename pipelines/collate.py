"""Collate: rows of `training_examples` to `model.requests.Requests`, by Arrow offsets and without a loop over rows.

Every choice of an experiment is made here and not in a table: the role of a request, which targets bear a loss, how
much history a model reads, the codes of one codebook. A row holds the context once and several requests; request r
sees context[0:history_end[r]] and nothing after it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from ray.data.collate_fn import ArrowBatchCollateFn

from model.requests import Requests
from pipelines.catalogue import Catalogue
from pipelines.split import Role, Roles

EVENTS = ("item_ids", "author_ids", "ts_us", "play_ms", "duration_ms", "feedback")
EVERY_TARGET = -1  # a loss mask that all bits and none pass

COLUMNS = (
    *("user_id", "attributes", "context_item_ids", "context_author_ids", "context_ts_us", "context_play_ms"),
    *("context_duration_ms", "context_feedback", "request_ts_us", "history_end", "target_start"),
    *("target_impression_ids", "target_item_ids", "target_feedback"),
)


@dataclass(frozen=True)
class HistoryLimit:
    """What a model reads of a history: the newest `short` events and the newest `positive` ones with a bit of `mask`."""

    short: int
    positive: int
    mask: int


def requests_of(
    table: pa.Table | pa.RecordBatch,
    catalogue: Catalogue,
    roles: Roles | None = None,
    role: Role | None = None,
    loss_mask: int | None = None,
    limit: HistoryLimit | None = None,
) -> Requests:
    """The requests of the rows in their order; with `roles` and `role`, those that have the role.

    With `loss_mask` only targets with one of its bits (EVERY_TARGET: with any feedback or none) whose item the catalogue
    knows are kept, and only requests that have such a target; without it all targets are, unknown items as -1. `limit`
    leaves out history no pathway reads.
    """
    users = table.column("user_id").to_numpy(zero_copy_only=False) if len(table) else np.empty(0, np.int64)
    ts_us, request_offsets = _jagged(table, "request_ts_us")
    row = np.repeat(np.arange(len(users)), np.diff(request_offsets))
    items, target_offsets = _jagged(table, "target_item_ids")
    feedback, _ = _jagged(table, "target_feedback")
    starts, _ = _jagged(table, "target_start")
    place = np.arange(len(row)) + row  # a row has one more start than requests
    first, last = target_offsets[row] + starts[place], target_offsets[row] + starts[place + 1]
    dense = catalogue.dense(items)
    bears = np.ones(len(items), bool)
    if loss_mask is not None:
        bears = (dense >= 0) & ((loss_mask == EVERY_TARGET) | ((feedback & loss_mask) != 0))
    chosen = np.ones(len(row), bool) if roles is None or role is None else roles.select(users[row], ts_us, role)
    if loss_mask is not None:
        before = np.concatenate([[0], np.cumsum(bears)])
        chosen &= before[last] > before[first]
    row, first, last = row[chosen], first[chosen], last[chosen]

    targets, offsets = _keep(*ranges(first, last), bears)
    history, history_offsets = _history(table, row, _jagged(table, "history_end")[0][chosen], limit)
    attributes, attribute_offsets = _attributes(table, row)
    impressions, _ = _jagged(table, "target_impression_ids")
    return Requests(
        user_ids=to_tensor(users[row]),
        ts_us=to_tensor(ts_us[chosen]),
        attribute_offsets=to_tensor(attribute_offsets),
        attributes=to_tensor(attributes),
        history_offsets=to_tensor(history_offsets),
        history_items=to_tensor(catalogue.dense(history.pop("item_ids"))),
        history_authors=to_tensor(history.pop("author_ids")),
        **{f"history_{name}": to_tensor(values) for name, values in history.items()},
        target_offsets=to_tensor(offsets),
        target_items=to_tensor(dense[targets]),
        target_feedback=to_tensor(feedback[targets]),
        target_impressions=to_tensor(impressions[targets]),
    )


def requests_as_of(features: pa.Table, catalogue: Catalogue, engaged_mask: int, ts_us: int) -> Requests:
    """Rows of `user_features` as requests at the time `ts_us` without targets: the context that `organise` would give.

    That is the union in time order of the newest events and the engaged ones (bits of `engaged_mask`) before them.
    """
    rows = len(features)
    recent, recent_offsets = _jagged(features, "short_feedback")
    engaged = np.concatenate([[0], np.cumsum((recent & engaged_mask) != 0)])
    in_recent = engaged[recent_offsets[1:]] - engaged[recent_offsets[:-1]]
    engaged_offsets = _jagged(features, "positive_feedback")[1]
    # Both lines one after the other; of each row first the older engaged events, then the recent ones.
    first = np.stack([engaged_offsets[:-1], recent_offsets[:-1] + engaged_offsets[-1]], axis=1).ravel()
    last = np.stack([engaged_offsets[1:] - in_recent, recent_offsets[1:] + engaged_offsets[-1]], axis=1).ravel()
    index, offsets = ranges(first, last)
    columns = {"user_id": features.column("user_id"), "attributes": features.column("attributes")}
    for name in EVENTS:
        values = np.concatenate([_jagged(features, f"{line}_{name}")[0] for line in ("positive", "short")])[index]
        columns[f"context_{name}"] = _lists(offsets[::2], values)
    ones, nothing = np.arange(rows + 1), np.zeros(rows + 1, np.int64)
    columns |= {"request_ts_us": _lists(ones, np.full(rows, ts_us)), "history_end": _lists(ones, np.diff(offsets[::2]))}
    columns["target_start"] = _lists(2 * ones, np.zeros(2 * rows, np.int64))
    targets = ("target_impression_ids", "target_item_ids", "target_feedback")
    columns |= {name: _lists(nothing, np.empty(0, np.int64)) for name in targets}
    return requests_of(pa.table(columns), catalogue)


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int64()))


class ExampleCollate(ArrowBatchCollateFn):
    """`requests_of` for the iterators of Ray Data."""

    def __init__(
        self,
        catalogue: Catalogue,
        roles: Roles | None = None,
        role: Role | None = None,
        loss_mask: int | None = None,
        limit: HistoryLimit | None = None,
    ) -> None:
        super().__init__()
        self.arguments = (catalogue, roles, role, loss_mask, limit)

    def __call__(self, batch: pa.Table) -> Requests:  # type: ignore[override]  # Ray passes other types on as they are
        return requests_of(batch, *self.arguments)


def text_hashes(texts: pa.Array) -> np.ndarray:
    """int64 [n]: a hash of each text that is the same in every process and on every machine."""
    encoded = texts.dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False).astype(object)
    hashes = pd.util.hash_array(distinct, categorize=False).view(np.int64)
    return hashes[encoded.indices.to_numpy()] if len(distinct) else np.empty(0, np.int64)


def concat_requests(parts: list[Requests]) -> Requests:
    """The requests of all parts in order; at least one part."""
    joined = {}
    for field in fields(Requests):
        values = [getattr(part, field.name) for part in parts]
        if field.name.endswith("_offsets"):
            ends = np.cumsum([0, *(int(v[-1]) for v in values)])
            values = [v[min(i, 1) :] + int(end) for i, (v, end) in enumerate(zip(values, ends[:-1], strict=True))]
        joined[field.name] = torch.cat(values)
    return Requests(**joined)


def _history(
    table: pa.Table | pa.RecordBatch, row: np.ndarray, ends: np.ndarray, limit: HistoryLimit | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    columns = {name: _jagged(table, f"context_{name}") for name in EVENTS}
    start = columns["item_ids"][1][row]
    index, offsets = ranges(start, start + ends)
    if limit is not None:
        index, offsets = _within(index, offsets, columns["feedback"][0], limit)
    return {name: values[index] for name, (values, _) in columns.items()}, offsets


def _within(
    index: np.ndarray, offsets: np.ndarray, feedback: np.ndarray, limit: HistoryLimit
) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(offsets)
    newer = np.repeat(offsets[1:], lengths) - 1 - np.arange(len(index))  # events of the row after this one
    engaged = (feedback[index] & limit.mask) != 0
    before = np.concatenate([[0], np.cumsum(engaged)])
    newer_engaged = np.repeat(before[offsets[1:]], lengths) - before[1:]
    wanted = (newer < limit.short) | (engaged & (newer_engaged < limit.positive))
    kept = np.concatenate([[0], np.cumsum(wanted)])
    return index[wanted], kept[offsets]


def _attributes(table: pa.Table | pa.RecordBatch, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    texts, offsets = arrow_lists(table, "attributes")
    index, taken = ranges(offsets[row], offsets[row + 1])
    return text_hashes(texts)[index], taken


def arrow_lists(table: pa.Table | pa.RecordBatch, name: str) -> tuple[pa.Array, np.ndarray]:
    """The values of a list column in one array, and its offsets from 0 (int64)."""
    column = table.column(name)
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks or [pa.array([], type=column.type)])
    offsets = column.offsets.to_numpy().astype(np.int64)
    return column.flatten(), offsets - offsets[0]


def _jagged(table: pa.Table | pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    values, offsets = arrow_lists(table, name)
    return pc.cast(values, pa.int64()).to_numpy(zero_copy_only=False), offsets


def ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of [first[r], last[r]) of all r one after the other, and their offsets."""
    offsets = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int64)
    return np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], last - first), offsets


def _keep(index: np.ndarray, offsets: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = wanted[index]
    return index[kept], np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)[offsets]


def to_tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64).copy())
