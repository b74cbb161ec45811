"""Arrays of arrays as flat values and offsets, so that a task works on all its users at once and never loops over rows.

Throughout, list i of a column is `values[offsets[i]:offsets[i + 1]]`, with offsets from 0.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator

import numpy as np
import pyarrow as pa

Ints = np.ndarray  # of any integer type


def flat(column: pa.ChunkedArray) -> tuple[np.ndarray, Ints]:
    """values [V] and offsets int64 [R + 1] of a list column without nulls."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return lists.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0]


def lists(offsets: Ints, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def offsets_of(sizes: Ints) -> Ints:
    """int64 [R + 1] from sizes [R]."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def ranges(first: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """The integers of [first[i], stop[i]) of all i one after the other, and the offsets of the ranges."""
    offsets = offsets_of(stop - first)
    return np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], stop - first), offsets


def dates(days: Ints) -> pa.Array:
    """date32 from days since 1970."""
    return pa.array(days, pa.int32()).cast(pa.date32())


def days_since_1970(days: Collection[datetime.date]) -> Ints:
    return np.array([(day - datetime.date(1970, 1, 1)).days for day in sorted(days)], np.int32)


def starts(*columns: np.ndarray) -> Ints:
    """Where a run of rows that agree in every column begins."""
    changed = np.ones(len(columns[0]), bool)
    if len(changed):
        changed[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return np.flatnonzero(changed)


def pieces(runs: Ints, sizes: Ints, limit: int) -> Iterator[slice]:
    """Consecutive rows within one run (they begin at `runs`) whose sizes sum to `limit` at most, or one row."""
    total = offsets_of(sizes)
    for first, stop in zip(runs, [*runs[1:], len(sizes)], strict=True):
        while first < stop:
            fits = int(np.searchsorted(total, total[first] + limit, "right")) - 1
            last = min(max(fits, first + 1), stop)
            yield slice(int(first), int(last))
            first = last
