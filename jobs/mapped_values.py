"""One mapped column as Spark expressions: the value that goes into the table, and why the row must be refused.

A value is null where the source has none; a fault is null where the value can be trusted. What cannot be read is refused
and never guessed: a count below zero, a number that is NaN, a time outside 1970 to 2100, a play of more than a week.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyarrow import types
from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, LongType, TimestampNTZType

from jobs.bounds import (
    FALSE,
    FIRST_MS,
    INTEGER,
    LAST_MS,
    LONGEST_MS,
    LONGEST_NUMBER,
    MAX_ID,
    NO_ID,
    NUMBER,
    TRUE,
)
from jobs.mapping import Cell, is_list, is_number, is_text
from jobs.tables import spark_schema
from schemas.source import SourceConfig
from schemas.tables import ITEMS

DIGITS = {16: 11, 32: 24, 64: 53}  # binary ones of a float, by its width
MICROS = {"s": 1_000_000, "ms": 1000, "us": 1}
DATED = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]|$)"
OFFSET = r"(Z|UTC|[+-][0-9]{2}(:?[0-9]{2})?)$"
# Spark reads names of zones too and +1:00: a time with what we do not know as its offset would be moved twice.
TIMED = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9:.]*( ?" + OFFSET[:-1] + ")?)?$"
ZONED = r":[0-9]{2}.*" + OFFSET
NAMED_VECTORS = spark_schema(ITEMS)["vectors"].dataType
MOST = 3e38  # of a float; NaN and infinity lie above


@dataclass(frozen=True)
class Value:
    """`source_id` is the original of an id that was hashed."""

    column: Column
    fault: Column
    source_id: Column | None = None


@dataclass(frozen=True)
class Input:
    """A cell in a frame: the column that holds it and the type that Spark gave it."""

    cell: Cell
    column: Column
    dtype: DataType

    @property
    def text(self) -> Column:
        """Trimmed; null where empty."""
        return F.nullif(F.trim(self.column.cast("string")), F.lit(""))

    @property
    def double(self) -> Column:
        return self.numeral.try_cast("double") if is_text(self.cell.type) else self.column.cast("double")

    @property
    def numeral(self) -> Column:
        """The text, or null where it is not written as a number."""
        return F.when(self.text.rlike(NUMBER), self.text)

    def fault(self, condition: Column, what: str) -> Column:
        return F.when(condition, f"{self.cell.name} {what}")


def identifier(given: Input, ids: str, optional: bool = False) -> Value:
    """A non-negative bigint: an integer itself, or the hash of other text (source.ids) that is no NO_ID."""
    text, number = given.text, given.text.try_cast("bigint")
    if ids != "text" and is_number(given.cell.type):
        number = given.column.try_cast("bigint")
        if types.is_floating(given.cell.type):  # beyond, one float stands for several integers
            number = F.when(F.abs(given.column) <= 2.0 ** DIGITS[given.cell.type.bit_width], number)
        whole = given.column.isNull() | number.isNull() | (number.cast("double") == given.column.cast("double"))
        missing = given.column.isNull() | F.isnan(given.column.cast("double"))  # what pandas makes of a missing integer
        broken = given.fault(~whole, "is not an integer")
        hashed = F.lit(False)
    else:
        missing = text.isNull() | F.lower(text).isin(*NO_ID) if ids == "auto" else text.isNull()
        broken = given.fault(~text.rlike(INTEGER), "is not an integer") if ids == "integer" else F.lit(None)
        hashed = {"integer": F.lit(False), "text": F.lit(True), "auto": ~text.rlike(INTEGER)}[ids]
    lost = F.lit(None) if optional else given.fault(missing, "is missing")
    out = given.fault(~missing & ~hashed & number.isNull(), "is out of range")
    negative = given.fault(~hashed & (number < 0), "is negative")
    value = F.when(hashed, F.xxhash64(text).bitwiseAND(F.lit(MAX_ID))).otherwise(number)
    return Value(F.when(~missing, value), F.coalesce(lost, broken, out, negative), F.when(hashed & ~missing, text))


def moment(given: Input, source: SourceConfig) -> Value:
    """A timestamp; one without offset is in the source's time zone."""
    ts = _instant(given, source)
    micros = F.unix_micros(ts)
    in_range = micros.between(FIRST_MS * 1000, LAST_MS * 1000 + 999)
    unread = given.fault(ts.isNull(), f"is not {_time_form(given, source)}")
    fault = F.coalesce(given.fault(given.text.isNull(), "is missing"), unread, given.fault(~in_range, "is out of range"))
    return Value(F.when(in_range, ts), fault)


def _time_form(given: Input, source: SourceConfig) -> str:
    iso = "an ISO 8601 time (for numbers set source.ts_unit)"
    return f"a time in {source.ts_unit}" if source.ts_unit in MICROS else iso


def _instant(given: Input, source: SourceConfig) -> Column:
    zone, column, dtype = source.time_zone, given.column, given.cell.type
    if types.is_timestamp(dtype):
        if isinstance(given.dtype, LongType):  # nanoseconds, which Spark reads as numbers
            local = F.timestamp_micros(F.floor(column.cast("decimal(20,0)") / 1000).cast("bigint"))
            return local if dtype.tz else F.to_utc_timestamp(local, zone)
        is_local = isinstance(given.dtype, TimestampNTZType)
        return F.to_utc_timestamp(column.cast("timestamp"), zone) if is_local else column
    if types.is_date(dtype):
        return F.to_utc_timestamp(column.cast("timestamp"), zone)
    if source.ts_unit in MICROS:
        numeral = F.when(F.length(given.text) <= LONGEST_NUMBER, given.numeral)
        exact = numeral.try_cast("decimal(32,6)") if is_text(dtype) else column.try_cast("decimal(32,6)")
        return F.timestamp_micros(F.floor(exact * MICROS[source.ts_unit]).try_cast("bigint"))
    parsed = given.text.try_cast("timestamp")  # the session's zone is UTC
    instant = F.when(given.text.rlike(ZONED), parsed).otherwise(F.to_utc_timestamp(parsed, zone))
    return F.when(given.text.rlike(TIMED), instant)


def milliseconds(given: Input, unit: str, positive: bool = False) -> Value:
    """Whole milliseconds as bigint; `positive`: 0 means unknown."""
    value, fault = given.double * (1000 if unit == "s" else 1), number(given).fault
    long = F.when(value.between(0, LONGEST_MS), F.round(value)).cast("bigint")
    faults = (fault, given.fault(value < 0, "is negative"), given.fault(value > LONGEST_MS, "is out of range"))
    return Value(F.nullif(long, F.lit(0).cast("bigint")) if positive else long, F.coalesce(*faults))


def number(given: Input) -> Value:
    """A finite number as float."""
    value = given.double
    finite = value.isNotNull() & (F.abs(value) < MOST)
    return Value(F.when(finite, value).cast("float"), given.fault(given.text.isNotNull() & ~finite, "is not a number"))


def flag(given: Input) -> Value:
    """0 or 1, true or false, yes or no, or a count, of which any above 0 is true."""
    if types.is_boolean(given.cell.type):
        return Value(given.column, F.lit(None).cast("string"))
    count, word = given.double, F.lower(given.text)
    by_word = F.when(word.isin(*TRUE), True).when(word.isin(*FALSE), False)
    usable = by_word.isNotNull() | count.between(0, MOST)
    fault = given.fault(given.text.isNotNull() & ~F.coalesce(usable, F.lit(False)), "is neither a flag nor a count")
    return Value(F.coalesce(by_word, count > 0), fault)


def texts(given: Input, separator: str) -> Value:
    """Distinct, trimmed texts of a list or of one text; empty where there are none."""
    parts = given.column if is_list(given.cell.type) else F.split(given.text, "\\Q" + separator + "\\E")
    trimmed = F.transform(parts, lambda part: F.trim(part.cast("string")))
    kept = F.array_distinct(F.filter(trimmed, lambda part: part.isNotNull() & (part != "")))
    return Value(F.coalesce(kept, F.array().cast("array<string>")), F.lit(None).cast("string"))


def floats(given: Input, most: float | None = None) -> Value:
    """array<float>, null where empty; `most` is the highest that an element may be."""
    if is_list(given.cell.type):
        parts = given.column
    else:
        parts = F.split(F.nullif(F.trim(F.regexp_replace(given.text, r"[\[\],\s]+", " ")), F.lit("")), " ")
        parts = F.transform(parts, lambda part: F.when(part.rlike(NUMBER), part))
    values = F.transform(parts, lambda part: part.try_cast("float"))
    unread = F.exists(values, lambda value: value.isNull() | F.isnan(value) | (F.abs(value) == float("inf")))
    faults = [given.fault(unread, "is not a list of numbers")]
    if most is not None:
        faults.append(given.fault(F.exists(values, lambda value: value > most), f"has a value above {most:.0f}"))
    return Value(F.when(F.size(values) > 0, values), F.coalesce(*faults))


def day(given: Input, source: SourceConfig) -> Value:
    """A date; of a time, its day in the source's time zone."""
    if types.is_timestamp(given.cell.type):
        value = F.to_date(F.from_utc_timestamp(_instant(given, source), source.time_zone))
    elif types.is_date(given.cell.type):
        value = given.column.cast("date")
    else:
        value = F.when(given.text.rlike(DATED), given.text.try_cast("date"))
    return Value(value, given.fault(given.text.isNotNull() & value.isNull(), "is not a date"))
