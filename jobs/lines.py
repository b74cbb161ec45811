"""Raw files as numbered lines.

A line keeps its text exactly and knows its place: file, block (the byte at which Spark's split of the file begins) and a
number that ascends within the split. The place orders lines without a further pass; the row number that a person looks
up needs the lengths of the blocks before it, which the caller learns from the aggregate that it computes anyway.
The price of reading lines is that a quoted field must not span lines; KuaiRand's fields never do. A line that is no
UTF-8 is refused whole: with its bytes replaced, two ids could become one. Its text is kept with U+FFFD in their place.
So is a line with a NUL byte, which a crash leaves in files and which the parser drops between quotes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.source_files import SourceFile, column_names
from schemas.errors import ContractViolation

PLACE = ("source_file", "block", "line")  # ascending: the order of the rows in the files
_BROKEN = "broken"
_MOST_COLUMNS = 20_000  # the parser breaks off the job at 20,480
# A quote within quotes is doubled (RFC 4180).
_CSV = {"mode": "PERMISSIVE", "columnNameOfCorruptRecord": _BROKEN, "escape": '"'}


def read_lines(spark: SparkSession, files: Iterable[SourceFile]) -> DataFrame:
    """Lines of text files, gzip or plain: source_file, block, line (bigint, ascending within the block), raw, garbled
    (whether it was no UTF-8)."""
    files = list(files)
    return spark.read.text(escaped_paths(files)).select(
        source_file(files),
        F.col("_metadata.file_block_start").alias("block"),
        F.monotonically_increasing_id().alias("line"),
        F.make_valid_utf8("value").alias("raw"),
        (~F.is_valid_utf8("value")).alias("garbled"),
    )


def escaped_paths(files: Iterable[SourceFile]) -> list[str]:
    """Spark would take brackets and stars in a path as a pattern."""
    return [re.sub(r"([\[\]{}*?\\])", r"\\\1", file.path) for file in files]


def source_file(files: Sequence[SourceFile]) -> Column:
    """The name of the file, as `SourceFile.name`, that a row was read from."""
    folder = files[0].path[: -len(files[0].name)].lstrip("/")
    uri = F.url_decode(F.replace(F.col("_metadata.file_path"), F.lit("+"), F.lit("%2B")))
    below_root = F.regexp_replace(uri, "^file:/+", "")
    return F.substring(below_root, len(folder) + 1, 2**31 - 1).alias("source_file")


def split_csv(lines: DataFrame, header: str, names: Mapping[str, str], separator: str = ",") -> DataFrame:
    """Adds the text of columns (`names`: the column to add, the header's name for it; null where empty) and `shape`:
    why the line is no row, or null."""
    columns = column_names(header, separator)
    schema = ", ".join([*(f"c{i} STRING" for i in range(len(columns))), f"{_BROKEN} STRING"])
    fits = F.when(~_is_endless(separator), F.col("raw"))
    parsed = lines.withColumn("fields", F.from_csv(fits, schema, _CSV | {"sep": separator}))
    shape: Column = (
        F.when(F.trim("raw") == "", "empty line")
        .when(F.col("garbled"), "not UTF-8 text")
        .when(F.contains("raw", F.lit("\0")), "a NUL byte")
        .when(F.col("raw") == header, "repeated header")
        .when(F.col("fields").isNull() | F.col(f"fields.{_BROKEN}").isNotNull(), "wrong number of columns")
        .when(_is_open(F.col(f"fields.c{len(columns) - 1}"), separator), "a quote is not closed")
    )
    texts = [F.col(f"fields.c{columns.index(name)}").alias(alias) for alias, name in names.items()]
    return parsed.select(*PLACE, "raw", shape.alias("shape"), *texts)


def _is_endless(separator: str) -> Column:
    columns = F.length("raw") - F.length(F.replace(F.col("raw"), F.lit(separator), F.lit("")))
    return (F.octet_length("raw") >= _MOST_COLUMNS) & (columns >= _MOST_COLUMNS)


def _is_open(last: Column, separator: str) -> Column:
    """Whether the last field begins with a quote that nothing closes: the parser would keep what there is of it."""
    begun = F.coalesce(F.nullif(last, F.lit('"')), F.lit(""))  # a quote and no more is taken for a text
    quoted = F.concat(F.lit('"'), F.replace(begun, F.lit('"'), F.lit('""')))
    begins = (F.col("raw") == quoted) | F.endswith("raw", F.concat(F.lit(separator), quoted))
    return F.contains("raw", F.lit('"')) & begins  # most lines have none, and to ask for `last` is to parse them again


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
