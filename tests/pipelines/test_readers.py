"""What Spark writes, Spark, Ray Data and Polars read: every table of the contract, with nulls, empty arrays, extreme
numbers and odd texts, row by row and type by type."""

from __future__ import annotations

import datetime
import random
from collections import Counter
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import tables
from jobs.arrow_files import ArrowRows
from pipelines.ray_tables import read_arrow, read_dataset
from schemas.lake import Lake
from schemas.tables import PARTITION, TABLES, Table

DAYS = (datetime.date(2026, 1, 2), datetime.date(2026, 1, 3))
CANDIDATES, ROWS = 400, 30
IN_TASKS = ("user_sequences", "user_features", "training_examples", "rewards", "impressions")  # the last for its types
TEXTS = ("", " ", "text", "日本 🎬", "e\u0301", 'a"b', "a,b\n\tc", "\x00", "\ufeff", "null", "NaN", "x" * 5_000)
DATES = (datetime.date.min, datetime.date(1969, 12, 31), datetime.date(2026, 2, 28), datetime.date.max)
FIRST, LAST = datetime.datetime(1970, 1, 2, tzinfo=datetime.UTC), datetime.datetime.max.replace(2100, tzinfo=datetime.UTC)
REALS = (0.0, -0.0, 1.0, 0.5, -1.5, 1e-3, 3e38, -3e38, float("nan"), float("inf"), -float("inf"))


def value_of(dtype: pa.DataType, rng: random.Random, length: int) -> Any:
    if pa.types.is_list(dtype):
        return [value_of(dtype.value_type, rng, length) for _ in range(max(0, length + rng.choice((0, 0, 0, 0, 1))))]
    if pa.types.is_struct(dtype):
        return {part.name: value_of(part.type, rng, length) for part in dtype}
    if pa.types.is_integer(dtype):
        limit = 2 ** (dtype.bit_width - 1)
        return rng.choice((0, 1, 7, limit - 1, rng.randrange(limit), rng.randrange(limit), -1, -limit))
    if pa.types.is_floating(dtype):
        return rng.choice(REALS)
    if pa.types.is_timestamp(dtype):
        return rng.choice((FIRST, LAST, FIRST + datetime.timedelta(microseconds=rng.randrange(2**51))))
    if pa.types.is_boolean(dtype):
        return rng.random() < 0.5
    return rng.choice(DATES if pa.types.is_date(dtype) else TEXTS)


def row_of(table: Table, rng: random.Random) -> dict[str, Any]:
    """A null wherever one may be; arrays about as long as each other."""
    length = rng.choice((0, 1, 3))
    row = {f.name: None if f.nullable and rng.random() < 0.3 else value_of(f.type, rng, length) for f in table.schema}
    return row | {PARTITION: rng.choice(DAYS)}


def rows_of(spark: SparkSession, table: Table) -> pa.Table:
    """Rows that fulfil the table's constraints, chosen among more by the constraints themselves."""
    rng = random.Random(table.name)
    drawn = pa.Table.from_pylist([row_of(table, rng) for _ in range(CANDIDATES)], schema=table.schema)
    numbered = spark.createDataFrame(drawn.append_column("place", pa.array(range(CANDIDATES))))
    fulfilled = set(range(CANDIDATES))
    for name, check in table.checks.items():
        by_sql = {row["place"] for row in numbered.where(F.expr(check.sql)).select("place").collect()}
        by_arrow = set(pc.indices_nonzero(check.holds(drawn)).to_pylist())
        assert by_arrow == by_sql, f"{name} of {table.name} means other rows in SQL than on Arrow batches"
        assert check.broken(drawn) == CANDIDATES - len(by_sql)
        fulfilled &= by_sql
    assert len(fulfilled) >= ROWS, f"{table.name}: too few of the rows drawn fulfil its constraints"
    return drawn.take(pa.array(sorted(fulfilled)[:ROWS]))


def plain(value: Any) -> Any:
    """One form of a value for all readers; NaN equals NaN, and -0.0 differs from 0.0."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC)
    if isinstance(value, dict):
        return plain(list(value.values()))
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def row_set(rows: list[dict[str, Any]], table: Table) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(plain(row[name]) for name in table.columns) for row in rows)


def types_of(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(plain_type(field.type)) for field in schema}


def plain_type(dtype: pa.DataType) -> pa.DataType:
    """Whatever the elements of its lists are called, and whether parts of a struct may be null."""
    if pa.types.is_list(dtype):
        return pa.list_(plain_type(dtype.value_type))
    return pa.struct([(part.name, plain_type(part.type)) for part in dtype]) if pa.types.is_struct(dtype) else dtype


def spark_types(frame: DataFrame) -> dict[str, str]:
    return {field.name: field.dataType.simpleString() for field in frame.schema}


@pytest.mark.parametrize(
    ("name", "writer"), [*((name, "Spark") for name in TABLES), *((name, "tasks") for name in IN_TASKS)]
)
def test_all_readers_see_the_rows_and_types_of_the_contract(
    spark: SparkSession, ray_module: Any, lake: Lake, name: str, writer: str
) -> None:
    table = TABLES[name]
    written = rows_of(spark, table)
    want = row_set(written.to_pylist(), table)
    stamped = dict.fromkeys((*DAYS, max(DAYS) + datetime.timedelta(days=1)), "identity")  # the last day stays empty
    frame = spark.createDataFrame(written)
    parts = frame.repartition(3).sortWithinPartitions(PARTITION)
    rows = frame if writer == "Spark" else [ArrowRows(name, parts, lambda batches: iter(batches))]
    version = tables.replace_days(lake, name, rows, stamped)
    assert lake.identities(name) == stamped
    assert lake.row_count(name, version) == len(written)

    by_spark = tables.read(spark, lake, name, version)
    assert spark_types(by_spark) == {f.name: f.dataType.simpleString() for f in tables.spark_schema(table)}
    assert row_set(by_spark.toArrow().to_pylist(), table) == want, "Spark"

    batches = list(read_dataset(lake, name, version).iter_batches(batch_format="pyarrow", batch_size=None))
    by_ray = pa.concat_tables(batches)
    for arrow in (by_ray, read_arrow(lake, name, version)):
        assert types_of(arrow.schema) == types_of(table.schema)
        assert row_set(arrow.to_pylist(), table) == want, "Ray"

    by_polars = pl.read_delta(lake.path(name), version=version)
    assert dict(by_polars.schema) == dict(pl.from_arrow(table.schema.empty_table()).schema)
    assert row_set(by_polars.to_dicts(), table) == want, "Polars"
