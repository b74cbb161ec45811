"""The Ray side of table access: pinned versions, guarded protocol, few columns."""

from __future__ import annotations

import datetime
import functools
import operator
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa
import pyarrow.dataset as pads
import ray.data
from deltalake import CommitProperties, write_deltalake

from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake, assert_ray_readable, commit_metadata
from schemas.tables import PARTITION, TABLES


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


def replace_days(lake: Lake, name: str, rows: pa.Table, identities: Mapping[datetime.date, str]) -> int:
    """Replaces the partitions of `identities` in one commit, creating the table from its contract; the new version.

    For tables that grow with the catalogue. Raises ContractViolation for rows of another day.
    """
    table = TABLES[name]
    foreign = set(rows.column(PARTITION).to_pylist()) - set(identities)
    if foreign:
        raise ContractViolation(f"Rows of {sorted(foreign)[0]} are not among the days to replace in table {name}.")
    days = ", ".join(f"'{day.isoformat()}'" for day in sorted(identities))
    exists = lake.exists(name)
    write_deltalake(
        lake.path(name),
        rows.select(table.columns).cast(table.schema),
        mode="overwrite",
        predicate=f"{PARTITION} IN ({days})" if exists else None,
        partition_by=None if exists else [PARTITION],
        configuration=None if exists else {"delta.logRetentionDuration": "interval 3650 days"},
        description=None if exists else table.meaning,
        commit_properties=CommitProperties(custom_metadata={"userMetadata": commit_metadata(table.written_by, identities)}),
    )
    if not exists and table.checks:
        lake.open(name).alter.add_constraint(dict(table.checks))
    assert_ray_readable(lake, name)
    version = lake.version(name)
    assert version is not None  # just written
    return version


def _guard(lake: Lake, name: str) -> None:
    if not lake.exists(name):
        raise MissingUpstream(f"Table {name} is not in {lake.root} yet; run stage {TABLES[name].written_by} first.")
    assert_ray_readable(lake, name)
