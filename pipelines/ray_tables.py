"""The Ray side of table access: pinned versions, guarded protocol, few columns."""

from __future__ import annotations

import datetime
import functools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import ray.data
from deltalake import write_deltalake

from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake, assert_ray_readable
from schemas.tables import PARTITION, TABLES, Table


def days_filter(days: Collection[datetime.date]) -> pads.Expression:
    return pads.field(PARTITION).isin(pa.array(sorted(days), pa.date32()))


def read_dataset(
    lake: Lake,
    name: str,
    version: int,
    columns: Sequence[str] | None = None,
    days: Collection[datetime.date] | None = None,
    where: pads.Expression | None = None,
) -> ray.data.Dataset:
    """A table at a pinned version as a streaming Ray Data set, pruned to `days`, `columns` and the rows of `where`."""
    _guard(lake, name)
    wanted = [condition for condition in (None if days is None else days_filter(days), where) if condition is not None]
    arguments = {"filter": functools.reduce(operator.and_, wanted)} if wanted else {}
    return ray.data.read_delta(lake.path(name), version=version, columns=list(columns) if columns else None, **arguments)


def read_arrow(
    lake: Lake,
    name: str,
    version: int,
    columns: Sequence[str] | None = None,
    days: Collection[datetime.date] | None = None,
) -> pa.Table:
    """The same rows in this process; for tables that grow with the catalogue, never with the log."""
    _guard(lake, name)
    dataset = lake.open(name, version).to_pyarrow_dataset()
    return dataset.to_table(columns=list(columns) if columns else None, filter=None if days is None else days_filter(days))


def arrow_parts(
    lake: Lake, name: str, version: int, columns: Sequence[str], days: Collection[datetime.date], rows: int
) -> Iterator[pa.Table]:
    """The rows of `days` in this process, in the order of days, as tables of whole days and about `rows` at most."""
    for part in day_parts(sorted(days), lake.rows_by_day(name, version), rows):
        yield _by_day(read_arrow(lake, name, version, [*columns, PARTITION], part))


def day_parts(
    days: Iterable[datetime.date], sizes: Mapping[datetime.date, int], rows: int
) -> Iterator[list[datetime.date]]:
    """The days in their order, in parts of about `rows` rows at most, one day at least; `sizes` are the rows of each."""
    part: list[datetime.date] = []
    held = 0
    for day in days:
        if part and held + sizes.get(day, 0) > rows:
            yield part
            part, held = [], 0
        part.append(day)
        held += sizes.get(day, 0)
    if part:
        yield part


def _by_day(table: pa.Table) -> pa.Table:
    """In the order of days, which files do not keep."""
    return table.sort_by(PARTITION).drop_columns([PARTITION])


def lists_of(matrix: np.ndarray) -> pa.ListArray:
    """The rows of a matrix [N, L], of its own type, as lists: tables have none of a fixed size."""
    values = pa.array(matrix.ravel())
    return pa.FixedSizeListArray.from_arrays(values, matrix.shape[1]).cast(pa.list_(values.type))


def newest_rows(table: pa.Table, key: str, until: datetime.date | None = None) -> pa.Table:
    """The row of each `key` with the newest date, at or before `until` where it is given; ascending by key."""
    if until is not None:
        table = table.filter(pc.less_equal(table.column(PARTITION), pa.scalar(until)))
    table = table.sort_by([(key, "ascending"), (PARTITION, "ascending")])
    keys = table.column(key).to_numpy()
    return table.take(pa.array(np.flatnonzero(np.append(keys[1:] != keys[:-1], True)[: len(keys)])))


def replace_days(
    lake: Lake, name: str, rows: pa.Table | pa.RecordBatchReader, identities: Mapping[datetime.date, str]
) -> int:
    """Replaces the partitions of `identities` in one commit, creating the table from its contract; the new version.

    A table must fit into this process; a reader streams through it. Raises ContractViolation for rows of another day.
    """
    table = TABLES[name]
    days = ", ".join(f"'{day.isoformat()}'" for day in sorted(identities))
    batches = _Conformed(rows.to_reader() if isinstance(rows, pa.Table) else rows, table, identities)
    with lake.writing(name, identities) as write:
        try:
            write_deltalake(
                lake.path(name),
                pa.RecordBatchReader.from_batches(table.schema, batches),
                mode="overwrite",
                predicate=f"{PARTITION} IN ({days})",
                commit_properties=lake.properties(write),
            )
        except Exception as error:  # not always a DeltaError: on one core the writer passes on what Arrow makes of it
            raise batches.error or error from error
    return lake.committed(write)


class _Conformed:
    """Batches in the contract's columns and types. Keeps the error that ends them, which the writer turns into text."""

    def __init__(self, reader: pa.RecordBatchReader, table: Table, days: Collection[datetime.date]) -> None:
        self.reader, self.table, self.days = reader, table, set(days)
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self.reader:
                foreign = set(pc.unique(batch.column(PARTITION)).to_pylist()) - self.days
                if foreign:
                    raise ContractViolation(
                        f"Rows of {min(foreign)} are not among the days to replace in table {self.table.name}."
                    )
                yield batch.select(self.table.columns).cast(self.table.schema)
        except Exception as error:
            self.error = error
            raise


def _guard(lake: Lake, name: str) -> None:
    if not lake.exists(name):
        raise MissingUpstream(f"Table {name} is not in {lake.root} yet; run stage {TABLES[name].written_by} first.")
    assert_ray_readable(lake, name)
