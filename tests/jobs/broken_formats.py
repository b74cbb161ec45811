"""Cells that keep a row and cells that break it, and the columns of an own CSV source, for `tests.jobs.broken_rows`."""

from __future__ import annotations

import datetime
import random
import struct
from collections.abc import Callable
from zoneinfo import ZoneInfo

from schemas.source import LogColumns
from tests.jobs.broken_rows import EPOCH, Choice, Column, Format

ZONE = "Asia/Shanghai"
FIRST = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
LATEST = FIRST + datetime.timedelta(days=2, hours=18)  # later times, of which the rows have some hours, lie in the future
OWN = LogColumns(
    user_id="uid",
    item_id="sku",
    ts="at",
    request_id="req",
    scene="page",
    play_ms="watch",
    duration_ms="length",
    rating="stars",
    click="clicked",
    like="hearts",
    behaviour_log_probs="lp",
    behaviour_codebook="cb",
    behaviour_policy="who",
)
NOT_ISO = "is not an ISO 8601 time (for numbers set source.ts_unit)"
LONG = "z" * 300_000  # drawn rarely: a split that it spans is a task
LONGISH = "z" * 3_000


def of(*choices: Choice) -> Callable[[random.Random], Choice]:
    return lambda rng: rng.choice(choices)


def bad(reason: str, *texts: object) -> list[Choice]:
    return [(text, reason) for text in texts]


def f32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


TEXTS = ("a,b", '5" pipe', '"all"', "tab\tx", "e\u0301", "\u2028", "\ufeffx", "\x7f", "日本 🎬", "\\", "\\,", '\\"', "'")
TEXTS += ("home", "a;b|c", "NaN", "null", "=1+1", "%00", "\\N", "#c")
NUMERALS: tuple[Choice, ...] = (
    *(("", None), ("0", 0), ("-0", 0), ("1500", 1500), ("1500.4", 1500), ("1.5e3", 1500), ("+5", 5), (".5", 1)),
    *(("5.", 5), (" 5 ", 5), ("007", 7), ("604800000", 604_800_000), ("1e-400", 0), ("0" * 400 + "9", 9)),
)
BAD_NUMERALS: tuple[Choice, ...] = (
    *bad("is negative", "-1", "-0.4", "-9223372036854775809"),
    *bad("is out of range", "604800001", "1e12", "9" * 25, "18446744073709551616"),
    *bad(
        "is not a number",
        *[
            "NaN",
            "-nan",
            "inf",
            "-Infinity",
            "1,000",
            "1_000",
            "1.000,5",
            "1500f",
            "2d",
            "0x1p3",
            "soon",
            "--5",
            "1e400",
            "null",
            "½",
            "٣",
        ],
    ),
    *bad("is not a number", "1 000", "5\u00a0", "1e99999999999", LONGISH),
)
BAD_IDS = (
    *bad("is missing", "", "  ", "NaN", "null", "None", "nAn"),
    *bad("is negative", "-3", "-9223372036854775808"),
    *bad("is out of range", "9223372036854775808", "1" * 300),
)
BAD_INTEGERS = (
    *bad("is not an integer", *["x", "1.5", "1.0", "NaN", "null", "1,000", "1_000", "0x10", "1e3", "٣"], "- 3", LONGISH),
    *bad("is out of range", "9223372036854775808", "1" * 300),
)


def own_id(rng: random.Random) -> Choice:
    """Integers as they are written are themselves; all else is text, trimmed."""
    number = rng.randrange(1000)
    chosen = rng.choice((str(number), str(number), f" {number} ", f"n{number}", f"{number}.0", f"0{number}", f"+{number}"))
    odd = ("Zoë", "x,y", 'say "hi"', "-0", "\ufeff7", "7\u00a0", "\u0667", "1e3", "9223372036854775807", "nano")
    text = (rng.choice(odd) if rng.random() < 0.1 else chosen).strip(" ")
    whole = text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")
    return text, int(text) if whole else text


def own_time(rng: random.Random) -> Choice:
    fraction = rng.choice((0, 0, 500_000, rng.randrange(1_000_000)))
    when = FIRST + datetime.timedelta(seconds=rng.randrange(3 * 86_400), microseconds=fraction)
    if rng.random() < 0.01:
        edges = (EPOCH + datetime.timedelta(days=1), datetime.datetime(2100, 12, 31, 23, 59, 59, 999_999, datetime.UTC))
        edges += (LATEST, LATEST + datetime.timedelta(microseconds=1), datetime.datetime(2036, 7, 1, tzinfo=datetime.UTC))
        when = rng.choice(edges)
    form, sign = rng.randrange(8), rng.choice("T ")
    if form == 0:
        when = datetime.datetime(2026, 1, rng.choice((2, 3)), tzinfo=ZoneInfo(ZONE))
        return when.strftime("%Y-%m-%d"), micros(when)
    if form == 1:  # no offset: the source's zone
        return when.astimezone(ZoneInfo(ZONE)).strftime(f"%Y-%m-%d{sign}%H:%M:%S.%f"), micros(when)
    if form == 2:
        return when.strftime(f"%Y-%m-%d{sign}%H:%M:%S.%f789Z"), micros(when)
    hours, minutes = rng.choice(((0, 0), (5, 30), (-8, 0), (14, 0), (-3, 30)))
    zone = datetime.timezone(datetime.timedelta(hours=hours, minutes=minutes if hours >= 0 else -minutes))
    offset = ("Z", " UTC")[form % 2] if not hours else f"{hours:+03d}{(':', '')[form % 2]}{minutes:02d}"
    return when.astimezone(zone).strftime(f"%Y-%m-%d{sign}%H:%M:%S.%f") + offset, micros(when)


def micros(when: datetime.datetime) -> int:
    return (when - EPOCH) // datetime.timedelta(microseconds=1)


BAD_TIMES = (
    *bad("is missing", "", " "),
    *bad(
        "is out of range",
        "1969-12-31T23:00:00Z",
        "1970-01-01",
        "1800-01-01",
        "0001-01-01T00:00:00Z",
        "0026-01-02",
        "2101-01-01T00:00:00Z",
    ),
    *bad("is out of range", "9999-12-31T23:59:59Z", "2300-01-01 00:00:00"),
    *bad(
        NOT_ISO,
        "yesterday",
        "12:30:00",
        "26-01-02",
        "0",
        "2026-02-30",
        "2026-01-02T25:00:00",
        "2026-01-02T23:59:60",
        "2026-1-2",
        "now",
    ),
    *bad(NOT_ISO, "1767225600", "1000000000000000000", "-1", "NaN", "10000-01-01", "01/02/2026", "2026-01-02 10:00:00 PST"),
    *bad(NOT_ISO, "2026-01-02 10:00:00 America/New_York", "2026-01-02T10:00:00+1:00", "2026-01-02 10:00:00 GMT"),
    *bad(NOT_ISO, "2026-01-02T10:00:00UTC+1", "2026-01-02T10:00:00+01:00:30", "2026-01-02Tnoon"),
)
COUNTS: tuple[Choice, ...] = (
    *(("", None), ("0", False), ("1", True), ("3", True), ("0.0", False), ("0.5", True), ("1e3", True), ("true", True)),
    *(("F", False), ("Yes", True), ("n", False), ("TRUE", True), ("no", False), ("T", True)),
)
BAD_COUNTS = bad(
    "is neither a flag nor a count", *["maybe", "-2", "NaN", "inf", "2,5", "on", "1f", "null", "1e39"], "yes no"
)
LISTS: tuple[Choice, ...] = (
    *(("", None), ("[]", None), ("-0.5 -1.25", (-0.5, -1.25)), ("[-0.5, -1.25]", (-0.5, -1.25))),
    *(("0.0005", (f32(0.0005),)), ("-1e3", (-1000.0,))),
)
BAD_LISTS = bad("is not a list of numbers", "x", "-0.5 NaN", "-inf", "-1f", "-0.5;-1", "-1 null", "-0x1p3", "-1e99")
RATINGS: tuple[Choice, ...] = (("", None), ("4.5", 4.5), ("-1", -1.0), ("0.1", f32(0.1)), ("1e38", f32(1e38)), ("5", 5.0))


def text_column(name: str, target: str) -> Column:
    return Column(name, target, lambda rng: as_text(LONG if rng.random() < 0.0005 else rng.choice((*TEXTS, "", " ", "x "))))


def as_text(text: str) -> Choice:
    return text, text.strip(" ") or None


OWN_CSV = Format(
    (
        Column("uid", "user_id", own_id, BAD_IDS),
        Column("sku", "item_id", own_id, BAD_IDS),
        Column("at", "ts", own_time, BAD_TIMES),
        Column("req", "request_id", of(("", None), ("r1", "r1"), ("r 2", "r 2"), (" ", None))),
        text_column("page", "scene"),
        Column("watch", "play_ms", of(*NUMERALS), BAD_NUMERALS),
        Column("length", "duration_ms", of(*((text, value or None) for text, value in NUMERALS)), BAD_NUMERALS),
        Column(
            "stars", "rating", of(*RATINGS), bad("is not a number", "NaN", "inf", "many", "4,5", "4.5f", "1e39", "-1e400")
        ),
        Column("clicked", "click", of(*COUNTS), BAD_COUNTS),
        Column("hearts", "like", of(*COUNTS), BAD_COUNTS),
        Column("lp", "behaviour_log_probs", of(*LISTS), [*BAD_LISTS, ("0.5", "has a value above 0")]),
        text_column("cb", "behaviour_codebook"),
        text_column("who", "behaviour_policy"),
        Column("unknown", "", of(*((text, None) for text in TEXTS))),
    ),
    ZONE,
    now=LATEST - datetime.timedelta(days=1),
    future_days=1,
)
