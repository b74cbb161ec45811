"""Constraints of a table, each said once for two engines: as SQL, which Delta keeps with the table and enforces on what
Spark and delta-rs write, and on Arrow batches, for rows that are written as files where they are made.

As in Delta a row for which a constraint is unknown breaks it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

Batch = Any  # pa.RecordBatch or pa.Table


@dataclass(frozen=True)
class Check:
    """`sql` is true for every row; `holds` gives it as one boolean a row, null where it is unknown."""

    sql: str
    holds: Callable[[Batch], pa.Array]

    def broken(self, batch: Batch) -> int:
        """Rows of `batch` that break it."""
        return len(batch) - (pc.sum(self.holds(batch)).as_py() or 0)


def at_least(low: int, *names: str) -> Check:
    """Every column is `low` or more, and known."""

    def of(name: str) -> Check:
        return Check(f"{name} >= {low}", lambda batch: pc.greater_equal(batch.column(name), low))

    return _all(*map(of, names))


def unknown_or_at_least(low: int, name: str) -> Check:
    sql = f"{name} IS NULL OR {name} >= {low}"
    return Check(sql, lambda batch: _or_null(batch.column(name), pc.greater_equal(batch.column(name), low)))


def unknown_or_positive(name: str) -> Check:
    sql = f"{name} IS NULL OR {name} > 0"
    return Check(sql, lambda batch: _or_null(batch.column(name), pc.greater(batch.column(name), 0)))


def positive(name: str) -> Check:
    """Of floats; to SQL NaN is the largest number."""
    sql = f"{name} > 0"
    return Check(sql, lambda batch: pc.or_kleene(pc.greater(batch.column(name), 0), pc.is_nan(batch.column(name))))


def unknown_or_share(name: str) -> Check:
    """Between 0 and 1."""

    def holds(batch: Batch) -> pa.Array:
        column = batch.column(name)
        return _or_null(column, pc.and_(pc.greater_equal(column, 0), pc.less_equal(column, 1)))

    return Check(f"{name} IS NULL OR ({name} >= 0 AND {name} <= 1)", holds)


def parallel(first: str, *others: str) -> Check:
    """Arrays of one length. SQL's `size` is unknown to delta-rs, `cardinality` means the same to both."""
    return _all(*(_lengths(first, other, 0) for other in others))


def one_longer(longer: str, name: str) -> Check:
    return _lengths(longer, name, 1)


def elements_at_least(low: int, name: str) -> Check:
    """Every element of an array that is not empty."""

    def holds(batch: Batch) -> pa.Array:
        column = batch.column(name)
        lists = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
        smallest = pa.table({"row": pc.list_parent_indices(lists), "value": pc.list_flatten(lists)})
        found = smallest.group_by("row").aggregate([("value", "min")])
        rows = pa.array(range(len(lists)), pa.int64())
        kept = found.filter(pc.greater_equal(found.column("value_min"), low)).column("row")
        return pc.is_in(rows, value_set=pc.cast(kept, pa.int64()))

    return Check(f"array_min({name}) >= {low}", holds)


def _lengths(left: str, right: str, more: int) -> Check:
    sql = f"cardinality({left}) = cardinality({right})" + (f" + {more}" if more else "")

    def holds(batch: Batch) -> pa.Array:
        lengths = [pc.list_value_length(batch.column(name)) for name in (left, right)]
        return pc.equal(lengths[0], pc.add(lengths[1], more))

    return Check(sql, holds)


def _all(*checks: Check) -> Check:
    def holds(batch: Batch) -> pa.Array:
        found = checks[0].holds(batch)
        for check in checks[1:]:
            found = pc.and_kleene(found, check.holds(batch))
        return found

    return Check(" AND ".join(check.sql for check in checks), holds)


def _or_null(column: pa.Array, holds: pa.Array) -> pa.Array:
    return pc.or_kleene(pc.is_null(column), holds)
