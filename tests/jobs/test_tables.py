"""A contract as a Delta table: its constraints hold, and what a reader would misread is refused."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from jobs import tables
from jobs.arrow_files import ArrowRows
from pipelines import ray_tables
from pipelines.ray_tables import read_arrow, read_dataset
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake, assert_ray_readable
from schemas.tables import TABLES, Table

DAY = datetime.date(2026, 1, 2)
OTHER = datetime.date(2026, 1, 3)


def value_of(dtype: pa.DataType, place: int) -> Any:
    """A value of the type that differs from row to row."""
    if pa.types.is_list(dtype):
        return [value_of(dtype.value_type, place + k) for k in range(2)]
    if pa.types.is_date(dtype):
        return DAY
    if pa.types.is_timestamp(dtype):
        return datetime.datetime(2026, 1, 2, 3, 4, 5, 678901 + place, datetime.UTC)
    if pa.types.is_boolean(dtype):
        return place % 2 == 0
    if pa.types.is_string(dtype):
        return f"text {place}"
    if pa.types.is_floating(dtype):
        return 0.25 * (place % 4)
    return place + 1


def rows_of(table: Table, count: int = 3) -> list[dict[str, Any]]:
    rows = [{f.name: value_of(f.type, place) for f in table.schema} for place in range(count)]
    for row in rows:
        if table.name == "training_examples":
            row["target_start"] = [0, 1, 2]
        if table.name == "item_pairs":
            row["weight"] += 1
    return rows


def test_a_row_against_a_constraint_is_refused_and_nothing_is_written(spark: SparkSession, lake: Lake) -> None:
    schema = "user_id long, date date, source_id string, attributes array<string>"
    good = spark.createDataFrame([(1, DAY, None, ["a=b"])], schema)
    version = tables.replace_days(lake, "users", good, {DAY: "first"})
    bad = spark.createDataFrame([(-1, DAY, None, ["a=b"])], schema)
    with pytest.raises(ContractViolation, match="user_not_negative"):
        tables.replace_days(lake, "users", bad, {DAY: "second"})
    with pytest.raises(ContractViolation, match="Table users refused a row"):
        tables.replace_days(lake, "users", good, {OTHER: "of another day"})
    with pytest.raises(ContractViolation, match="missing \\['attributes'\\]"):
        tables.replace_days(lake, "users", good.drop("attributes"), {DAY: "third"})
    assert lake.version("users") == version
    assert read_arrow(lake, "users", version).column("user_id").to_pylist() == [1]


def test_parts_of_a_table_hold_whole_days_in_order(lake: Lake) -> None:
    days = [DAY + datetime.timedelta(days=n) for n in range(5)]
    for day, users in zip(reversed(days), ([8], [5, 6, 7], [4], [2, 3], [1]), strict=True):  # written newest first
        rows = users_of(*users)
        rows = rows.set_column(rows.schema.get_field_index("date"), "date", pa.array([day] * len(users), pa.date32()))
        version = ray_tables.replace_days(lake, "users", rows, {day: "first"})
    parts = ray_tables.arrow_parts(lake, "users", version, ["user_id"], days[1:], rows=3)
    assert [part.column("user_id").to_pylist() for part in parts] == [[2, 3, 4], [5, 6, 7], [8]]


def users_of(*users: int) -> pa.Table:
    rows = [{"user_id": user, "date": DAY, "source_id": None, "attributes": ["a=b"]} for user in users]
    return pa.Table.from_pylist(rows, schema=TABLES["users"].schema)


def overtaken(batches: Iterable[pa.RecordBatch], lake: Lake) -> Iterator[pa.RecordBatch]:
    """The batches, while another run writes the same day."""
    for batch in batches:
        with ThreadPoolExecutor() as other:  # delta-rs lets no thread of a writer begin a second write
            other.submit(ray_tables.replace_days, lake, "users", users_of(7), {DAY: "of another run"}).result()
        yield batch


def by_spark(spark: SparkSession, lake: Lake) -> int:
    rows = spark.createDataFrame(users_of(1)).coalesce(1)
    return tables.replace_days(lake, "users", rows.mapInArrow(lambda b: overtaken(b, lake), rows.schema), {DAY: "mine"})


def by_tasks(spark: SparkSession, lake: Lake) -> int:
    rows = ArrowRows("users", spark.createDataFrame(users_of(1)).coalesce(1), lambda batches: overtaken(batches, lake))
    return tables.replace_days(lake, "users", [rows], {DAY: "mine"})


def by_delta_rs(spark: SparkSession, lake: Lake) -> int:
    rows = pa.RecordBatchReader.from_batches(TABLES["users"].schema, overtaken(users_of(1).to_batches(), lake))
    return ray_tables.replace_days(lake, "users", rows, {DAY: "mine"})


@pytest.mark.parametrize("way", [by_spark, by_tasks, by_delta_rs])
def test_a_write_that_another_run_overtook_changes_nothing(
    spark: SparkSession, lake: Lake, way: Callable[[SparkSession, Lake], int]
) -> None:
    ray_tables.replace_days(lake, "users", users_of(0), {DAY: "first"})
    with pytest.raises(ContractViolation, match="Another run wrote table users"):
        way(spark, lake)
    assert lake.identities("users") == {DAY: "of another run"}
    assert read_arrow(lake, "users", lake.open("users").version()).column("user_id").to_pylist() == [7]


@pytest.mark.parametrize("stamp", [None, "stamp"])
def test_a_commit_that_is_tried_again_is_taken_once(spark: SparkSession, lake: Lake, stamp: str | None) -> None:
    write = lake.begin("users", {DAY: stamp} if stamp else None)
    for _ in range(2):
        frame = spark.createDataFrame(users_of(1))
        frame.write.format("delta").mode("append").options(**write.options()).save(lake.path("users"))
    assert read_arrow(lake, "users", lake.open("users").version()).num_rows == 1
    with pytest.raises(ContractViolation, match="Another run wrote table users"):
        lake.properties(write)


def test_what_ray_would_misread_is_refused(spark: SparkSession, lake: Lake) -> None:
    spark.sql(
        f"CREATE TABLE delta.`{lake.path('users')}` (user_id BIGINT) USING delta "
        "TBLPROPERTIES ('delta.columnMapping.mode' = 'name', "
        "'delta.minReaderVersion' = '2', 'delta.minWriterVersion' = '5')"
    )
    with pytest.raises(ContractViolation, match="column mapping"):
        assert_ray_readable(lake, "users")
    spark.sql(
        f"CREATE TABLE delta.`{lake.path('items')}` (item_id BIGINT) USING delta "
        "TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')"
    )
    with pytest.raises(ContractViolation, match="deletionVectors"):
        read_dataset(lake, "items", 0)


def test_a_table_that_is_not_there_names_the_stage_that_makes_it(spark: SparkSession, lake: Lake) -> None:
    with pytest.raises(MissingUpstream, match="run stage ingest first"):
        tables.read(spark, lake, "impressions")
    with pytest.raises(MissingUpstream, match="run stage organise first"):
        read_dataset(lake, "training_examples", 0)
