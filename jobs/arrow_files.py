"""Rows that a function makes in Python, a partition of Spark at a time, and the files that its tasks write of them.

The large tables repeat each event in many rows, and what costs is to encode them. Written by Spark the rows pass to the
JVM and there, a value at a time, into Parquet: three times as long, all told, as a task that hands its Arrow batches to
Arrow's own writer (docs/design.md has the figures). So a task writes the files and gives back what Delta's log says of
each, and `jobs.tables.replace_days` commits them at once. A task that is tried again writes other files; those of the
broken try are in no log, and `lazyrec maintain` removes them.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake.fs import DeltaStorageHandler
from deltalake.transaction import AddAction
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import from_arrow_schema

from schemas.errors import ContractViolation
from schemas.tables import PARTITION, TABLES, Table

Batches = Iterable[pa.RecordBatch]
Make = Callable[[Batches], Iterator[pa.RecordBatch]]
ACTION = pa.schema([("action", pa.string())])
CODEC, LEVEL = "zstd", 1  # files are as large as Spark's of level 3, to a few percent
SMALL_DAYS_TASKS = 64  # of a write with one file a day: a task costs more than a small day


@dataclass(frozen=True)
class ArrowRows:
    """Rows of a table: `make` turns the batches of each partition of `parts` into the table's own, in order of the day."""

    table: str
    parts: DataFrame
    make: Make

    def frame(self) -> DataFrame:
        """The rows in Spark."""
        making = functools.partial(made, self.make, table=self.table)
        return self.parts.mapInArrow(making, from_arrow_schema(TABLES[self.table].schema))

    def write(self, root: str, days: Collection[datetime.date]) -> list[AddAction]:
        """Writes the rows below the table's root; what a commit must add. Raises ContractViolation, from a task, for a
        row that breaks a constraint or lies on none of `days`."""
        writing = functools.partial(written, self.make, table=self.table, root=root, days=frozenset(days))
        found = self.parts.mapInArrow(writing, from_arrow_schema(ACTION)).collect()
        return [AddAction(**json.loads(row["action"])) for row in found]


def made(make: Make, batches: Batches, table: str) -> Iterator[pa.RecordBatch]:
    for rows in make(batches):
        yield checked(rows, TABLES[table])


def written(
    make: Make, batches: Batches, table: str, root: str, days: Collection[datetime.date]
) -> Iterator[pa.RecordBatch]:
    """The work of a task: a file a day, and its action as JSON."""
    contract, store = TABLES[table], filesystem(root)
    file: DayFile | None = None
    for rows in made(make, batches, table):
        for batch in by_day(rows):
            day = batch.column(PARTITION)[0].as_py()
            if day not in days:
                raise ContractViolation(f"Table {table} refused a row of {day}, which is none of the days to write.")
            if file is not None and file.day != day:
                yield file.close()
                file = None
            file = file or DayFile(contract, store, day)
            file.add(batch)
    if file is not None:
        yield file.close()


def filesystem(root: str) -> pafs.FileSystem:
    """A table's root, on a disk or in an object store, with the credentials that the lake's logs are read with."""
    if "://" in root:
        return pafs.PyFileSystem(DeltaStorageHandler(root))
    return pafs.SubTreeFileSystem(root, pafs.LocalFileSystem())


def checked(rows: pa.RecordBatch, contract: Table) -> pa.RecordBatch:
    """The rows in the contract's columns and types. Raises ContractViolation where they do not fit or break a check."""
    if other := set(rows.schema.names) ^ set(contract.columns):
        raise ContractViolation(f"Rows for table {contract.name} do not fit its contract: {sorted(other)}.")
    batch = rows.select(list(contract.columns)).cast(contract.schema)
    for field in contract.schema:
        if not field.nullable and batch.column(field.name).null_count:
            raise ContractViolation(f"Table {contract.name} refused a row, and nothing was written: {field.name} is null.")
    for name, check in contract.checks.items():
        if broken := check.broken(batch):
            raise ContractViolation(
                f"Table {contract.name} refused {broken} row(s), and nothing was written: they break {name} ({check.sql})."
            )
    return batch


def by_day(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Parts of one day each, in order."""
    days = batch.column(PARTITION)
    changes = pc.indices_nonzero(pc.not_equal(days[1:], days[:-1])).to_pylist() if len(batch) > 1 else []
    bounds = [0, *(place + 1 for place in changes), len(batch)]
    for first, stop in pairwise(bounds):
        if stop > first:
            yield batch.slice(first, stop - first)


class DayFile:
    """A Parquet file of one day, while it grows."""

    def __init__(self, contract: Table, store: pafs.FileSystem, day: datetime.date) -> None:
        folder = f"{PARTITION}={day.isoformat()}"
        store.create_dir(folder)
        self.day, self.path = day, f"{folder}/part-{uuid.uuid4()}.{CODEC}.parquet"
        self.schema = contract.schema.remove(contract.schema.get_field_index(PARTITION))  # the log tells the day
        self.stream = store.open_output_stream(self.path)
        self.metadata: list[pq.FileMetaData] = []
        settings: dict[str, Any] = {"compression": CODEC, "compression_level": LEVEL, "metadata_collector": self.metadata}
        settings["use_dictionary"] = repeating(self.schema)
        self.writer = pq.ParquetWriter(self.stream, self.schema, store_schema=False, **settings)

    def add(self, batch: pa.RecordBatch) -> None:
        """One row group."""
        self.writer.write_batch(batch.select(self.schema.names), row_group_size=len(batch))

    def close(self) -> pa.RecordBatch:
        """The file's action."""
        self.writer.close()
        size = self.stream.tell()
        self.stream.close()
        action = {
            "path": self.path,
            "size": size,
            "partition_values": {PARTITION: self.day.isoformat()},
            "modification_time": int(time.time() * 1000),
            "data_change": True,
            "stats": json.dumps(statistics(self.metadata[0], self.schema)),
        }
        return pa.record_batch([pa.array([json.dumps(action)])], schema=ACTION)


def repeating(schema: pa.Schema) -> list[str]:
    """Parquet's paths of the columns that a dictionary serves: not of moments, which hardly repeat."""
    names = [field.name for field in schema if not field.name.endswith("ts_us")]
    return [f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name for name in names]


def statistics(metadata: pq.FileMetaData, schema: pa.Schema) -> dict[str, Any]:
    """Delta's statistics of a file: rows, and of each column of integers the least, the largest and the nulls."""
    least: dict[str, Any] = {}
    largest: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    for number in range(metadata.num_columns):
        chunks = [metadata.row_group(group).column(number) for group in range(metadata.num_row_groups)]
        name, found = chunks[0].path_in_schema, [chunk.statistics for chunk in chunks]
        if name not in schema.names or not pa.types.is_integer(schema.field(name).type):
            continue  # of an element of a list, or of no use to a reader that leaves files out
        nulls[name] = sum(of_group.null_count for of_group in found)
        known = [of_group for of_group in found if of_group.has_min_max]
        if known:
            least[name], largest[name] = min(k.min for k in known), max(k.max for k in known)
    return {"numRecords": metadata.num_rows, "minValues": least, "maxValues": largest, "nullCount": nulls}
