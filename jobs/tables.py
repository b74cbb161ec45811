"""Delta through Spark: the only place in `jobs` that reads or writes a table.

A write replaces exactly the partitions whose identities it carries, in one commit, so that a rerun changes no row and a
kill leaves the last committed version in place. Tables are created from their contract with CHECK constraints, without
deletion vectors or column mapping, so that Ray reads what Spark wrote.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping

from delta.tables import DeltaTable
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake, assert_ray_readable, commit_metadata
from schemas.tables import PARTITION, TABLES, Table

SMALL_DAYS_TASKS = 64  # of a write with one file a day
PROPERTIES = {
    "delta.enableDeletionVectors": "false",
    "delta.logRetentionDuration": "interval 3650 days",  # identities live in the log
    "delta.deletedFileRetentionDuration": "interval 90 days",  # longer than the life of a model that pins a version
}


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
    spark: SparkSession,
    lake: Lake,
    name: str,
    rows: DataFrame,
    identities: Mapping[datetime.date, str],
    files_a_day: int = 1,
    order: Collection[str] = (),
) -> int:
    """Replaces the partitions of `identities` by `rows` in one commit and returns the new version.

    `order` names columns by which each partition is range-partitioned into `files_a_day` files and sorted. A day in
    `identities` without rows becomes empty. Raises ContractViolation for a row of another day, or of another schema.
    """
    table = TABLES[name]
    create(spark, lake, name)
    conformed = conform(rows, table)
    keys = [PARTITION, *order]
    # A task costs more than a small day: of thousands of them a task writes several, a file each.
    tasks = files_a_day * len(identities) if files_a_day > 1 else min(len(identities), SMALL_DAYS_TASKS)
    shuffled = conformed.repartitionByRange(tasks, *keys) if order else conformed.repartition(tasks, PARTITION)
    days = ", ".join(f"DATE'{day.isoformat()}'" for day in sorted(identities))
    writer = (
        shuffled.sortWithinPartitions(*keys)
        .write.format("delta")
        .mode("overwrite")
        .option("replaceWhere", f"{PARTITION} IN ({days})")
        .option("userMetadata", commit_metadata(table.written_by, identities))
    )
    try:
        writer.save(lake.path(name))
    except AnalysisException as error:
        if "DELTA_VIOLATE_CONSTRAINT" not in str(error) and "DELTA_REPLACE_WHERE_MISMATCH" not in str(error):
            raise
        reason = " ".join(line.strip() for line in str(error).splitlines()[:4] if line.strip())
        raise ContractViolation(f"Table {name} refused a row, and nothing was written: {reason}") from error
    assert_ray_readable(lake, name)
    version = lake.version(name)
    assert version is not None  # just written
    return version


def append(spark: SparkSession, lake: Lake, name: str, rows: DataFrame) -> None:
    """Adds rows in a commit that carries no identity, creating the table where it is missing."""
    create(spark, lake, name)
    conform(rows, TABLES[name]).coalesce(1).write.format("delta").mode("append").save(lake.path(name))


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


def create(spark: SparkSession, lake: Lake, name: str) -> None:
    """Creates the table from its contract where it is missing: comments, properties, CHECK constraints. One that an earlier
    release wrote gets the columns that the contract has gained since."""
    if lake.exists(name):
        return add_new_columns(spark, lake, name)
    lake.clear_unborn(name)
    table = TABLES[name]
    builder = DeltaTable.createIfNotExists(spark).location(lake.path(name)).comment(table.meaning)
    for arrow, spark_field in zip(table.schema, spark_schema(table), strict=True):
        comment = (arrow.metadata or {}).get(b"comment", b"").decode()
        builder = builder.addColumn(spark_field.name, spark_field.dataType, nullable=spark_field.nullable, comment=comment)
    for key, value in PROPERTIES.items():
        builder = builder.property(key, value)
    # Constraints given at creation cost no scan and no further commit each.
    for check, predicate in table.checks.items():
        builder = builder.property(f"delta.constraints.{check}", predicate)
    builder.partitionedBy(PARTITION).execute()


def add_new_columns(spark: SparkSession, lake: Lake, name: str) -> None:
    """Adds what the contract has and the table lacks; older rows are null there."""
    known = {field.name for field in lake.open(name).schema().fields}
    for field in spark_schema(TABLES[name]):
        if field.name not in known:
            added = f"ADD COLUMNS ({field.name} {field.dataType.simpleString()})"
            spark.sql(f"ALTER TABLE delta.`{lake.path(name)}` {added}")


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
