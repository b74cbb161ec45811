"""Generated logs of thousands of broken rows, in two text formats and as Parquet, and what must become of each row.

The rules are those of the documents (docs/design.md, schemas/config.py, schemas/tables.py), written as choices: each cell
comes with the value that it means or the reason for which it is refused, so nothing here parses what ingest parses.
"""

from __future__ import annotations

import datetime
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

from schemas.feedback import FLAGS

Choice = tuple[Any, Any]  # what is written, and the value that it means or the reason
VALUES = ("scene", "duration_ms", "play_ms", "rating", *FLAGS)
BEHAVIOUR = ("behaviour_log_probs", "behaviour_codebook", "behaviour_policy")
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
CONFLICT = "same impression_id, different values"
LEFT_OUT = "outside"  # of source.first_day to source.last_day: neither kept nor rejected


@dataclass(frozen=True)
class Column:
    """A column of the source: the field behind it, how a good cell is drawn, and the cells that break a row."""

    name: str
    target: str  # "" where ingest does not read it
    good: Callable[[random.Random], Choice]
    bad: Sequence[Choice] = ()


@dataclass(frozen=True)
class Made:
    """One row as written. `reasons`: any of them is right; empty where the row is usable. `time_us` null: unreadable."""

    line: Any  # bytes of a text format, cells of a typed one
    reasons: frozenset[str]
    values: Mapping[str, Any] = field(default_factory=dict)
    time_us: int | None = None
    shaped: bool = True


@dataclass(frozen=True)
class Format:
    """A source's own columns; the days of its times are those of `zone`, and those after `last` are not ingested. It is
    read at `now`, and a time more than `future_days` later is that of a broken clock."""

    columns: tuple[Column, ...]
    zone: str
    now: datetime.datetime
    future_days: int
    last: datetime.date = datetime.date.max

    def day(self, time_us: int) -> datetime.date:
        return (EPOCH + datetime.timedelta(microseconds=time_us)).astimezone(ZoneInfo(self.zone)).date()

    def judged(self, row: Made) -> tuple[datetime.date | None, bool, frozenset[str]]:
        """The row's day, whether it lies after `last`, and the reasons: the future is asked of a row with no other fault,
        and what lies there has no day."""
        if row.time_us is None:
            return None, False, row.reasons
        date, latest = self.day(row.time_us), self.now + datetime.timedelta(days=self.future_days)
        if date > self.last and row.shaped:
            return date, True, row.reasons
        if row.reasons or row.time_us <= (latest - EPOCH) // datetime.timedelta(microseconds=1):
            return date, False, row.reasons
        return None, False, frozenset(f"{column.name} is in the future" for column in self.columns if column.target == "ts")

    def row(self, rng: random.Random) -> tuple[dict[str, Choice], frozenset[str]]:
        """Cells by column, of which up to two are broken, and the reasons."""
        cells = {column.name: column.good(rng) for column in self.columns}
        broken = rng.sample([c for c in self.columns if c.bad], rng.choice((0, 0, 0, 1, 1, 2)))
        reasons = set()
        for column in broken:
            written, reason = rng.choice(column.bad)
            cells[column.name] = (written, None)
            reasons.add(f"{column.name} {reason}")
        return cells, frozenset(reasons)

    def made(self, line: Any, cells: Mapping[str, Choice], reasons: frozenset[str], shaped: bool = True) -> Made:
        values = {column.target: cells[column.name][1] for column in self.columns if column.target}
        return Made(line, reasons, values, values["ts"], shaped)


def text_rows(form: Format, columns: Sequence[Column], rng: random.Random, n: int, earlier: list[Made]) -> list[Made]:
    """n lines of a text file with these columns; some repeat lines of `earlier` files of the same columns, or the key of
    a line with another scene."""
    header = ",".join(column.name for column in columns).encode()
    made: list[Made] = []
    while len(made) < n:
        chance, before = rng.random(), earlier + made
        if chance < 0.08 and before:
            made.append(rng.choice(before))
            continue
        cells, reasons = form.row(rng)
        texts = [_cell(rng, str(cells[column.name][0])) for column in columns]
        if chance < 0.2:
            line, reason = _broken_line(rng, texts, header)
            made.append(form.made(line, cells, frozenset({reason}), shaped=False))
        else:
            made.append(form.made(b",".join(texts), cells, reasons))
            if chance < 0.25:
                scene = next(column.name for column in columns if column.target == "scene")
                other = cells | {scene: ("elsewhere", "elsewhere")}
                texts = [_cell(rng, str(other[column.name][0])) for column in columns]
                made.append(form.made(b",".join(texts), other, reasons))
    return made[:n]


def _cell(rng: random.Random, text: str) -> bytes:
    """As RFC 4180 writes it; a quote within an unquoted field stands for itself."""
    inner = '"' in text and "," not in text and not text.startswith('"') and rng.random() < 0.3
    if not inner and ("," in text or '"' in text or rng.random() < 0.05):
        text = '"' + text.replace('"', '""') + '"'
    return text.encode()


def _broken_line(rng: random.Random, cells: list[bytes], header: bytes) -> tuple[bytes, str]:
    """A line that is no row, and why."""
    columns = "wrong number of columns"
    quoted = any(b'"' in cell for cell in cells)
    few = b",".join([b"1", *cells[1 : rng.randrange(1, len(cells))]])
    options: list[tuple[bytes, str]] = [
        (rng.choice((b"", b" ", b"    ")), "empty line"),
        (header, "repeated header"),
        (few, columns),
        (b",".join([*cells, b"x" * rng.randrange(3)]), columns),
        (rng.choice((b"\x00" * 8, b",".join([*cells[:-1], b'"a\x00b"']), b",".join([b"\x001", *cells[1:]]))), "a NUL byte"),
        (few if quoted else b'"' + b",".join(cells), columns),
        (b",".join([*cells[:-1], b'"' + rng.choice((b"", b"open", b'a "" b'))]), "a quote is not closed"),
    ]
    garbled = list(cells)
    garbled[rng.randrange(len(cells))] = rng.choice((b"caf\xe9", b"\xff", b"12\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x98"))
    options.append((b",".join(garbled), "not UTF-8 text"))
    if rng.random() < 0.03:
        options = [(b",".join([*cells, *[b"1"] * 25_000]), columns), (b"\xfe" * 50_000, "not UTF-8 text")]
    return rng.choice(options)


@dataclass
class Expected:
    """What must be in the tables. Rows of a file are numbered from 1."""

    kept: dict[tuple, tuple] = field(default_factory=dict)  # (user, item, ts, request): date and values
    rejected: dict[tuple[str, int], tuple[frozenset[str], Any, set[datetime.date]]] = field(default_factory=dict)
    files: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))  # read, usable, rejected, outside
    duplicates: int = 0
    conflicts: int = 0


def expected(files: Mapping[str, tuple[Format, Sequence[Made]]]) -> Expected:
    """Brute force: rows in the order of file names; the first of a key stays."""
    found = Expected()
    seen: set[tuple] = set()
    for name in sorted(files):
        form, rows = files[name]
        judged = [form.judged(row) for row in rows]
        days = {date for date, out, reasons in judged if date and not reasons and not out}
        for number, (row, (date, out, reasons)) in enumerate(zip(rows, judged, strict=True), start=1):
            fate = LEFT_OUT if out else "rejected" if reasons else "usable"
            found.files[name].update(("read", fate))
            if fate == "rejected":  # a row of no day of its file is dated the first; a broken line may tell its day or not
                own = {date} & days if date else set()
                dated = own or {min(days)} if row.shaped else own | {min(days)}
                found.rejected[name, number] = (reasons, row.line, dated)
            elif fate == "usable":
                _judge(found, seen, (name, number), row, date)
    return found


def _judge(found: Expected, seen: set[tuple], place: tuple[str, int], row: Made, date: datetime.date | None) -> None:
    get = row.values.get
    key = (get("user_id"), get("item_id"), row.time_us, get("request_id"))
    values = (date, *(get(name) for name in (*VALUES, *BEHAVIOUR)))
    if (key, values) in seen:
        found.duplicates += 1
    elif key in found.kept:
        found.conflicts += 1
        found.rejected[place] = (frozenset({CONFLICT}), row.line, {date} if date else set())
    else:
        found.kept[key] = values
    seen.add((key, values))
