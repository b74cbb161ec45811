"""Delta through Spark: the only place in `jobs` that reads or writes a table.

A write replaces exactly the partitions whose identities it carries, in one commit, so that a rerun changes no row and a
kill leaves the last committed version in place. What tasks have written as files (`jobs.arrow_files`) is committed by
delta-rs, which takes any number of files into one commit; the rest is written by Spark.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Mapping, Sequence

from delta.tables import DeltaTable
from deltalake.transaction import AddAction
from pyspark.errors import AnalysisException, PythonException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from jobs.arrow_files import SMALL_DAYS_TASKS, ArrowRows
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake, Write, assert_ray_readable
from schemas.tables import PARTITION, TABLES, Table


def spark_schema(table: Table) -> StructType:
    """The contract's Arrow schema as a Spark schema."""
    return from_arrow_schema(table.schema)


def read(spark: SparkSession, lake: Lake, name: str, version: int | None = None) -> DataFrame:
    """The rows of a table at `version` (default: the newest). Raises MissingUpstream where there is no table."""
    if not lake.exists(name):
        raise MissingUpstream(f"Table {name} is not in {lake.root} yet; run stage {TABLES[name].written_by} first.")
    assert_ray_readable(lake, name)
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    return reader.load(lake.path(name))


def read_days(
    spark: SparkSession, lake: Lake, name: str, days: Collection[datetime.date], version: int | None = None
) -> DataFrame:
    """The partitions of `days`; a contiguous range or a set, pruned before any file is opened."""
    return read(spark, lake, name, version).where(F.col(PARTITION).isin(sorted(days)))


def replace_days(
    lake: Lake,
    name: str,
    rows: DataFrame | Sequence[ArrowRows],
    identities: Mapping[datetime.date, str],
    files_a_day: int = 1,
    order: Collection[str] = (),
) -> int:
    """Replaces the partitions of `identities` by `rows` in one commit and returns the new version.

    `order` names columns by which each partition is range-partitioned into `files_a_day` files and sorted; ArrowRows are
    written by the tasks that make them, as they come. A day in `identities` without rows becomes empty. Raises
    ContractViolation for a row of another day or schema, and where another run wrote the table meanwhile.
    """
    with lake.writing(name, identities) as write:
        if isinstance(rows, DataFrame):
            _write_by_spark(lake, write, rows, identities, files_a_day, order)
        else:
            files = [file for part in rows for file in _write_in_tasks(lake, part, identities)]
            _commit_files(lake, write, files, identities)
    return lake.committed(write)


def _write_by_spark(
    lake: Lake,
    write: Write,
    rows: DataFrame,
    identities: Collection[datetime.date],
    files_a_day: int,
    order: Collection[str],
) -> None:
    conformed = conform(rows, TABLES[write.table])
    keys = [PARTITION, *order]
    tasks = files_a_day * len(identities) if files_a_day > 1 else min(len(identities), SMALL_DAYS_TASKS)
    shuffled = conformed.repartitionByRange(tasks, *keys) if order else conformed.repartition(tasks, PARTITION)
    days = ", ".join(f"DATE'{day.isoformat()}'" for day in sorted(identities))
    writer = (
        shuffled.sortWithinPartitions(*keys)
        .write.format("delta")
        .mode("overwrite")
        .option("replaceWhere", f"{PARTITION} IN ({days})")
        .options(**write.options())
    )
    try:
        writer.save(lake.path(write.table))
    except AnalysisException as error:
        if "DELTA_VIOLATE_CONSTRAINT" not in str(error) and "DELTA_REPLACE_WHERE_MISMATCH" not in str(error):
            raise
        reason = " ".join(line.strip() for line in str(error).splitlines()[:4] if line.strip())
        raise ContractViolation(f"Table {write.table} refused a row, and nothing was written: {reason}") from error


def _write_in_tasks(lake: Lake, rows: ArrowRows, days: Collection[datetime.date]) -> list[AddAction]:
    try:
        return rows.write(lake.path(rows.table), days)
    except PythonException as error:
        refused = re.search(r"ContractViolation: (.*)", str(error))
        if refused is None:
            raise
        raise ContractViolation(refused[1]) from error


def _commit_files(lake: Lake, write: Write, files: list[AddAction], identities: Collection[datetime.date]) -> None:
    """One commit that puts `files` in the place of those of the days."""
    table = lake.open(write.table)
    table.create_write_transaction(
        [*files],
        mode="overwrite",
        schema=table.schema(),
        partition_by=[PARTITION],
        partition_filters=[(PARTITION, "in", [day.isoformat() for day in sorted(identities)])],
        commit_properties=lake.properties(write),
    )


def append(lake: Lake, name: str, rows: DataFrame) -> None:
    """Adds rows in a commit that carries no identity, creating the table where it is missing."""
    with lake.writing(name) as write:
        frame = conform(rows, TABLES[name]).coalesce(1)
        frame.write.format("delta").mode("append").options(**write.options()).save(lake.path(name))


def delete_rows(spark: SparkSession, lake: Lake, name: str, condition: Column) -> None:
    """Deletes rows by rewriting the files that hold them (no deletion vectors); no partition changes its identity."""
    DeltaTable.forPath(spark, lake.path(name)).delete(condition)
    assert_ray_readable(lake, name)


def update_rows(spark: SparkSession, lake: Lake, name: str, chosen: DataFrame, values: Mapping[str, str | Column]) -> None:
    """Sets columns of the rows whose key is in `chosen` (the columns of the key and the partition, each row once)."""
    same = " AND ".join(f"old.{column} = new.{column}" for column in (*TABLES[name].key, PARTITION))
    table = DeltaTable.forPath(spark, lake.path(name)).alias("old")
    table.merge(chosen.alias("new"), same).whenMatchedUpdate(set=dict(values)).execute()
    assert_ray_readable(lake, name)


def conform(rows: DataFrame, table: Table) -> DataFrame:
    """`rows` with the contract's columns, order and types. Raises ContractViolation for a missing or foreign column."""
    missing = set(table.columns) - set(rows.columns)
    foreign = set(rows.columns) - set(table.columns)
    if missing or foreign:
        raise ContractViolation(
            f"Rows for table {table.name} do not fit its contract: "
            f"missing {sorted(missing) or 'nothing'}, foreign {sorted(foreign) or 'nothing'}."
        )
    fields = spark_schema(table)
    return rows.select([F.col(f.name).cast(f.dataType).alias(f.name) for f in fields])
