"""Raw files as numbered lines.

A line keeps its text exactly and knows its place: file, block (the byte at which Spark's split of the file begins) and a
number that ascends within the split. The place orders lines without a further pass; the row number that a person looks
up needs the lengths of the blocks before it, which the caller learns from the aggregate that it computes anyway.
The price of reading lines is that a quoted field must not span lines; KuaiRand's fields never do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.source_files import SourceFile
from schemas.errors import ContractViolation

PLACE = ("source_file", "block", "line")  # ascending: the order of the rows in the files
_BROKEN = "broken"
_CSV = {"mode": "PERMISSIVE", "columnNameOfCorruptRecord": _BROKEN}


def read_lines(spark: SparkSession, files: Iterable[SourceFile]) -> DataFrame:
    """Lines of text files, gzip or plain: source_file, block, line (bigint, ascending within the block), raw."""
    # Spark would take brackets and stars in a path as a pattern.
    paths = [re.sub(r"([\[\]{}*?\\])", r"\\\1", file.path) for file in files]
    encoded = F.replace(F.col("_metadata.file_name"), F.lit("+"), F.lit("%2B"))
    return spark.read.text(paths).select(
        F.url_decode(encoded).alias("source_file"),
        F.col("_metadata.file_block_start").alias("block"),
        F.monotonically_increasing_id().alias("line"),
        F.col("value").alias("raw"),
    )


def split_csv(lines: DataFrame, header: str, names: Iterable[str]) -> DataFrame:
    """Adds the text of the columns `names` (null where empty) and `shape`: why the line is no row, or null."""
    columns = column_names(header)
    schema = ", ".join([*(f"c{i} STRING" for i in range(len(columns))), f"{_BROKEN} STRING"])
    parsed = lines.withColumn("fields", F.from_csv("raw", schema, _CSV))
    shape: Column = (
        F.when(F.trim("raw") == "", "empty line")
        .when(F.col("raw") == header, "repeated header")
        .when(F.col(f"fields.{_BROKEN}").isNotNull(), "wrong number of columns")
    )
    texts = [F.col(f"fields.c{columns.index(name)}").alias(name) for name in names]
    return parsed.select(*PLACE, "raw", shape.alias("shape"), *texts)


def column_names(header: str) -> list[str]:
    return [name.strip().strip('"') for name in header.split(",")]


def require_columns(file: str, header: str, names: Iterable[str]) -> None:
    """Raises ContractViolation naming the file and the columns that its header lacks."""
    missing = [name for name in names if name not in column_names(header)]
    if missing:
        raise ContractViolation(
            f"{file}: the header lacks column {', '.join(missing)}; add it (empty fields mean unknown) or correct its name."
        )


def integer(name: str) -> Column:
    """The text column `name` as bigint; null where it is empty, no integer or outside 64 bits."""
    return F.col(name).try_cast("bigint")


def integer_fault(name: str, low: int, high: int, optional: bool = False) -> Column:
    """Why the text column `name` is no integer in [low, high], or null where it is one."""
    number = integer(name)
    digits = F.col(name).rlike(r"^\s*[+-]?[0-9]+\s*$")
    fault = (
        F.when(F.col(name).isNull(), F.lit(None if optional else f"{name} is missing"))
        .when(number.isNull() & ~digits, f"{name} is not an integer")
        .when(number.isNull() | (number > high), f"{name} is out of range")
    )
    if low == 0:
        return fault.when(number < low, f"{name} is negative")
    return fault.when(number < low, f"{name} is out of range")


@contextmanager
def reading(files: Iterable[SourceFile]) -> Iterator[None]:
    """Turns Spark's failure to read a file into one sentence that names it."""
    try:
        yield
    except (Py4JJavaError, PySparkException) as error:
        text = str(error)
        if "FAILED_READ_FILE" not in text:
            raise
        named = [file.name for file in files if file.path.rsplit("/", 1)[-1] in text] or [file.name for file in files]
        raise ContractViolation(
            f"{', '.join(named)}: cannot be read to its end; the file is truncated or no valid gzip. Copy it again."
        ) from error
