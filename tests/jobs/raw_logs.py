"""Small logs in KuaiRand's format with every kind of broken row, and what ingest must make of them, row by row."""

from __future__ import annotations

import datetime
import gzip
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
NAMES = COLUMNS.split(",")
FLAGS = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_profile_enter", "is_hate")
DAY_MS = 86_400_000
FIRST = datetime.date(2026, 1, 1)
FIRST_MS = 1_767_225_600_000
USERS = "user_id,user_active_degree,follow_user_num,follow_user_num_range,onehot_feat0"
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)
# What breaks a row, as the column and the text that goes into it, and the reason to expect.
BREAKS = (
    ("user_id", "x7", "user_id is not an integer"),
    ("user_id", "", "user_id is missing"),
    ("user_id", "-3", "user_id is negative"),
    ("user_id", "9223372036854775808", "user_id is out of range"),
    ("video_id", "1.5", "video_id is not an integer"),
    ("video_id", "-1", "video_id is negative"),
    ("time_ms", "soon", "time_ms is not an integer"),
    ("time_ms", "1650812", "time_ms is out of range"),
    ("time_ms", "4133980800000", "time_ms is out of range"),
    ("play_time_ms", "-20", "play_time_ms is negative"),
    ("play_time_ms", "999999999999", "play_time_ms is out of range"),
    ("duration_ms", "long", "duration_ms is not an integer"),
    ("is_click", "2", "is_click is not 0 or 1"),
    ("is_hate", "yes", "is_hate is not 0 or 1"),
)


def row(rng: random.Random, day: int) -> list[str]:
    """A usable row from few users, items and times, so that keys repeat."""
    values = dict.fromkeys(NAMES, "0")
    values |= {flag: rng.choice("001") for flag in FLAGS}
    values |= {
        "user_id": str(rng.randrange(6)),
        "video_id": str(rng.randrange(5)),
        "date": "20991231",  # must be ignored
        "time_ms": str(FIRST_MS + day * DAY_MS + rng.randrange(8) * 60_000),
        "play_time_ms": rng.choice(["", "0", "1200", "99000"]),
        "duration_ms": rng.choice(["0", "", "31000", "7000"]),
        "tab": rng.choice(["1", "4", ""]),
    }
    return [values[name] for name in NAMES]


def lines_of_day(rng: random.Random, day: int, n: int) -> list[str]:
    """n usable rows of one day, some repeated, some broken."""
    lines = [",".join(row(rng, day)) for _ in range(n)]
    lines += rng.sample(lines, n // 5)
    for column, text, _ in BREAKS:
        broken = row(rng, day)
        broken[NAMES.index(column)] = text
        lines.append(",".join(broken))
    lines += ["", lines[0] + ",7", "1,2,3", COLUMNS, '"unclosed' + lines[1]]
    rng.shuffle(lines)
    return lines


def write(path: Path, header: str, lines: list[str]) -> None:
    text = "\n".join([header, *lines]) + "\n"
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text)


def write_catalogue(folder: Path, users: list[str], videos: list[str], suffix: str = "") -> None:
    write(folder / f"user_features_x.csv{suffix}", USERS, users)
    write(folder / f"video_features_basic_x.csv{suffix}", VIDEOS, videos)


@dataclass
class Expected:
    """`kept` maps (user, item, time_ms) to the tuple of `values`; `rejected` maps (file, row) to (reason, raw, date)."""

    kept: dict[tuple[int, int, int], tuple] = field(default_factory=dict)
    rejected: dict[tuple[str, int], tuple[str, str, datetime.date]] = field(default_factory=dict)
    duplicates: int = 0
    read: int = 0

    def reasons(self) -> Counter:
        return Counter(reason for reason, _, _ in self.rejected.values())


def reference(files: dict[str, list[str]]) -> Expected:
    """Brute force over the lines after each header, in the order of names; the source's time zone is UTC."""
    found = Expected()
    seen: set[tuple] = set()
    for name in sorted(files):
        parsed = [parse(line) for line in files[name]]
        days = {date for reason, date, _, _ in parsed if reason is None}
        for number, (line, (reason, date, key, values)) in enumerate(zip(files[name], parsed, strict=True), start=1):
            found.read += 1
            if reason is not None:
                found.rejected[name, number] = (reason, line, date if date in days else min(days))
            elif (key, values) in seen:
                found.duplicates += 1
            else:
                seen.add((key, values))
                if key in found.kept:
                    found.rejected[name, number] = ("same impression_id, different values", line, date)
                else:
                    found.kept[key] = values
    return found


def parse(line: str) -> tuple:
    """(reason or None, date or None, key, values) of one line."""
    cells = line.split(",")
    if line == "":
        return "empty line", None, None, None
    if line == COLUMNS:
        return "repeated header", None, None, None
    if len(cells) != len(NAMES) or line.startswith('"'):
        return "wrong number of columns", None, None, None
    row = dict(zip(NAMES, cells, strict=True))
    time = int(row["time_ms"]) if row["time_ms"].isdigit() else -1
    in_time = DAY_MS <= time < 4_133_980_800_000
    date = datetime.datetime.fromtimestamp(time / 1000, datetime.UTC).date() if in_time else None
    for column, text, reason in BREAKS:
        if row[column] == text and text not in ("", "0", "1"):
            return reason, date, None, None
        if column == "user_id" and row[column] == "":
            return "user_id is missing", date, None, None
    key = (int(row["user_id"]), int(row["video_id"]), time)
    duration = int(row["duration_ms"] or 0) or None
    play = int(row["play_time_ms"]) if row["play_time_ms"] else None
    return None, date, key, (date, row["tab"] or None, duration, play, *(row[flag] == "1" for flag in FLAGS))
