"""The section `source` of the configuration: where raw logs come from and how to read them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Literal

from schemas.settings import require, resource


@dataclass(frozen=True)
class LogColumns:
    """The source's columns behind `impressions`; what is not named is null. See docs/design.md for what is read how."""

    user_id: str
    item_id: str
    ts: str
    request_id: str | None = None
    scene: str | None = None
    duration_ms: str | None = None
    play_ms: str | None = None
    rating: str | None = None
    click: str | None = None
    long_view: str | None = None
    like: str | None = None
    follow: str | None = None
    comment: str | None = None
    forward: str | None = None
    profile_enter: str | None = None
    hate: str | None = None
    behaviour_log_probs: str | None = None
    behaviour_codebook: str | None = None
    behaviour_policy: str | None = None

    def __post_init__(self) -> None:
        whole = (self.behaviour_log_probs is None) == (self.behaviour_codebook is None)
        require(whole, "source.log.columns.behaviour_codebook", "goes with behaviour_log_probs: name both columns or none")


@dataclass(frozen=True)
class LogMapping:
    """Which files are the log, below source.path, and what their columns mean."""

    columns: LogColumns
    files: str = field(metadata={"resource": True})  # a pattern below source.path


@dataclass(frozen=True)
class ItemColumns:
    """The source's columns behind `items`."""

    item_id: str
    author_id: str | None = None
    tags: str | None = None
    title: str | None = None
    duration_ms: str | None = None
    upload_date: str | None = None
    withdrawn: str | None = None


@dataclass(frozen=True)
class ItemMapping:
    columns: ItemColumns
    files: str = field(metadata={"resource": True})  # a pattern below source.path
    attributes: tuple[str, ...] = ()  # columns kept as 'name=value'
    vectors: tuple[str, ...] = ()  # columns of ready-made vectors (image, frames, sound), each of one width


@dataclass(frozen=True)
class UserColumns:
    user_id: str


@dataclass(frozen=True)
class UserMapping:
    columns: UserColumns
    files: str = field(metadata={"resource": True})  # a pattern below source.path
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceConfig:
    """Where raw logs come from and how to read them. `log`, `items`, `users` and what follows them are for kind mapped."""

    kind: Literal["kuairand", "sequences", "movielens", "mapped"] = "kuairand"
    path: str = resource("")
    time_zone: str = "UTC"  # of the column `date`, and of times that name no offset
    request_gap_ms: int = 0  # impressions of a user at most this far apart are one request; 0: equal times only
    # Attributes of users and items come as one undated snapshot and are taken to hold from the first day on.
    # Only where the items' upload day is known may they be dated by it.
    items_dated_by: Literal["snapshot", "upload"] = "snapshot"
    rating_threshold: float = 4.0  # a rating at or above it sets the bit `rated_high`
    first_day: datetime.date | None = None  # rows of earlier days are not ingested; null: the log's own first day
    last_day: datetime.date | None = None
    # Rows are refused whose times lie further after the moment at which ingest first read their file; null: none for that
    future_days: int | None = 1
    log: LogMapping | None = None
    items: ItemMapping | None = None
    users: UserMapping | None = None
    ts_unit: Literal["auto", "s", "ms", "us", "iso"] = "auto"  # auto: Parquet's timestamps, and text as ISO 8601
    duration_unit: Literal["ms", "s"] = "ms"  # of play times too
    # auto: integers stay, other text is hashed, and NaN, null and none are no ids; text: all are hashed
    ids: Literal["auto", "integer", "text"] = "auto"
    separator: str = ","  # of CSV columns
    list_separator: str = "|"  # of tags within one text

    def __post_init__(self) -> None:
        mapped = self.kind == "mapped"
        require(not mapped or self.log is not None, "source.log", "is missing: kind mapped needs its files and columns")
        for name in ("log", "items", "users"):
            require(mapped or getattr(self, name) is None, f"source.{name}", "is read for kind mapped alone: remove it")
        sane = self.future_days is None or 0 <= self.future_days <= 36_525
        require(sane, "source.future_days", "must lie between 0 and 36,525, or be null: then every time up to 2100 is kept")
        require(len(self.separator) == 1, "source.separator", "must be one character")
        require(len(self.list_separator) == 1, "source.list_separator", "must be one character")
