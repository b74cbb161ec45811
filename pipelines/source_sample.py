"""The first rows of a raw file, and single values read as the readers of ingest read them; starts no engine.

The readers say the same in Spark (`jobs.mapped_values`); a test holds the two against each other.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import itertools
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bounds import FALSE, INTEGER, LONGEST_MS, MAX_ID, NO_ID, ROUNDING, TRUE
from jobs.mapping import Cell
from jobs.source_files import SourceFile, column_types
from schemas.source import SourceConfig

SECONDS = {"s": 1, "ms": 1_000, "us": 1_000_000}  # units in one


@dataclass
class Sample:
    """Columns with their types, and of the chosen ones the values of the first rows; `broken` lines have other counts."""

    types: dict[str, pa.DataType]
    values: dict[str, list[Any]] = field(default_factory=dict)
    rows: int = 0
    broken: int = 0


def sample_of(file: SourceFile, names: Collection[str], rows: int, separator: str) -> Sample:
    """The first `rows` rows of the columns `names` that the file has. Raises ContractViolation for a broken file."""
    types = column_types(file, separator)
    chosen = [name for name in dict.fromkeys(names) if name in types]
    if not file.is_parquet:
        return _text_sample(file, types, chosen, rows, separator)
    with pq.ParquetFile(file.path) as parquet:
        batch = next(parquet.iter_batches(batch_size=rows, columns=chosen), None)
    table = pa.Table.from_batches([batch]) if batch is not None else pa.table({})
    values = {name: table.column(name).to_pylist() for name in chosen} if batch is not None else {}
    return Sample(types, values, table.num_rows)


def _text_sample(file: SourceFile, types: dict[str, pa.DataType], chosen: list[str], rows: int, separator: str) -> Sample:
    lines = first_lines(file, rows + 1)[1:]
    split = list(csv.reader(lines, delimiter=separator))
    whole = [cells for cells in split if len(cells) == len(types)]
    place = {name: i for i, name in enumerate(types)}
    values = {name: [cells[place[name]].strip() or None for cells in whole] for name in chosen}
    return Sample(types, values, len(whole), len(split) - len(whole))


def first_lines(file: SourceFile, n: int) -> list[str]:
    """The first `n` lines of a text file, gzip or plain, without their ends."""
    path = Path(file.path)
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as handle:
        return [line.decode("utf-8-sig", errors="replace").rstrip("\r\n") for line in itertools.islice(handle, n)]


def value_of(cell: Cell, raw: Any, source: SourceConfig) -> Any:
    """What ingest makes of a value that is not null, or None where it refuses the row."""
    readers: dict[str, Callable[[Cell, Any, SourceConfig], Any]] = {
        "id": _identifier,
        "time": moment,
        "number": _number,
        "flag": _flag,
        "floats": _floats,
        "day": _day,
    }
    reader = readers.get(cell.kind)
    return raw if reader is None else reader(cell, raw, source)


def _identifier(cell: Cell, raw: Any, source: SourceConfig) -> int | str | None:
    text = str(raw)
    if source.ids == "text":
        return text
    if isinstance(raw, str) and not re.fullmatch(INTEGER, text):
        return None if source.ids == "integer" or text.lower() in NO_ID else text
    number = float_of(raw)
    if number is None or number != math.floor(number):
        return None
    exact = int(raw)
    return exact if 0 <= exact <= MAX_ID else None


def moment(cell: Cell, raw: Any, source: SourceConfig, unit: str | None = None) -> datetime.datetime | None:
    """The time with its zone; None where it is none, or beyond what a date can hold."""
    zone = ZoneInfo(source.time_zone)
    unit = unit or source.ts_unit
    if isinstance(raw, datetime.datetime):
        return raw if raw.tzinfo else raw.replace(tzinfo=zone)
    if isinstance(raw, datetime.date):
        return datetime.datetime(raw.year, raw.month, raw.day, tzinfo=zone)
    try:
        if unit in SECONDS:
            seconds = float_of(raw)
            return None if seconds is None else datetime.datetime.fromtimestamp(seconds / SECONDS[unit], datetime.UTC)
        if not re.match(r"\d{4}-\d{2}-\d{2}([T ]|$)", str(raw)):
            return None
        read = datetime.datetime.fromisoformat(re.sub(r" ?UTC$", "Z", str(raw)))
        return read if read.tzinfo else read.replace(tzinfo=zone)
    except (ValueError, OverflowError, OSError):
        return None


def float_of(raw: Any) -> float | None:
    """A finite number, or None."""
    try:
        value = float(raw)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _number(cell: Cell, raw: Any, source: SourceConfig) -> float | None:
    value = float_of(raw)
    if value is None or cell.field == "rating":
        return value
    milliseconds = value * (1000 if source.duration_unit == "s" else 1)
    return milliseconds if 0 <= milliseconds <= LONGEST_MS else None


def _flag(cell: Cell, raw: Any, source: SourceConfig) -> bool | None:
    word = str(raw).lower()
    if word in TRUE + FALSE:
        return word in TRUE
    count = float_of(raw)
    return None if count is None or count < 0 else count > 0


def _floats(cell: Cell, raw: Any, source: SourceConfig) -> list[float] | None:
    parts = re.sub(r"[\[\],\s]+", " ", raw).split() if isinstance(raw, str) else raw
    values = [value for part in parts if (value := float_of(part)) is not None]
    fits = cell.field != "behaviour_log_probs" or max(values, default=0.0) <= ROUNDING
    return values if len(values) == len(parts) and fits else None


def _day(cell: Cell, raw: Any, source: SourceConfig) -> datetime.date | None:
    read = moment(cell, raw, source, unit="iso")
    return read.date() if read else None
