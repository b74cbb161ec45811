"""Reader of any CSV or Parquet with a column mapping, as the common columns of `jobs.ingest`.

Files of one role may differ in their columns and types: they are read in groups that agree. Of a Parquet row `raw` is the
JSON of its mapped columns. An id that is no integer is hashed to a non-negative int64, and its original travels beside it
as `user_source` and `item_source` of a log, `source_id` of a catalogue (see `jobs.source_ids`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.bounds import ROUNDING
from jobs.lines import PLACE, escaped_paths, read_lines, source_file, split_csv
from jobs.mapped_values import (
    NAMED_VECTORS,
    Input,
    Value,
    day,
    flag,
    floats,
    identifier,
    milliseconds,
    moment,
    number,
    texts,
)
from jobs.mapping import ATTRIBUTE, VECTOR, Cell, cells_of, columns_of, is_text, role_mappings
from jobs.source_files import SourceFile, column_types, headers
from schemas.feedback import FLAGS
from schemas.source import SourceConfig

Inputs = Mapping[str, Input]  # by field
Parse = Callable[[DataFrame, Inputs, SourceConfig], DataFrame]


def read_log(spark: SparkSession, files: Iterable[SourceFile], source: SourceConfig) -> DataFrame:
    """One row a line, headers included: PLACE, raw, reason (null: usable), the values of an impression, request_key,
    user_source and item_source.

    Raises ContractViolation for a column that is missing or of a type that does not serve.
    """
    mapping = role_mappings(source)["log"]
    return read_role(spark, files, "log", columns_of(mapping), source, _log)


def read_catalogues(spark: SparkSession, files: Iterable[SourceFile], source: SourceConfig) -> dict[str, DataFrame]:
    """By table, one row a line: PLACE, raw, reason and the columns of the table but `date`."""
    parsers: dict[str, Parse] = {"items": _items, "users": _users}
    found = {}
    for role, mapping in role_mappings(source).items():
        chosen = [file for file in files if file.role == role]
        if role in parsers and chosen:
            found[role] = read_role(spark, chosen, role, columns_of(mapping), source, parsers[role])
    return found


def read_role(
    spark: SparkSession,
    files: Iterable[SourceFile],
    role: str,
    columns: Mapping[str, str],
    source: SourceConfig,
    parse: Parse,
) -> DataFrame:
    """The parsed rows of all files of a role; `columns` maps our fields to the source's columns."""
    groups = _groups(files, role, columns, source)
    parsed = []
    for group, cells in groups:
        read = _parquet if group[0].is_parquet else _text
        rows = read(spark, group, cells, source)
        types = {name: field.dataType for name, field in zip(rows.columns, rows.schema, strict=True)}
        given = {cell.field: Input(cell, F.col(_alias(i)), types[_alias(i)]) for i, cell in enumerate(cells)}
        parsed.append(parse(rows, given, source))
    return reduce(DataFrame.unionByName, parsed)


def _groups(
    files: Iterable[SourceFile], role: str, columns: Mapping[str, str], source: SourceConfig
) -> Iterator[tuple[list[SourceFile], list[Cell]]]:
    """Files that one read serves: Parquet files of equal types, text files of equal headers."""
    files = list(files)
    first_lines = headers(file for file in files if file.titled)
    groups: dict[tuple[str, str], list[SourceFile]] = defaultdict(list)
    cells: dict[tuple[str, str], list[Cell]] = {}
    for file in files:
        present = column_types(file, source.separator)
        own = cells_of(file.name, role, columns, present, source.ts_unit)
        key = (first_lines.get(file.name, ""), str([str(cell.type) for cell in own]))
        groups[key].append(file)
        cells[key] = own
    return ((group, cells[key]) for key, group in sorted(groups.items()))


def _alias(place: int) -> str:
    """A column's name in the frame: the source's own could be any, `raw` and `line` too."""
    return f"in_{place}"


def _text(spark: SparkSession, files: list[SourceFile], cells: list[Cell], source: SourceConfig) -> DataFrame:
    (header,) = set(headers(files).values())
    return split_csv(
        read_lines(spark, files), header, {_alias(i): cell.name for i, cell in enumerate(cells)}, source.separator
    )


def _parquet(spark: SparkSession, files: list[SourceFile], cells: list[Cell], source: SourceConfig) -> DataFrame:
    rows = spark.read.parquet(*escaped_paths(files))
    quoted = {cell.name: F.col("`" + cell.name.replace("`", "``") + "`") for cell in cells}
    return rows.select(
        source_file(files),
        F.lit(0).cast("bigint").alias("block"),
        F.col("_metadata.row_index").alias("line"),
        F.to_json(F.struct(*quoted.values()), {"ignoreNullFields": "false"}).alias("raw"),
        _garbled(cells, quoted).alias("shape"),
        *(quoted[cell.name].alias(_alias(i)) for i, cell in enumerate(cells)),
    )


def _garbled(cells: list[Cell], columns: Mapping[str, Column]) -> Column:
    texts = [~F.is_valid_utf8(columns[cell.name]) for cell in cells if is_text(cell.type)]
    found = reduce(Column.__or__, (F.coalesce(text, F.lit(False)) for text in texts), F.lit(False))
    return F.when(found, "not UTF-8 text")


def judged_row(values: Mapping[str, Value]) -> list[Column]:
    """PLACE, raw, reason, and the values under their names; the original of an id follows it."""
    faults = F.coalesce("shape", *(value.fault.cast("string") for value in values.values()))
    return [*map(F.col, PLACE), F.col("raw"), faults.alias("reason"), *(v.column.alias(n) for n, v in values.items())]


def _log(rows: DataFrame, given: Inputs, source: SourceConfig) -> DataFrame:
    values = {"ts": moment(given["ts"], source)}
    for field in ("user_id", "item_id"):
        values[field] = identifier(given[field], source.ids)
    readers: dict[str, Callable[[Input], Value]] = {
        "duration_ms": lambda g: milliseconds(g, source.duration_unit, positive=True),
        "play_ms": lambda g: milliseconds(g, source.duration_unit),
        "rating": number,
        **dict.fromkeys(FLAGS, flag),
        "behaviour_log_probs": lambda g: floats(g, most=ROUNDING),
    }
    for field, cell in given.items():
        if field not in values and field != "request_id":
            values[field] = readers.get(field, text)(cell)
    date = F.to_date(F.from_utc_timestamp(values["ts"].column, source.time_zone))
    request = given["request_id"].text if "request_id" in given else F.lit(None).cast("string")
    return rows.select(
        *judged_row(values),
        date.alias("date"),
        request.alias("request_key"),
        _original(values["user_id"]).alias("user_source"),
        _original(values["item_id"]).alias("item_source"),
    )


def _items(rows: DataFrame, given: Inputs, source: SourceConfig) -> DataFrame:
    item = identifier(given["item_id"], source.ids)
    values = {"item_id": item, "source_id": Value(_original(item), F.lit(None))}
    readers: dict[str, tuple[str, Callable[[Input], Value]]] = {
        "author_id": ("bigint", lambda g: identifier(g, source.ids, optional=True)),
        "tags": ("array<string>", lambda g: texts(g, source.list_separator)),
        "title": ("string", text),
        "duration_ms": ("bigint", lambda g: milliseconds(g, source.duration_unit, positive=True)),
        "upload_date": ("date", lambda g: day(g, source)),
        "attributes": ("array<string>", text),
        "withdrawn": ("date", lambda g: day(g, source)),
    }
    for field, (dtype, read) in readers.items():
        absent = F.array() if dtype == "array<string>" else F.lit(None)
        values[field] = read(given[field]) if field in given else Value(absent.cast(dtype), F.lit(None))
    values["attributes"] = attributes(given)
    values["vectors"] = vectors(given)
    return rows.select(*judged_row(values))


def _users(rows: DataFrame, given: Inputs, source: SourceConfig) -> DataFrame:
    user = identifier(given["user_id"], source.ids)
    source_id = Value(_original(user), F.lit(None))
    return rows.select(*judged_row({"user_id": user, "source_id": source_id, "attributes": attributes(given)}))


def text(given: Input) -> Value:
    return Value(given.text, F.lit(None))


def attributes(given: Inputs) -> Value:
    """'name=value' of every attribute that has one."""
    cells = [cell for field, cell in given.items() if field.startswith(ATTRIBUTE)]
    pairs = [F.concat(F.lit(f"{cell.cell.name}="), cell.text) for cell in cells]
    found = F.array_compact(F.array(*pairs)) if pairs else F.array().cast("array<string>")
    return Value(found, F.lit(None))


def vectors(given: Inputs) -> Value:
    """The vectors that the row has, with their names; null where it has none."""
    read = {cell.cell.name: floats(cell) for field, cell in given.items() if field.startswith(VECTOR)}
    if not read:
        return Value(F.lit(None).cast(NAMED_VECTORS), F.lit(None))
    named = F.array(*(F.struct(F.lit(name).alias("name"), value.column.alias("values")) for name, value in read.items()))
    there = F.filter(named, lambda vector: vector["values"].isNotNull())
    return Value(F.when(F.size(there) > 0, there), F.coalesce(*(value.fault for value in read.values())))


def _original(value: Value) -> Column:
    return (F.lit(None) if value.source_id is None else value.source_id).cast("string")
